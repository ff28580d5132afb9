// The inner loops of the codec, one table of functions per backend.
//
// A backend fills an Ops; scalar's is complete, the others start from a copy of it and overlay what they do
// faster. Every backend gives the same bytes as scalar for every input, hostile ones included.
// codec/FORMAT.md is the specification of what they compute; kernels/math.h is its arithmetic.
//
// Common contract, unless a slot says otherwise: pointers need the alignment of their element type only;
// arrays do not overlap; a count may be any number, 0 included; nothing is read or written outside the arrays
// given (no slop); no allocation, no locks, no exceptions; every slot may run in any thread on distinct data.
//
// Tiles are channel-major: row c holds channel c of one head for all tokens of the chunk, `tile_stride`
// elements apart from row c + 1. Rows of tensors are token-major, as engines store them, `row_bytes` apart.
// Elements whose type is an argument are given as `void`, stored as that type is, at any alignment.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "kernels/math.h"

namespace kvcast::kernels {

// Decoding table of 16 symbols by the alias method (Walker 1977; with rANS: Giesen, arXiv 1402.3392,
// section 3.2). Slot x of 2^14 is in bucket x / 1024; entry[2 b] serves the bucket's first divider[b] slots,
// entry[2 b + 1] the rest.
struct alignas(64) AliasTable {
    std::uint32_t divider[kSymbols];
    std::uint32_t entry[2 * kSymbols];  // pack_entry()
};

// Stands for an escape where symbols are looked up as values, or as what those become.
inline constexpr std::int16_t kEscapeMark = 0x7fff;

// The same table for states that are kept as two vectors of 16-bit halves, high and low.
struct alignas(64) HalfTable {
    std::uint16_t
        carry[2 * kSymbols];  // [low / 1024 mod 32]: added to low, leaves the entry at bits 10 to 14
    std::uint16_t frequency[2 * kSymbols];  // of an entry, times four
    std::uint16_t rank[2 * kSymbols];       // rank - slot, modulo 2^16
    std::int16_t value[2 * kSymbols];       // symbol - kSymbolZero; kEscapeMark
    std::uint16_t symbol[2 * kSymbols];     // times two
};

// The same in bytes, where look-ups are of bytes: low and high bytes apart.
struct alignas(16) ByteTable {
    std::uint8_t last[2][kSymbols];  // [bucket]: divider - 1, modulo 2^16
    std::uint8_t second[kSymbols];   // [bucket]: symbol of its second entry; the first one's is the bucket
    std::uint8_t frequency[2][kSymbols];  // [symbol]: times four
    std::uint8_t rank[2][2][kSymbols];    // [entry of the bucket][byte][bucket]: rank - slot, modulo 2^16
};

struct DecodeTable {
    AliasTable alias;
    HalfTable halves;
    ByteTable bytes;
};

// What puts symbols into states that are kept as halves. A state x is divided by four frequencies: a number
// of 16 bits (Moeller and Granlund, "Improved division by invariant integers", 2011, algorithm 4, needs its
// divisor shifted up to 2^15 or more). The ranks of a symbol lie in cells of 1024, which no other symbol
// shares: rank r has index first[s] + r and is in cell index / 1024, where slot = index + offset[n], n being
// the number of bounds of the cell that are not above the index.
struct alignas(64) EncodeHalves {
    static constexpr std::size_t kCells = 2 * kSymbols;
    static constexpr unsigned kCellBits = 10;
    static constexpr std::size_t kBounds = 2;

    // [symbol]; what is behind the last one is read with them and not used.
    std::uint16_t frequency[2 * kSymbols];   // times four
    std::uint16_t shift[2 * kSymbols];       // what makes that 2^15 or more
    std::uint16_t reciprocal[2 * kSymbols];  // floor((2^32 - 1) / (frequency << shift)) - 2^16
    std::uint16_t first[2 * kSymbols];
    std::uint16_t bound[kBounds][kCells];       // ascending; 0xffff where there are fewer
    std::uint16_t offset[kBounds + 1][kCells];  // modulo 2^16
};

// The same in bytes, low and high ones apart. Shifts are multiplications.
struct alignas(32) EncodeBytes {
    static constexpr std::size_t kCells = EncodeHalves::kCells;
    static constexpr std::size_t kBounds = EncodeHalves::kBounds;

    std::uint8_t frequency[2][kSymbols];   // times four
    std::uint8_t scale[2][kSymbols];       // 2^shift
    std::uint8_t reciprocal[2][kSymbols];  // as above
    std::uint8_t first[2][kSymbols];
    std::uint8_t bound[kBounds][2][kCells];
    std::uint8_t offset[kBounds + 1][2][kCells];  // [n]: less what [n - 1] has, modulo 2^16
};

// Encoding table: the slot of rank r of symbol s is slot[start[s] + r].
struct alignas(64) EncodeTable {
    std::uint32_t frequency[kSymbols];
    std::uint32_t reciprocal[kSymbols];  // floor(2^32 / frequency), at most 2^32 - 1
    std::uint16_t start[kSymbols];
    std::uint16_t slot[kProbabilityTotal];
    EncodeHalves halves;
    EncodeBytes bytes;
};

// 32 lanes reading one forward stream of little-endian 16-bit words, at any byte alignment. Past the end,
// words read as zero and `overrun` is set; it is never cleared by a slot.
struct alignas(64) RansDecoder {
    std::uint32_t state[kLanes];
    const std::uint8_t* next;
    const std::uint8_t* end;
    std::uint32_t overrun;
};

inline constexpr unsigned kMostShift = 11;

// What the values v of a strip become: states s = saturate16(mean + v * 2^shift), shift <= 14, or the
// elements of 16 bits that those are by `scale`.
struct Meaning {
    unsigned shift;
    std::optional<Dtype> dtype;  // of elements: kBf16 or kF16
    Scale scale;
};

// `count` values of one table and shift, in groups of 32: value = (symbol - 7) * 2^shift + raw - 2^(shift -
// 1), in wrapping 16-bit arithmetic; shift <= kMostShift. Without a table all values are zero and nothing is
// coded.
struct Strip {
    const DecodeTable* table;
    unsigned shift;
    std::size_t count;
    std::int16_t* values;              // or what they become
    const Meaning* meaning = nullptr;  // values, where there is none
    std::int16_t mean = 0;
};

// Floating-point elements of one exponent table: exponent = center - (symbol - 7), modulo the exponent's
// range, sign and mantissa raw.
struct FloatStrip {
    const DecodeTable* table;
    std::uint32_t center;
    void* elements;
};

// What encodes a Strip. |value| must not exceed 32767 - 2^shift.
struct EncodeStrip {
    const EncodeTable* table;
    unsigned shift;
    std::size_t count;
    const std::int16_t* values;
};

struct EncodeFloatStrip {
    const EncodeTable* table;
    std::uint32_t center;
    const void* elements;
};

// 32 lanes writing words downward from `next`. The caller guarantees room: at most 4 bytes per value
// plus 2 bytes per started 16 values and raw bit, and 64 bytes more, which may be overwritten.
struct alignas(64) RansEncoder {
    std::uint32_t state[kLanes];
    std::uint8_t* next;
};

// Which channels of a head RoPE turns, and by what: pair p is channels first + p * pair_step and that plus
// partner. cos and sin are tables [pairs][table_stride] of one column per token. pairs = 0: nothing is
// turned.
struct Rotation {
    std::size_t pairs;
    std::size_t first;
    std::size_t pair_step;
    std::size_t partner;
    const std::int16_t* cos;
    const std::int16_t* sin;
    std::size_t table_stride;
};

// One head of one plane on its way from rows to a tile of floats.
struct HeadLoad {
    const void* rows;  // element [token 0][channel 0] of this head
    std::size_t row_bytes;
    Dtype dtype;
    std::size_t tokens;
    std::size_t channels;
    Rotation rotation;  // turned backwards
    float* tile;
    std::size_t tile_stride;
};

// The same without a tile; `rotation` is as StateStore's, turned backwards.
struct RowLoad {
    const void* rows;
    std::size_t row_bytes;
    Dtype dtype;
    std::size_t tokens;
    std::size_t channels;
    Rotation rotation;
    float* values;  // [token][value_stride], channel 0 of this head
    std::size_t value_stride;
};

// Rows that lie one behind the other in a buffer, on their way to where they belong, past the caches: lines
// then need not be read before they are written. They leave line by line while something else is decoded, as
// only so many lines can be on their way. Rows begin where a line does, here and there.
struct Outgoing {
    static constexpr std::size_t kLine = 64;  // bytes

    const std::uint8_t* from = nullptr;  // what leaves next
    std::uint8_t* to = nullptr;
    std::size_t row_bytes = 0;    // whole lines
    std::size_t between = 0;      // from the end of a row to the next one, there
    std::size_t left_in_row = 0;  // bytes
    std::size_t left = 0;         // bytes of all rows

    void leave(std::size_t bytes) {
        from += bytes;
        to += bytes;
        left -= bytes;
        left_in_row -= bytes;
        if (left_in_row != 0) return;
        left_in_row = row_bytes;
        to += between;
    }
};

// One head of one plane on its way from int16 states to rows.
struct HeadStore {
    const std::int16_t* tile;
    std::size_t tile_stride;
    std::size_t tokens;
    std::size_t channels;
    Rotation rotation;  // turned forwards
    Scale scale;
    Dtype dtype;
    void* rows;
    std::size_t row_bytes;
};

// The same from states that lie as rows do. The tables of `rotation` are [token][table_stride] here, one
// column per pair; pairs are of neighbours (pair_step 2, partner 1), or pair_step is 1.
struct StateStore {
    const std::int16_t* states;  // [token][state_stride], channel 0 of this head
    std::size_t state_stride;
    std::size_t tokens;
    std::size_t channels;
    Rotation rotation;  // turned forwards
    Scale scale;
    Dtype dtype;
    void* rows;
    std::size_t row_bytes;
};

// The same from elements of type `source`. With pairs = 0 and dtype == source they pass through unchanged.
struct ExactStore {
    const void* tile;
    std::size_t tile_stride;
    std::size_t tokens;
    std::size_t channels;
    Rotation rotation;
    Dtype source;
    Dtype dtype;
    void* rows;
    std::size_t row_bytes;
};

// 16 outputs of a matrix by one pair of inputs: lane o holds the entries of inputs 2i and 2i + 1.
struct alignas(64) MatrixPair {
    std::int16_t lanes[16][2];
};

// 16 outputs by four inputs, where entries fit 8 bits: entry + 128.
struct alignas(64) MatrixQuad {
    std::uint8_t lanes[16][4];
};

// 16 outputs by 64 inputs, 8 bits each, as tile registers want it: row r has the inputs at places 4r to
// 4r + 3 of every output. Input i of a block is at place 2i, input 32 + i at place 2i + 1.
struct alignas(64) MatrixTile {
    std::uint8_t bytes[16 * 64];
};

// A matrix [outputs][inputs] in the forms that this machine's backends read, zero where it has no entries.
struct PackedMatrix {
    bool wide = false;              // some entries do not fit 8 bits
    std::vector<MatrixPair> pairs;  // [outputs by 16][inputs by 2]
    std::vector<MatrixQuad> quads;  // [outputs by 16][inputs by 4]; none where entries are wide
    // [outputs by 16][inputs by 64][limb]. Where entries are wide, entry = 256 * limb 0, signed, + limb 1,
    // unsigned; else there is one limb, signed.
    std::vector<MatrixTile> tiles;
};

PackedMatrix pack_matrix(std::span<const std::int16_t> matrix, std::size_t outputs, std::size_t inputs);

// int16 features of some tokens through a matrix with a shift per output:
// sums[t][o] += (sum over i of matrix[o][i] * multiplier * features[t][i] + 2^(shifts[o] - 1)) >> shifts[o].
// The caller keeps the L1 norm of a row at most 65024, multiples of features within 16 bits, and shifts in
// 4..23, so that no sum overflows.
struct Projection {
    const std::int16_t* features;  // [token][feature_stride]
    std::size_t feature_stride;
    std::size_t inputs;
    const std::int16_t* matrix;  // [outputs][inputs]
    const PackedMatrix* packed;  // the same matrix for backends that prefer it so; may have more outputs
    const std::uint8_t* shifts;  // [outputs]
    std::size_t outputs;
    std::size_t tokens;
    std::int32_t* sums;  // [token][sum_stride]
    std::size_t sum_stride;
    std::int32_t multiplier = 1;  // 1..4096
};

// Costs that are added up side by side, the largest magnitude that they are known for, and how far those of
// one value are from those of the next.
inline constexpr std::size_t kValueCosts = 16;
inline constexpr int kValueCostMost = 127;
inline constexpr std::ptrdiff_t kValueCostStride = 64;

// costs[s / 2][table][s % 2] of the 16 exponent tables: what symbol s costs more than an escape does; in the
// place of kEscape, what an escape costs. All are below 2^12 in magnitude, and no symbol costs less than
// nothing.
using ExponentCosts = std::int16_t[kSymbols / 2][kSymbols][2];

// Rows of `count` floating-point elements each, stored as their type is.
struct ElementRows {
    const void* elements;
    std::size_t stride_bytes;  // from one row to the next
    std::size_t rows;
    std::size_t count;
    Dtype dtype;

    const std::uint8_t* row(std::size_t i) const {
        return static_cast<const std::uint8_t*>(elements) + i * stride_bytes;
    }
};

// Values on their way to symbols: q = nearest integer (ties to even) to (value * inverse_unit - prediction) /
// 2^shift, clamped to +-limit. |value * inverse_unit| is below 2^22.
struct Quantisation {
    const float* values;
    std::size_t count;
    const std::int16_t* prediction;  // [count], or null where it is `mean` for all
    std::int16_t mean;
    float inverse_unit;
    unsigned shift;
    std::int32_t limit;
    std::int16_t* q;
};

struct Moments {
    std::int64_t sum;
    std::uint64_t sum_of_squares;
};

struct Ops {
    const char* name;

    // Strips of several decoders, which may be decoded side by side: strip i belongs to decoder i modulo
    // their number, and each decoder takes its own in order. Decoders that have blocks of like shape gain
    // most, four of them at once. Beside it, about a line of what is outgoing leaves with every 32 values.
    void (*decode_strips)(std::span<RansDecoder* const> decoders, std::span<const Strip> strips,
                          std::span<Outgoing> outgoing);

    // The inverse: each encoder gets its strips in the reverse of the decoder's order. Four encoders at once
    // are twice as fast as one.
    void (*encode_strips)(std::span<RansEncoder* const> encoders, std::span<const EncodeStrip> strips);

    // The same of strips of `count` elements each, all of type `dtype`, as many of each coder.
    void (*decode_floats)(std::span<RansDecoder* const> decoders, std::span<const FloatStrip> strips,
                          Dtype dtype, std::size_t count, std::span<Outgoing> outgoing);
    void (*encode_floats)(std::span<RansEncoder* const> encoders, std::span<const EncodeFloatStrip> strips,
                          Dtype dtype, std::size_t count);

    // Which exponent table is the cheapest for each row, and around which center: the most frequent exponent
    // (the lowest of several), the one below it or the one above it, as far as the type has them. 16 times
    // the center plus the table; the lowest of several that cost the same.
    void (*choose_exponents)(const ElementRows& rows, const ExponentCosts& costs, std::uint32_t* chosen);

    // sums[i] += costs[v * kValueCostStride + place + i] for each of `count` values v and its place:
    // kValueCosts sums, which fit 32 bits. Those of 0 are all 0. Values of a magnitude greater than
    // kValueCostMost are left out: whether there are none.
    bool (*value_costs)(const std::int16_t* values, const std::uint16_t* places, std::size_t count,
                        const std::int32_t* costs, std::int32_t* sums);

    // Rows to a tile of floats, un-rotated. One multiply-add per output in binary32, products first, not
    // fused. Returns the largest magnitude: +infinity where any value is infinite or NaN.
    float (*load_head)(const HeadLoad& head);

    // From rows to rows, without the magnitude.
    void (*load_rows)(const RowLoad& rows);

    // Rows to a tile of elements of the same type.
    void (*load_elements)(const void* rows, std::size_t row_bytes, Dtype dtype, std::size_t tokens,
                          std::size_t channels, void* tile, std::size_t tile_stride);

    // Cosines and sines of the phases first, first + step, ... modulo 2^64, as sin_cos() gives them.
    void (*turns)(std::uint64_t first, std::uint64_t step, std::size_t count, std::int16_t* cos,
                  std::int16_t* sin);

    // Sum and sum of squares of round-to-nearest-even(values * scale), which the caller keeps below 2^22.
    Moments (*moments)(const float* values, std::size_t count, float scale);

    // The sum alone.
    std::int64_t (*rounded_sum)(const float* values, std::size_t count, float scale);

    // See Quantisation. Returns the sum of |q|.
    std::uint64_t (*quantise)(const Quantisation& x);

    // states = saturate16(prediction + q * 2^shift); shift <= 14. `states` may be `q`.
    void (*reconstruct)(const std::int16_t* q, const std::int16_t* prediction, std::size_t count,
                        unsigned shift, std::int16_t* states);

    // residual = values * scale - sums where |values * scale| is at most `most`, else 0. Whether it always
    // is; NaN is not.
    bool (*residual)(const float* values, const std::int32_t* sums, std::size_t count, float scale,
                     float most, float* residual);

    // integers = nearest ones (ties to even) to values * 2^s, with s, which it returns, shared_exponent() of
    // the largest magnitude. Values are finite.
    int (*share_exponent)(const float* values, std::size_t count, std::int16_t* integers);

    // With x = values * unit, in binary32: q = nearest integer (ties to even) to x * (1 / step) where x is at
    // most `most` in magnitude, else 0. Whether it always is. `most` is at most 32767.
    bool (*round_steps)(const std::int32_t* values, std::size_t count, float unit, float step, float most,
                        std::int16_t* q);

    // Strips of one coefficient each to rows of tokens: rows[t][c] = tile[c * kLanes + t] for c below
    // `coefficients` and t below `tokens`, which is at most kLanes.
    void (*strips_to_rows)(const std::int16_t* tile, std::size_t coefficients, std::int16_t* const* rows,
                           std::size_t tokens);

    // The inverse; what the tile holds for other tokens stays as it was.
    void (*rows_to_strips)(const std::int16_t* const* rows, std::size_t tokens, std::size_t coefficients,
                           std::int16_t* tile);

    // states = saturate16(sums)
    void (*saturate)(const std::int32_t* sums, std::size_t count, std::int16_t* states);

    // features = state_feature(states, bias, factors)
    void (*state_features)(const std::int16_t* states, const std::int16_t* bias, const std::int16_t* factors,
                           std::size_t count, std::int16_t* features);

    // See Projection. Features that are zero for all neighbouring tokens behind others cost nothing.
    void (*project)(const Projection& p);

    void (*store_head)(const HeadStore& head);
    void (*store_states)(const StateStore& states);
    void (*store_exact)(const ExactStore& head);

    // All that is left, which may be nothing. Before other threads read what has left in this one, here or
    // beside decoding, this is to be called last.
    void (*send)(Outgoing& rows);

    // Whether rows go past the caches; where not, a caller had better store them where they belong.
    bool sends_past_caches;
};

// The complete, portable backend.
const Ops& scalar_ops();

// Every backend that this machine can run, the scalar one first and the fastest last. All write the same
// bytes and values; they differ in speed only.
std::span<const Ops* const> available_ops();

// The fastest of them, or the one that the environment variable KVCAST_KERNELS names (read once; a name that
// is not available is ignored).
const Ops& best_ops();

}  // namespace kvcast::kernels
