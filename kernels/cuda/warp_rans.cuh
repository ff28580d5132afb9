// A warp reads one block: lane i holds state i, a group of 32 symbols is one step of the warp. FORMAT.md,
// section 5; what a CPU does is kernels/scalar/rans.cpp and codec/entropy/block_reader.cpp.
//
// A step waits for the step before, and a batch has few warps: what is fast here is a short chain from one
// state to the next, and few instructions: a warp that is alone issues one every four or five cycles, whether
// or not they are of the chain. Tables lie in shared memory and are asked by two loads at one place that do
// not wait for each other; what the symbols of the step before mean is found out meanwhile. Raw bits wait
// until four steps have been taken, and the lanes turn their planes, eight of each step, into bytes in five
// exchanges. Words come through a ring in shared memory, which is filled a piece ahead by loads that have
// long been sent.
//
// No address depends on decoded data but by a bounded count of words, and every index is compared with the
// end, so that no bytes make the warp read outside the block.
//
// All functions are called by all 32 lanes together, and say so to the compiler where lanes have gone
// different ways: else it expects them to be apart wherever they meet, in every step. Counts, classes and
// offsets are the same in all lanes.
#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/platform.cuh"
#include "kernels/cuda/shared_memory.cuh"
#include "kernels/cuda/tasks.h"

namespace kvcast::kernels::cuda {

// How many lanes before this one have their bit set.
__device__ __forceinline__ unsigned rank_in(unsigned lanes) {
    return static_cast<unsigned>(__popc(lanes & ((1u << lane_id()) - 1)));
}

// The sum over all lanes, in all lanes.
template <typename T>
__device__ __forceinline__ T sum_of_lanes(T v) {
    for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(kFullWarp, v, step);
    return v;
}

// The format's tables in shared memory, at a multiple of 256 bytes.
struct ReaderTables {
    BucketTable tables[kTables];

    // By all threads of a block. Where they are.
    __device__ std::uint32_t load(const BucketTable* from) {
        const auto* in = reinterpret_cast<const std::byte*>(from);
        auto* out = reinterpret_cast<std::byte*>(tables);
        KVCAST_UNROLL(4)
        for (std::uint32_t i = 16 * threadIdx.x; i < sizeof(tables); i += 16 * blockDim.x)
            copy_16(out + i, in + i);
        commit_copies();
        wait_copies<0>();
        __syncthreads();
        return opaque(shared_offset(tables));
    }
};

// Words of a block, in order. Words beyond the end are zero; past() finds out.
class WordRing {
  public:
    static constexpr std::uint32_t kPiece = 8 * kLanes;  // words: sixteen bytes a lane
    static constexpr std::uint32_t kRing = 3 * kPiece;
    static constexpr std::uint32_t kReady = 2 * kPiece;  // what prepare() has ready

    // A warp's ring, in shared memory. Readers do not wrap: the first words are again behind the last.
    struct alignas(16) Memory {
        std::uint16_t words[kRing + kReady];
    };

    __device__ __forceinline__ explicit WordRing(Memory& ring)
        : ring_(ring.words), begin_(shared_offset(ring.words)) {}

    // Goes on with `count` words at `begin`. Positions count from the 16 bytes that hold the first one, so
    // that loads are aligned.
    __device__ __forceinline__ void start(const std::uint16_t* begin, std::uint32_t count) {
        first_ = static_cast<std::uint32_t>(reinterpret_cast<std::uintptr_t>(begin) / kBytes % 8);
        base_ = begin - first_;
        end_ = first_ + count;
        at_ = begin_ + first_ * kBytes;
        lap_ = 0;
        filled_ = 0;
        pending_ = load();
        advance();
        fill();
    }

    // Has kReady words ready from here on.
    __device__ __forceinline__ void prepare() {
        if (at_ >= due_) fill();
    }

    // Where the next word is.
    __device__ __forceinline__ std::uint32_t place() const { return at_; }
    // The word `ahead` of the next one, of those that are ready.
    __device__ __forceinline__ std::uint32_t peek(std::uint32_t ahead) const {
        return half_at(at_ + ahead * kBytes);
    }
    __device__ __forceinline__ void skip(std::uint32_t count) { at_ += count * kBytes; }

    __device__ __forceinline__ bool ended() const { return position() >= end_; }
    __device__ __forceinline__ bool past() const { return position() > end_; }

  private:
    static constexpr std::uint32_t kBytes = sizeof(std::uint16_t);

    __device__ __forceinline__ std::uint32_t position() const { return lap_ + (at_ - begin_) / kBytes; }

    // Pieces until enough words are ready, from the ring's beginning once it has been run through.
    __device__ __forceinline__ void fill() {
        if (at_ >= begin_ + kRing * kBytes) {
            at_ -= kRing * kBytes;
            lap_ += kRing;
        }
        KVCAST_UNROLL(1)
        while (filled_ - position() < kReady) advance();
        const std::uint32_t ready = filled_ - lap_ - kReady;  // up to here there are enough, in the ring
        due_ = begin_ + (ready < kRing ? ready + 1 : kRing) * kBytes;
    }

    // The piece under way takes the place of one that has been read, and the next one is sent for.
    __device__ __forceinline__ void advance() {
        const std::uint32_t to = filled_ % kRing;
        __syncwarp();  // all lanes have read what is overwritten
        auto* place = reinterpret_cast<uint4*>(ring_ + to) + lane_id();
        *place = pending_;
        if (to < kReady) place[kRing / 8] = pending_;
        filled_ += kPiece;
        __syncwarp();
        pending_ = load();
    }

    // This lane's words of the piece at filled_.
    __device__ __forceinline__ uint4 load() const {
        const std::uint32_t at = filled_ + 8 * lane_id();
        if (at >= first_ && at + 8 <= end_) return __ldg(reinterpret_cast<const uint4*>(base_ + at));
        return edge(base_, at, first_, end_);
    }

    // Words `at` to at + 7, those from first to end - 1 of them.
    static __device__ KVCAST_APART uint4 edge(const std::uint16_t* base, std::uint32_t at,
                                              std::uint32_t first, std::uint32_t end) {
        std::uint32_t words[4] = {};
        for (std::uint32_t i = 0; i < 8; ++i) {
            const bool inside = at + i >= first && at + i < end;
            const std::uint32_t w = inside ? __ldg(base + at + i) : 0u;
            words[i / 2] |= w << 16 * (i % 2);
        }
        return {words[0], words[1], words[2], words[3]};
    }

    std::uint16_t* ring_;
    std::uint32_t begin_;  // the ring, as a place
    const std::uint16_t* base_ = nullptr;
    std::uint32_t first_ = 0;
    std::uint32_t end_ = 0;
    std::uint32_t at_ = 0;      // a place; may run beyond the ring's end until the next prepare()
    std::uint32_t due_ = 0;     // from this place on prepare() has work
    std::uint32_t lap_ = 0;     // the position of the ring's beginning
    std::uint32_t filled_ = 0;  // a position
    uint4 pending_ = {};
};

// A 32 x 32 matrix of bits, a row a lane, on its way to a column a lane (Warren, "Hacker's Delight", section
// 7-3, with exchanges between lanes for the swaps).
class BitTransposer {
  public:
    __device__ __forceinline__ BitTransposer() {
        halves_ = (lane_id() & 16) == 0 ? 0x5410 : 0x3276;
        bytes_ = (lane_id() & 8) == 0 ? 0x6240 : 0x3715;
        KVCAST_UNROLL(3)
        for (unsigned round = 0; round < kRounds; ++round) {
            const std::uint32_t low = 0xffffffffu / ((1u << (1u << round)) + 1);  // columns that stay below
            keep_[round] = (lane_id() >> round & 1u) != 0 ? ~low : low;
        }
    }

    __device__ __forceinline__ std::uint32_t operator()(std::uint32_t row) const {
        row = __byte_perm(row, __shfl_xor_sync(kFullWarp, row, 16), halves_);
        row = __byte_perm(row, __shfl_xor_sync(kFullWarp, row, 8), bytes_);
        KVCAST_UNROLL(3)
        for (unsigned round = kRounds; round-- > 0;) {
            const std::uint32_t step = 1u << round;
            const std::uint32_t other = __shfl_xor_sync(kFullWarp, row, static_cast<int>(step));
            const std::uint32_t turn = step - 2 * (lane_id() & step);  // modulo 32: to the left, or back
            row = (row & keep_[round]) | (__funnelshift_l(other, other, turn) & ~keep_[round]);
        }
        return row;
    }

  private:
    static constexpr unsigned kRounds = 3;  // within bytes
    std::uint32_t halves_, bytes_;          // selectors
    std::uint32_t keep_[kRounds];
};

// How the values of a step are read.
struct StepCoding {
    std::uint32_t table;  // a place
    std::uint32_t planes;
};

// How the values of a class are read.
struct ClassReader : StepCoding {
    std::int32_t half;
    bool zero;
};

// How class `spread_class` is read with the tables at a place.
__device__ __forceinline__ ClassReader class_reader(std::uint32_t tables, unsigned spread_class) {
    const ClassCoding c = class_coding(spread_class == 0 ? 1 : spread_class);
    const std::uint32_t table = tables + c.table * static_cast<std::uint32_t>(sizeof(BucketTable));
    return {{table, c.shift}, c.shift == 0 ? 0 : 1 << (c.shift - 1), spread_class == 0};
}

class WarpReader {
  public:
    // `begin` is even and has `bytes` >= 128 bytes. `ring` is the warp's own; `tables` is where ReaderTables
    // are.
    __device__ __forceinline__ WarpReader(const std::uint8_t* begin, std::uint32_t bytes,
                                          WordRing::Memory& ring, std::uint32_t tables)
        : tables_(tables), words_(ring), before_((1u << lane_id()) - 1) {
        const auto* words = reinterpret_cast<const std::uint16_t*>(begin);
        state_ = std::uint32_t{words[2 * lane_id()]} | std::uint32_t{words[2 * lane_id() + 1]} << 16;
        next_piece(begin + kStateBytes, bytes - kStateBytes);
    }

    // Goes on with another piece of words, states kept. `begin` is even, `bytes` too.
    __device__ __forceinline__ void next_piece(const std::uint8_t* begin, std::uint32_t bytes) {
        words_.start(reinterpret_cast<const std::uint16_t*>(begin), bytes / 2);
    }

    __device__ __forceinline__ std::uint32_t word() {
        words_.prepare();
        const std::uint32_t w = words_.peek(0);
        words_.skip(1);
        return w;
    }

    __device__ __forceinline__ ClassReader reader_of(unsigned spread_class) const {
        return class_reader(tables_, spread_class);
    }

    // Of elements whose exponents the table codes; it counts from the first exponent table.
    __device__ __forceinline__ std::uint32_t exponents_of(std::uint32_t table) const {
        return tables_ + (kFirstExponentTable + table) * static_cast<std::uint32_t>(sizeof(BucketTable));
    }

    // sink(index, value) for `count` values of a class; a lane takes index lane, lane + 32, ... in order.
    template <typename Sink>
    __device__ __forceinline__ void strip(const ClassReader& c, std::uint32_t count, Sink sink) {
        if (c.zero) {
            KVCAST_UNROLL(1)
            for (std::uint32_t i = lane_id(); i < count; i += kLanes) sink(i, std::int16_t{0});
            __syncwarp();
            return;
        }
        groups(c, count,
               [&](std::uint32_t i, std::int32_t high, std::uint32_t raw) { sink(i, value(c, high, raw)); });
    }

    // sink(index, bits) for `count` elements.
    template <typename Sink>
    __device__ __forceinline__ void floats(std::uint32_t center, std::uint32_t exponents, Dtype dtype,
                                           std::uint32_t count, Sink sink) {
        groups({exponents, mantissa_bits(dtype) + 1}, count,
               [&](std::uint32_t i, std::int32_t high, std::uint32_t raw) {
                   sink(i, element(center, dtype, high, raw));
               });
    }

    // Four groups as they are coded: what symbols and raw bits mean is for somebody else to find out.
    static constexpr std::uint32_t kBytePlanes = 8;
    struct CodedQuad {
        std::uint32_t symbols;  // of group g in the upper half of byte g
        std::uint32_t planes;   // lane 8 g + p has plane p of group g, of all lanes; without raw bits 0
    };
    static __device__ __forceinline__ std::uint32_t symbol_of(std::uint32_t symbols, unsigned g) {
        return symbols >> (8 * g + 4) & 15u;
    }
    // What it says without its raw bits, an escape by its value.
    static __device__ __forceinline__ std::int32_t high_of(std::uint32_t symbol, std::int32_t escape) {
        return symbol == kEscape ? escape : static_cast<std::int32_t>(symbol) - kSymbolZero;
    }

    // Group g is coding_of(g)'s, with at most kBytePlanes raw bits, of count_of(g) values, 0 to 32; what
    // lanes from there on get means nothing. Lanes whose value is an escape's are told it, escape(group,
    // value); in `escaped` there are bits set if there are such lanes.
    template <typename CodingOf, typename CountOf, typename Escape>
    __device__ __forceinline__ CodedQuad coded_quad(bool any_raw, CodingOf coding_of, CountOf count_of,
                                                    Escape escape, std::uint32_t& escaped) {
        words_.prepare();
        return any_raw ? coded_quad<true>(coding_of, count_of, escape, escaped)
                       : coded_quad<false>(coding_of, count_of, escape, escaped);
    }

    // Groups of one coding, of `count` values together, or of the first 128.
    template <typename Escape>
    __device__ __forceinline__ CodedQuad coded_quad(const StepCoding& c, std::uint32_t count, Escape escape,
                                                    std::uint32_t& escaped) {
        const auto count_of = [&](unsigned g) {
            return count < g * kLanes ? 0u : lesser(count - g * kLanes, kLanes);
        };
        words_.prepare();
        return coded_quad<true>([&](unsigned) { return c; }, count_of, escape, escaped);
    }
    // The same of 3 * 32 + last values, last being 1 to 32. Raw: there are raw bits.
    template <bool Raw, typename Escape>
    __device__ __forceinline__ CodedQuad coded_quad_but_last(const StepCoding& c, std::uint32_t last,
                                                             Escape escape, std::uint32_t& escaped) {
        words_.prepare();
        return coded_quad<Raw>([&](unsigned) { return c; }, [&](unsigned g) { return g < 3 ? kLanes : last; },
                               escape, escaped);
    }

    // One group of 1 to 32 values; raw is all its raw bits.
    __device__ __forceinline__ void group(const StepCoding& c, std::uint32_t n, std::int32_t& high,
                                          std::uint32_t& raw) {
        words_.prepare();
        const bool active = lane_id() < n;
        const std::uint32_t entry = entry_of(c.table, state_);
        refill(active ? state_after(state_, entry) : state_, active);
        raw = take_raw(c.planes, words_of_plane(n));
        high = high_of(entry);
        const Escapes escapes = skip_escapes(active ? entry : 0);
        if (escapes.lanes != 0) take_escapes(0, escapes, [&](unsigned, std::int32_t value) { high = value; });
    }

    // A side vector, clamped into [low, high], `stride` apart. False, in all lanes, where that changed it.
    __device__ __forceinline__ bool vector(std::uint32_t count, std::int32_t low, std::int32_t high,
                                           std::int16_t* values, std::uint32_t stride = 1) {
        const std::uint32_t head = word();
        const std::int32_t reference = static_cast<std::int16_t>(head) >> 5;
        bool inside = true;
        strip(reader_of(head & 31u), count, [&](std::uint32_t i, std::int16_t v) {
            const std::int32_t sum = v + reference;
            const std::int32_t clamped = sum < low ? low : sum > high ? high : sum;
            inside = inside && clamped == sum;
            values[i * stride] = static_cast<std::int16_t>(clamped);
        });
        __syncwarp();  // before lanes read what others wrote
        return __all_sync(kFullWarp, inside) != 0;
    }

    // Faults of the words of the present piece: all used, none missing.
    __device__ __forceinline__ std::uint32_t check_used() const {
        return words_.past() ? kEndsEarly : !words_.ended() ? kLeftOver : 0u;
    }

    // check_used, and whether the coder ends as it began.
    __device__ __forceinline__ std::uint32_t close() const {
        const bool closed = __all_sync(kFullWarp, state_ == kStateLow) != 0;
        return check_used() | (closed ? 0u : kNotClosed);
    }

    static constexpr std::uint32_t kStateBytes = kLanes * sizeof(std::uint32_t);

    static __device__ __forceinline__ std::int16_t value(const ClassReader& c, std::int32_t high,
                                                         std::uint32_t raw) {
        return static_cast<std::int16_t>(high * (1 << c.planes) + static_cast<std::int32_t>(raw) - c.half);
    }
    static __device__ __forceinline__ std::uint32_t element(std::uint32_t center, Dtype dtype,
                                                            std::int32_t high, std::uint32_t raw) {
        const unsigned mantissa = mantissa_bits(dtype);
        const unsigned sign_shift = dtype == Dtype::kF32 ? 31 : 15;
        const std::uint32_t exponent = (center - static_cast<std::uint32_t>(high)) & exponent_mask(dtype);
        return raw >> mantissa << sign_shift | exponent << mantissa | (raw & ((1u << mantissa) - 1));
    }

  private:
    // What four steps take at most, with a refill and an escape of every lane, and one with 24 raw bits.
    static_assert(4 * (2 * kLanes + 2 * kBytePlanes) <= WordRing::kReady &&
                  2 * kLanes + 48 <= WordRing::kReady);

    static __device__ __forceinline__ std::uint32_t words_of_plane(std::uint32_t n) {
        return n > 16 ? 2 : n != 0 ? 1 : 0;
    }

    // sink(index, high, raw) of `count` symbols.
    template <typename Sink>
    __device__ __forceinline__ void groups(const StepCoding& c, std::uint32_t count, Sink sink) {
        KVCAST_UNROLL(1)
        for (std::uint32_t first = 0; first < count; first += kLanes) {
            const std::uint32_t n = lesser(kLanes, count - first);
            std::int32_t high = 0;
            std::uint32_t raw = 0;
            group(c, n, high, raw);
            if (lane_id() < n) sink(first + lane_id(), high, raw);
            __syncwarp();
        }
    }

    // Words of a step's escapes.
    struct Escapes {
        unsigned lanes;
        std::uint32_t at;  // a place
    };
    // What four steps leave.
    struct Steps {
        std::uint32_t entries[4];  // 0 in lanes that take no part
        std::uint32_t raw_at[4];   // places of raw bits
        Escapes escapes[4];
    };

    // Four steps. The words are ready.
    template <bool Raw, typename CodingOf, typename CountOf>
    __device__ __forceinline__ void take_steps(CodingOf coding_of, CountOf count_of, Steps& steps) {
        KVCAST_UNROLL(4)
        for (unsigned g = 0; g < 4; ++g) {
            const bool active = lane_id() < count_of(g);
            const std::uint32_t entry = entry_of(coding_of(g).table, state_);
            refill(active ? state_after(state_, entry) : state_, active);
            if constexpr (Raw) {
                steps.raw_at[g] = words_.place();
                words_.skip(coding_of(g).planes * words_of_plane(count_of(g)));
            }
            steps.entries[g] = active ? entry : 0;
            steps.escapes[g] = skip_escapes(steps.entries[g]);
        }
    }

    template <bool Raw, typename CodingOf, typename CountOf, typename Escape>
    __device__ __forceinline__ CodedQuad coded_quad(CodingOf coding_of, CountOf count_of, Escape escape,
                                                    std::uint32_t& escaped) {
        Steps steps;
        take_steps<Raw>(coding_of, count_of, steps);
        unsigned any = 0;
        KVCAST_UNROLL(4)
        for (const Escapes& e : steps.escapes) any |= e.lanes;
        if (any != 0) {
            KVCAST_UNROLL(4)
            for (unsigned g = 0; g < 4; ++g) take_escapes(g, steps.escapes[g], escape);
            escaped |= any;
        }
        const std::uint32_t* e = steps.entries;
        CodedQuad quad = {};
        quad.symbols = __byte_perm(__byte_perm(e[0], e[1], 0x0073), __byte_perm(e[2], e[3], 0x0073), 0x5410);
        if constexpr (Raw) quad.planes = planes_of(steps.raw_at, coding_of, count_of);
        return quad;
    }

    // Raw bits of four steps: lane 8 g + p takes plane p of step g, for all lanes.
    template <typename CodingOf, typename CountOf>
    __device__ __forceinline__ std::uint32_t planes_of(const std::uint32_t (&raw_at)[4], CodingOf coding_of,
                                                       CountOf count_of) const {
        const std::uint32_t step = lane_id() / 8, plane = lane_id() % 8;
        std::uint32_t at = raw_at[0], planes = coding_of(0).planes, count = count_of(0);
        KVCAST_UNROLL(3)
        for (unsigned g = 1; g < 4; ++g) {
            if (step < g) continue;
            at = raw_at[g];
            planes = coding_of(g).planes;
            count = count_of(g);
        }
        std::uint32_t bits = 0;
        if (plane < planes && count != 0) {
            const std::uint32_t words = words_of_plane(count);
            at += plane * words * static_cast<std::uint32_t>(sizeof(std::uint16_t));
            bits = half_at(at);
            if (words == 2) bits |= std::uint32_t{half_at(at + sizeof(std::uint16_t))} << 16;
        }
        __syncwarp();
        return bits;
    }

    // The entry of a table, at a place, for a state's slot.
    static __device__ __forceinline__ std::uint32_t entry_of(std::uint32_t table, std::uint32_t state) {
        constexpr std::uint32_t entry_bytes = sizeof(BucketTable::Entries);
        static_assert(sizeof(BucketTable::Last) == entry_bytes);
        const std::uint32_t place =
            table | (state / (kBucketSlots / entry_bytes) & (kSymbols - 1) * entry_bytes);
        const TwoWords entries = two_words_at(place);
        const std::uint32_t last = table_word_at(place + kSymbols * entry_bytes);
        return state << (32 - kBucketBits) > last ? entries.second : entries.first;
    }

    // States that ran low take a word each, in the order of their lanes. How many there are is asked last:
    // the next step waits for states.
    __device__ __forceinline__ void refill(std::uint32_t after, bool active) {
        const bool low = active && after < kStateLow;
        const unsigned lows = __ballot_sync(kFullWarp, low);
        const std::uint32_t word = words_.peek(static_cast<std::uint32_t>(__popc(lows & before_)));
        state_ = low ? after << 16 | word : after;
        words_.skip(late_popc(lows));
    }

    // kEscape is the greatest symbol, and symbols are an entry's highest bits.
    static __device__ __forceinline__ bool is_escape(std::uint32_t entry) {
        return entry >= pack_entry(kEscape, 0, 0);
    }
    // What a symbol that is no escape says without its raw bits.
    static __device__ __forceinline__ std::int32_t high_of(std::uint32_t entry) {
        return static_cast<std::int32_t>(entry_symbol(entry)) - kSymbolZero;
    }

    // Goes past them: they can be looked at as long as words stay ready.
    __device__ __forceinline__ Escapes skip_escapes(std::uint32_t entry) {
        const Escapes escapes = {__ballot_sync(kFullWarp, is_escape(entry)), words_.place()};
        words_.skip(late_popc(escapes.lanes));
        return escapes;
    }
    // escape(group, value) in the lanes that have one.
    template <typename Escape>
    __device__ __forceinline__ void take_escapes(unsigned group, const Escapes& e, Escape escape) const {
        const std::uint32_t rank = static_cast<std::uint32_t>(__popc(e.lanes & before_));
        const std::uint16_t w = half_at(e.at + rank * static_cast<std::uint32_t>(sizeof(std::uint16_t)));
        if ((e.lanes >> lane_id() & 1u) != 0) escape(group, std::int32_t{static_cast<std::int16_t>(w)});
        __syncwarp();
    }

    // This lane's bit of each plane: two words a plane, or one for up to 16 lanes. From the highest plane
    // down, every bit goes to the top of a word, and from there to the bottom of what there is.
    __device__ __forceinline__ std::uint32_t take_raw(unsigned planes, std::uint32_t per_plane) {
        const std::uint32_t own = per_plane == 2 ? lane_id() / 16 : 0;
        const unsigned to_top = 31 - lane_id() % 16;
        std::uint32_t raw = 0;
        KVCAST_UNROLL(4)
        for (unsigned plane = planes; plane-- > 0;)
            raw = __funnelshift_l(words_.peek(plane * per_plane + own) << to_top, raw, 1);
        words_.skip(planes * per_plane);
        return raw;
    }

    std::uint32_t tables_;
    WordRing words_;
    std::uint32_t state_;
    std::uint32_t before_;  // lanes before this one
};

}  // namespace kvcast::kernels::cuda
