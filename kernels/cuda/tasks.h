// What the CUDA kernels are told: plain structs that the host lays out in one image and the device reads.
//
// `image` and `workspace` stand for two device buffers that start at multiples of 256 bytes; offsets into
// them are in bytes and multiples of 16. Everything here was checked by the host: kernels trust it, and trust
// nothing that they read from a coded block.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/math.h"

namespace kvcast::kernels::cuda {

inline constexpr std::uint32_t kNone = 0xffffffffu;
inline constexpr std::uint64_t kNowhere = ~std::uint64_t{0};  // in the workspace
inline constexpr std::uint32_t kTables = 25;                  // of the format

// What is wrong with a block, as bits of its status word. FORMAT.md, sections 5.4, 5.6 and 7.
enum BlockFault : std::uint32_t {
    kEndsEarly = 1,   // its data ends before its values do
    kLeftOver = 2,    // bytes are left over
    kNotClosed = 4,   // the coder does not end in its first state
    kOutOfRange = 8,  // its side information is out of range
};

// An alias table as a step of a warp looks it up, in shared memory at a multiple of its size: one place for
// both loads, and lanes that ask for different buckets ask different banks.
struct alignas(256) BucketTable {
    struct Entries {
        std::uint32_t first;
        std::uint32_t second;
    };
    struct Last {
        std::uint32_t slot;  // of the first entry, in the upper ten bits; all bits below are set
        std::uint32_t unused;
    };
    Entries entries[kSymbols];
    Last last[kSymbols];
};

// Channels of the workspace are padded to multiples of so many tokens. Of each such octet of groups, the
// eight tokens that a lane of the decoding warp has are neighbours.
inline constexpr std::uint32_t kBodyUnit = 8 * kLanes;
KVCAST_HD constexpr std::uint32_t body_index(std::uint32_t token) {
    return token / kBodyUnit * kBodyUnit + token % kLanes * 8 + token / kLanes % 8;
}

// A table of cosines and sines, that of pair p and column t at p * pair_stride + t * column_stride: column t
// is for position first + t.
struct RotationTask {
    std::uint64_t table;        // workspace: SinCos; kBodyUnit of them may be read behind the last
    std::uint64_t frequencies;  // image: std::uint64_t[pairs]
    std::uint64_t first;
    std::uint32_t pairs;
    std::uint32_t columns;  // 1: the same angle for all tokens
    std::uint32_t pair_stride;
    std::uint32_t column_stride;
    // Which channels of a head are turned: pair p is channels first_channel + p * pair_step and that plus
    // partner.
    std::uint32_t first_channel;
    std::uint32_t pair_step;
    std::uint32_t partner;
};

// Where a plane's rows lie: token t of the chunk is at
//     rows + pages[s / page_tokens] * page_bytes + s % page_tokens * row_bytes,  s = slot + t,
// and its head h head_bytes * h further. Without pages, at rows + t * row_bytes.
struct RowsAt {
    std::uint8_t* rows;         // device; aligned to the output type, as all strides are
    const std::int32_t* pages;  // device
    std::uint64_t row_bytes;
    std::uint64_t head_bytes;
    std::uint64_t page_bytes;
    std::uint32_t page_tokens;
    std::uint32_t slot;
};

// One plane of one layer of a chunk of the profiles delta and lossless, as its blocks code it.
struct PlaneTask {
    std::uint64_t body;  // workspace: [head][channel][body_index(token)] states, or stored bits where exact
    std::uint64_t rows;  // workspace: [head][exact row][channel] stored bits
    std::uint32_t heads;
    std::uint32_t channels;     // per head
    std::uint32_t body_tokens;  // after the exact rows
    std::uint32_t body_stride;  // from channel to channel
    std::uint32_t exact_rows;
    std::uint32_t anchor_group;  // 0: predicted from the mean
    std::uint8_t anchor_shift;
    std::uint8_t guard_bits;
    bool quantised;
    Dtype source;  // of exact elements; they take 4 bytes in the workspace for binary32, else 2
    // Of planes of direct blocks, whose rows are stored as they are decoded: bf16 to bf16 rows at multiples
    // of 16 bytes, one octet of groups at most, all channels turned in halves, each token by angles of its
    // own, or none, and a scale of at most 2^kMostFusedExponent.
    bool exact_direct;       // its exact rows, too, if they are as they are stored
    std::uint32_t rotation;  // index, or kNone
    Scale scale;             // of states
    RowsAt out;
};

// Channels whose rows are stored together, and the greatest exponent of a direct plane's scale.
inline constexpr std::uint32_t kDirectChannels = 16;
inline constexpr std::int32_t kMostFusedExponent = 90;

// One block: heads first_head up to end_head of the planes from `plane` on, counted through the planes.
struct BlockTask {
    const std::uint8_t* begin;  // device; even: 32 coder states, then words
    std::uint32_t bytes;        // even, at least 128
    std::uint32_t plane;        // index of the layer's first PlaneTask
    std::uint32_t first_head;
    std::uint32_t end_head;
    std::uint32_t status;  // index of its status word
    bool direct;           // all of its planes are
};

// How a matrix is stored.
enum class StoreWay : std::uint8_t {
    kAny,         // element by element
    kOctets,      // 16-bit elements in the order of body_index() to 16-bit rows, by neighbours of both
    kAlongSlots,  // the same for token-major ones
};

// A matrix of states or of stored bits on its way to a plane's rows. Strides are in elements.
struct StoreTask {
    std::uint64_t source;  // workspace
    std::uint64_t head_stride;
    std::uint32_t channel_stride;
    std::uint32_t token_stride;  // of body_index(token) where octets is set
    std::uint32_t heads;
    std::uint32_t channels;  // per head
    std::uint32_t tokens;
    std::uint32_t first_token;  // the matrix's token 0 is this token of the chunk,
    std::uint64_t token_list;   // or image: std::uint32_t[tokens] of them, where list is set
    std::uint32_t rotation;     // index, or kNone
    std::uint32_t pairs;        // of a head that are turned; 0 without a rotation
    Scale scale;                // of states
    bool list;
    bool octets;  // tokens in the order of body_index()
    bool exact;   // stored bits of type `from`, not states
    StoreWay way;
    Dtype from;
    Dtype to;
    RowsAt out;
};

// A tile of a StoreTask: kTileTokens or kBodyUnit tokens, up to kTileHeads heads, and of each head kTilePairs
// pairs of channels that are turned or kTileSingles channels that are not.
inline constexpr std::uint32_t kTileTokens = 128;
inline constexpr std::uint32_t kTileHeads = 4;
inline constexpr std::uint32_t kTilePairs = 32;
inline constexpr std::uint32_t kTileSingles = 64;

// What a block of threads stores.
struct StoreTile {
    std::uint32_t task;
    std::uint32_t tile;  // of the task
};

// An encoder loads tiles of so many tokens and slots: pairs that are turned, or channels that are not.
inline constexpr std::uint32_t kStoreTokens = 32;
inline constexpr std::uint32_t kStoreSlots = 32;

KVCAST_HD constexpr std::uint32_t div_up(std::uint32_t n, std::uint32_t unit) {
    return (n + unit - 1) / unit;
}
KVCAST_HD constexpr std::uint32_t lesser(std::uint32_t a, std::uint32_t b) {
    return a < b ? a : b;
}

// ---- klt (FORMAT.md, section 11)

// One plane of one layer of a klt chunk. Body tokens are the chunk's tokens without the exact ones, in order.
struct KltPlaneTask {
    std::uint64_t
        coefficients;    // workspace: std::int16_t [body token][width], multiplied by their multiplier
    std::uint64_t rows;  // workspace: [head][exact token][channel] stored bits
    const std::int8_t* classes;  // device: [part][level][coefficient]
    std::uint64_t masks;  // workspace: std::uint32_t [part][body token]: where any of coefficients 32 g to
                          // 32 g + 31 may not be zero, g below 32
    std::uint32_t heads;
    std::uint32_t channels;  // per head
    std::uint32_t parts;
    std::uint32_t part_width;
};

// One layer's block.
struct KltPieceTask {
    const std::uint8_t* begin;  // device; even. The first piece of a run begins with 32 coder states.
    std::uint32_t bytes;        // even; of a first piece at least 128
    std::uint32_t plane;        // index of the layer's first KltPlaneTask
};

// Layers that share coder states: two warps' work.
struct KltRunTask {
    std::uint64_t gains;               // workspace: std::int16_t [unit of a layer][body token], scratch
    std::uint64_t order;               // workspace: std::uint32_t [body token], scratch
    std::uint64_t levels;              // image: std::uint8_t [body token], counted from 0
    const std::uint16_t* multipliers;  // device: [level]
    std::uint32_t level_count;
    std::uint32_t first_piece;
    std::uint32_t pieces;
    std::uint32_t planes;  // of a layer
    std::uint32_t body_tokens;
    std::uint32_t main_tokens;  // body tokens before the tail
    std::uint32_t exact_tokens;
    std::uint32_t first_status;  // index of the first piece's status word
    Dtype source;
};

// One matrix of a unit: the sums over inputs, shifted, are added to the unit's states.
struct ProjectionTerm {
    std::uint64_t features;      // workspace, or image where in_image is set: [token][stride] of std::int16_t
                                 // or, where narrow is set, std::int8_t
    const std::uint8_t* matrix;  // device, at a multiple of 16: LimbMatrix (kernels/cuda/limbs.h)
    const std::uint8_t* shifts;  // device: [width], and more as the matrix has tiles
    std::uint32_t limbs;
    std::uint32_t slots;  // of a warp's outputs, of all of the matrix
    std::uint32_t stride;
    std::uint32_t inputs;    // at most 4096, and no more than the matrix has
    std::uint32_t resident;  // chains: where the features go in shared memory, see ChainTask
    bool in_image;
    bool narrow;  // features have 8 bits, and count kFeatureWeight times
};

inline constexpr std::uint32_t kMostTerms = 7;  // six predictions and the transform

// What there is for a channel of a unit, its states' bias and the factor of their features, in one word.
KVCAST_HD constexpr std::uint32_t channel_word(std::int16_t bias, std::int16_t feature_factor) {
    return static_cast<std::uint16_t>(bias) | std::uint32_t{static_cast<std::uint16_t>(feature_factor)} << 16;
}
KVCAST_HD constexpr std::int16_t bias_of(std::uint32_t word) {
    return static_cast<std::int16_t>(word & 0xffff);
}
KVCAST_HD constexpr std::int16_t feature_factor_of(std::uint32_t word) {
    return static_cast<std::int16_t>(word >> 16);
}

// One part of one plane of one layer of a chunk: states = sat16(bias + sum over the terms), and what other
// units are predicted from.
struct alignas(16) UnitTask {
    ProjectionTerm terms[kMostTerms];
    const std::uint32_t* channels;  // device, at a multiple of 16: [width] of channel_word, and more as the
                                    // matrices have tiles
    std::uint64_t states;    // workspace: std::int16_t [token][stride]; kNowhere where nobody asks for them
    std::uint64_t features;  // workspace: std::int8_t [token][stride]; chains have their own
    std::uint64_t sums;      // workspace: std::int32_t [token][stride], where an encoder asks for them
    std::uint64_t masks;     // workspace: std::uint32_t [token], where has_masks is set: which groups of 32
                             // inputs the last term's features are not zero in
    std::uint32_t stride;
    std::uint32_t width;    // of the matrices' outputs
    std::uint32_t outputs;  // the first ones, which are made: not all for an encoder's coefficients
    std::uint32_t tokens;
    std::uint32_t term_count;
    std::uint32_t first_tile;  // tiles of the launch's units before this one
    std::uint32_t resident;    // chains: where the features go in shared memory; kNone: nowhere
    bool has_masks;
};

// Products take tokens by tiles of so many, outputs by tiles of kOutputTile, inputs by steps of kUnitStep. A
// warp makes kWarpOutputs of the outputs, a block of threads kProjectOutputs.
inline constexpr std::uint32_t kTokenTile = 16;
inline constexpr std::uint32_t kOutputTile = 8;
inline constexpr std::uint32_t kUnitStep = 32;
inline constexpr std::uint32_t kWarpOutputs = 24;
inline constexpr std::uint32_t kProjectOutputs = 192;
inline constexpr std::uint32_t kProjectTokens = 48;  // of a wave's tile

// Fragments of a matrix: 8 outputs x 32 inputs, 8 bytes a lane. A warp takes two of each of its output tiles
// at a time, a slot: the two limbs of a step, or two steps of a matrix of one limb.
inline constexpr std::uint32_t kFragmentBytes = kOutputTile * kUnitStep;
inline constexpr std::uint32_t kSlotBytes = kWarpOutputs / kOutputTile * 2 * kFragmentBytes;
KVCAST_HD constexpr std::uint32_t slot_steps(std::uint32_t limbs) {
    return limbs == 2 ? 1 : 2;
}
KVCAST_HD constexpr std::uint32_t slots_of_steps(std::uint32_t steps, std::uint32_t limbs) {
    return div_up(steps, slot_steps(limbs));
}
KVCAST_HD constexpr std::uint32_t limb_tiles(std::uint32_t outputs) {
    return div_up(outputs, kWarpOutputs) * (kWarpOutputs / kOutputTile);
}

KVCAST_HD constexpr std::uint64_t tiles_of(const UnitTask& u) {
    return std::uint64_t{div_up(u.outputs, kProjectOutputs)} * div_up(u.tokens, kProjectTokens);
}

// Bytes from row to row of features in shared memory, an odd number of steps: what lies side by side there is
// in different banks.
KVCAST_HD constexpr std::uint32_t narrow_pitch(std::uint32_t inputs) {
    return (div_up(inputs, kUnitStep) | 1) * kUnitStep;
}
KVCAST_HD constexpr std::uint32_t wide_pitch(std::uint32_t inputs) {
    return narrow_pitch(inputs) * 2;
}
// Bytes of a token tile's features as fragments, or 16-bit integers in two limbs.
KVCAST_HD constexpr std::uint32_t split_bytes(std::uint32_t inputs) {
    return kTokenTile * div_up(inputs, kUnitStep) * kUnitStep * 2;
}
KVCAST_HD constexpr std::uint32_t narrow_bytes(std::uint32_t inputs) {
    return split_bytes(inputs) / 2;
}

// All units of a chunk, in order, for some of its tokens: no token's states depend on another token. One
// block of threads takes a chain from its first unit to its last, features staying in shared memory as long
// as units are predicted from them. A block has `height` tiles of tokens, up to kMostHeight: a launch
// chooses, so that a chunk alone gets many blocks, and a large batch's blocks load few matrices. Places in
// shared memory are in bytes for a block of one tile: others multiply them by their height. Widths of units
// are whole tiles of outputs. While a unit's features are made, its predictions may still be read, and the
// next unit's coefficients: no two of these are in one place, nor are two units' coefficients that follow
// each other.
inline constexpr std::uint32_t kMostHeight = 4;

struct ChainTask {
    std::uint32_t first_unit;  // of the plan's chained units
    std::uint32_t units;
    std::uint32_t tokens;
    std::uint32_t features;    // of tokens; 0: nothing is predicted from them
    std::uint64_t token_rows;  // image: std::int8_t [token][features]
    std::uint32_t resident;    // where they go in shared memory
};

// Shared memory of a chain's block: the tasks and channels' words that it keeps at hand; for each warp's
// matrices a ring of so many chunks, of some slots each; and the places above. Compute capability 9.0
// and 10.0 give a block of threads 227 KiB.
inline constexpr std::uint32_t kChainTaskBytes = 5 << 10;
inline constexpr std::uint32_t kChunkSlots = 3;
inline constexpr std::uint32_t kRingChunks[] = {4, 3, 2};  // the first that there is room for
KVCAST_HD constexpr std::uint32_t ring_bytes(std::uint32_t chunks) {
    return kProjectOutputs / kWarpOutputs * chunks * kChunkSlots * kSlotBytes;
}
inline constexpr std::uint32_t kMostChainBytes = (227 << 10) - kChainTaskBytes - ring_bytes(2);

struct ChainTile {
    std::uint32_t chain;
    std::uint32_t first_token;
};

// Slots of a head whose `pairs` pairs of channels are turned.
KVCAST_HD constexpr std::uint32_t slots_of(std::uint32_t channels, std::uint32_t pairs) {
    return channels - pairs;
}

// Channels of a head that are not turned.
KVCAST_HD constexpr std::uint32_t singles_of(const StoreTask& t) {
    return t.channels - 2 * t.pairs;
}
KVCAST_HD constexpr std::uint32_t tiles_across(const StoreTask& t) {
    return div_up(t.pairs, kTilePairs) + div_up(singles_of(t), kTileSingles);
}
KVCAST_HD constexpr std::uint32_t tile_tokens(const StoreTask& t) {
    return t.way == StoreWay::kOctets ? kBodyUnit : kTileTokens;
}
KVCAST_HD constexpr std::uint64_t tiles_of(const StoreTask& t) {
    return std::uint64_t{tiles_across(t)} * div_up(t.heads, kTileHeads) * div_up(t.tokens, tile_tokens(t));
}

KVCAST_HD constexpr std::uint32_t element_bytes(bool exact, Dtype source) {
    return exact && source == Dtype::kF32 ? 4 : 2;
}

}  // namespace kvcast::kernels::cuda
