// A warp reads one block: lane i holds state i, a group of 32 symbols is one step of the warp. FORMAT.md,
// section 5; what a CPU does is kernels/scalar/rans.cpp and codec/entropy/block_reader.cpp.
//
// A step waits for the step before, and a batch has few warps: what is fast here is a short chain from one
// state to the next, with everything else done while the chain waits. The table of a step lives in registers
// and is looked up by three shuffles that do not wait for each other; while they are under way, the symbols
// of the step before become values. Words come through a ring in shared memory, which is filled a piece ahead
// by loads that have long been sent. No address depends on decoded data but by a bounded count of words, and
// every index is compared with the end, so that no bytes make the warp read outside the block.
//
// All functions are called by all 32 lanes together, and say so to the compiler where lanes have gone
// different ways: else it expects them to be apart wherever they meet, in every step. Counts, classes and
// offsets are the same in all lanes.
#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/platform.cuh"
#include "kernels/cuda/tasks.h"
#include "kernels/ops.h"

namespace kvcast::kernels::cuda {

inline constexpr unsigned kFullWarp = 0xffffffffu;

__device__ __forceinline__ unsigned lane_id() {
    return threadIdx.x % kLanes;
}

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

// An alias table across a warp's registers, the same in both halves.
struct LaneTable {
    std::uint32_t last;   // of bucket lane % 16: the last slot of its first entry, in the upper ten bits
    std::uint32_t first;  // its entries
    std::uint32_t second;

    __device__ static LaneTable load(const AliasTable& table) {
        const unsigned bucket = lane_id() % kSymbols;
        return {((table.divider[bucket] - 1) << kSlotShift) | ((1u << kSlotShift) - 1),
                table.entry[2 * bucket], table.entry[2 * bucket + 1]};
    }

    // What this lane's state needs of its bucket.
    __device__ __forceinline__ LaneTable bucket_of(std::uint32_t state) const {
        const auto bucket = static_cast<int>(state >> kBucketBits);  // modulo 16
        return {__shfl_sync(kFullWarp, last, bucket, kSymbols),
                __shfl_sync(kFullWarp, first, bucket, kSymbols),
                __shfl_sync(kFullWarp, second, bucket, kSymbols)};
    }

    // Of a bucket: the entry of the state's slot.
    __device__ __forceinline__ std::uint32_t entry_of(std::uint32_t state) const {
        return state << kSlotShift > last ? second : first;
    }

  private:
    static constexpr unsigned kSlotShift = 32 - kBucketBits;
};

// Words of a block, in order. Words beyond the end are zero; past() finds out.
class WordRing {
  public:
    static constexpr std::uint32_t kPiece = 8 * kLanes;  // words: sixteen bytes a lane
    static constexpr std::uint32_t kWords = 4 * kPiece;
    // What prepare() may be asked for. Readers do not wrap: the first words are there again behind the last.
    static constexpr std::uint32_t kMost = 2 * kPiece;

    // A warp's ring, in shared memory.
    struct alignas(16) Memory {
        std::uint16_t words[kWords + kMost];
    };

    __device__ explicit WordRing(Memory& ring) : ring_(ring.words) {}

    // Goes on with `count` words at `begin`. Positions count from the 16 bytes that hold the first one, so
    // that loads are aligned.
    __device__ void start(const std::uint16_t* begin, std::uint32_t count) {
        first_ = static_cast<std::uint32_t>(reinterpret_cast<std::uintptr_t>(begin) / sizeof(*begin) % 8);
        base_ = begin - first_;
        end_ = first_ + count;
        at_ = first_;
        lap_ = 0;
        filled_ = 0;
        pending_ = load();
        advance();
    }

    // Has `need` words ready from here on, at most kMost.
    __device__ __forceinline__ void prepare(std::uint32_t need) {
        if (at_ >= kWords) {
            at_ -= kWords;
            lap_ += kWords;
        }
        while (filled_ - (lap_ + at_) < need) advance();
    }

    // The word `ahead` of the next one, of those that are ready.
    __device__ __forceinline__ std::uint32_t peek(std::uint32_t ahead) const { return ring_[at_ + ahead]; }
    __device__ __forceinline__ void skip(std::uint32_t count) { at_ += count; }

    __device__ bool ended() const { return lap_ + at_ >= end_; }
    __device__ bool past() const { return lap_ + at_ > end_; }

  private:
    // The piece under way takes the place of one that has been read, and the next one is sent for.
    __device__ void advance() {
        const std::uint32_t to = filled_ % kWords;
        __syncwarp();  // all lanes have read what is overwritten
        auto* place = reinterpret_cast<uint4*>(ring_ + to) + lane_id();
        *place = pending_;
        if (to < kMost) place[kWords / 8] = pending_;
        filled_ += kPiece;
        __syncwarp();
        pending_ = load();
    }

    // This lane's words of the piece at filled_.
    __device__ uint4 load() const {
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
    const std::uint16_t* base_ = nullptr;
    std::uint32_t first_ = 0;
    std::uint32_t end_ = 0;
    std::uint32_t at_ = 0;      // in the ring; may run beyond its end until the next prepare()
    std::uint32_t lap_ = 0;     // the position of the ring's beginning
    std::uint32_t filled_ = 0;  // a position
    uint4 pending_ = {};
};

// How the values of a class are read. Made ahead of its use, its loads are no wait.
struct ClassReader {
    LaneTable table;
    unsigned shift;
    std::int32_t half;
    bool zero;

    __device__ static ClassReader load(const AliasTable* tables, unsigned spread_class) {
        const ClassCoding c = class_coding(spread_class == 0 ? 1 : spread_class);
        return {LaneTable::load(tables[c.table]), c.shift, c.shift == 0 ? 0 : 1 << (c.shift - 1),
                spread_class == 0};
    }
};

class WarpReader {
  public:
    // `begin` is even and has `bytes` >= 128 bytes; `tables` are the format's 25; `ring` is the warp's own.
    __device__ WarpReader(const std::uint8_t* begin, std::uint32_t bytes, const AliasTable* tables,
                          WordRing::Memory& ring)
        : tables_(tables), words_(ring), before_((1u << lane_id()) - 1) {
        const auto* words = reinterpret_cast<const std::uint16_t*>(begin);
        state_ = std::uint32_t{words[2 * lane_id()]} | std::uint32_t{words[2 * lane_id() + 1]} << 16;
        next_piece(begin + kStateBytes, bytes - kStateBytes);
    }

    // Goes on with another piece of words, states kept. `begin` is even, `bytes` too.
    __device__ void next_piece(const std::uint8_t* begin, std::uint32_t bytes) {
        words_.start(reinterpret_cast<const std::uint16_t*>(begin), bytes / 2);
    }

    __device__ std::uint32_t word() {
        words_.prepare(1);
        const std::uint32_t w = words_.peek(0);
        words_.skip(1);
        return w;
    }

    __device__ ClassReader reader_of(unsigned spread_class) const {
        return ClassReader::load(tables_, spread_class);
    }

    // sink(index, value) for `count` values of a class; a lane takes index lane, lane + 32, ... in order.
    template <typename Sink>
    __device__ __forceinline__ void strip(const ClassReader& c, std::uint32_t count, Sink sink) {
        if (c.zero) {
            KVCAST_UNROLL(1)
            for (std::uint32_t i = lane_id(); i < count; i += kLanes) sink(i, std::int16_t{0});
            __syncwarp();
        } else if (c.shift == 0) {
            groups<false>(c.table, 0, count, [&](std::uint32_t i, std::int32_t high, std::uint32_t) {
                sink(i, static_cast<std::int16_t>(high));
            });
        } else {
            groups<true>(c.table, c.shift, count, [&](std::uint32_t i, std::int32_t high, std::uint32_t raw) {
                const std::int32_t value = high * (1 << c.shift) + static_cast<std::int32_t>(raw) - c.half;
                sink(i, static_cast<std::int16_t>(value));
            });
        }
    }

    // `count` steps, each of a class of its own: reader_of(i) says how step i is read, and of how many
    // values, 1 to 32; sink(reader, value) takes this lane's value of a step.
    template <typename ReaderOf, typename Sink>
    __device__ __forceinline__ void steps(std::uint32_t count, ReaderOf reader_of, Sink sink) {
        if (count == 0) return;
        auto next = reader_of(0);
        auto present = next;
        Symbols symbols = {};
        const auto finish = [&](const auto& reader) {
            const std::int32_t high = high_of(symbols);
            const std::int32_t value =
                high * (1 << reader.shift) + static_cast<std::int32_t>(symbols.raw) - reader.half;
            if (lane_id() < reader.count) sink(reader, static_cast<std::int16_t>(value));
            __syncwarp();
        };
        KVCAST_UNROLL(1)
        for (std::uint32_t i = 0; i < count; ++i) {
            const auto previous = present;
            present = next;
            if (i + 1 < count) next = reader_of(i + 1);
            words_.prepare(2 * most_words(present.shift));  // and escapes of the step before
            const Symbols own = step<true, false>(present.table, present.shift, present.count, [&] {
                if (i != 0) finish(previous);
            });
            symbols = own;
        }
        finish(present);
    }

    // A side vector, clamped into [low, high]. False, in all lanes, where that changed it.
    __device__ bool vector(std::uint32_t count, std::int32_t low, std::int32_t high, std::int16_t* values) {
        const std::uint32_t head = word();
        const std::int32_t reference = static_cast<std::int16_t>(head) >> 5;
        bool inside = true;
        strip(reader_of(head & 31u), count, [&](std::uint32_t i, std::int16_t v) {
            const std::int32_t sum = v + reference;
            const std::int32_t clamped = sum < low ? low : sum > high ? high : sum;
            inside = inside && clamped == sum;
            values[i] = static_cast<std::int16_t>(clamped);
        });
        __syncwarp();  // before lanes read what others wrote
        return __all_sync(kFullWarp, inside) != 0;
    }

    // Of elements whose exponents the table codes; it counts from the first exponent table.
    __device__ LaneTable exponents_of(std::uint32_t table) const {
        return LaneTable::load(tables_[kFirstExponentTable + table]);
    }

    // sink(index, bits) for `count` elements.
    template <typename Sink>
    __device__ __forceinline__ void floats(std::uint32_t center, const LaneTable& exponents, Dtype dtype,
                                           std::uint32_t count, Sink sink) {
        const unsigned mantissa = mantissa_bits(dtype);
        const unsigned sign_shift = dtype == Dtype::kF32 ? 31 : 15;
        groups<true>(
            exponents, mantissa + 1, count, [&](std::uint32_t i, std::int32_t high, std::uint32_t raw) {
                const std::uint32_t exponent =
                    (center - static_cast<std::uint32_t>(high)) & exponent_mask(dtype);
                sink(i,
                     raw >> mantissa << sign_shift | exponent << mantissa | (raw & ((1u << mantissa) - 1)));
            });
    }

    // Faults of the words of the present piece: all used, none missing.
    __device__ std::uint32_t check_used() const {
        return words_.past() ? kEndsEarly : !words_.ended() ? kLeftOver : 0u;
    }

    // check_used, and whether the coder ends as it began.
    __device__ std::uint32_t close() const {
        const bool closed = __all_sync(kFullWarp, state_ == kStateLow) != 0;
        return check_used() | (closed ? 0u : kNotClosed);
    }

    static constexpr std::uint32_t kStateBytes = kLanes * sizeof(std::uint32_t);

  private:
    // A step's symbols, before they are values.
    struct Symbols {
        std::uint32_t entry;
        std::uint32_t raw;
        unsigned escapes;  // lanes
    };

    // What a step takes at most: a refill of every lane, raw bits, an escape of every lane.
    static __device__ constexpr std::uint32_t most_words(unsigned planes) { return 2 * kLanes + 2 * planes; }
    static constexpr std::uint32_t kStepsAhead = 4;
    static_assert(kStepsAhead * (2 * kLanes + 2 * 24) <= WordRing::kMost);

    // sink(index, high, raw) of `count` symbols.
    template <bool Raw, typename Sink>
    __device__ __forceinline__ void groups(const LaneTable& table, unsigned planes, std::uint32_t count,
                                           Sink sink) {
        const std::uint32_t need = kStepsAhead * most_words(planes);
        const std::uint32_t full = count / kLanes, rest = count % kLanes;
        if (full != 0) {
            words_.prepare(need);
            Symbols symbols = step<Raw, true>(table, planes, kLanes, [] {});
            std::uint32_t index = lane_id();
            KVCAST_UNROLL(1)
            for (std::uint32_t i = 1; i < full; ++i, index += kLanes) {
                if (i % kStepsAhead == 0) words_.prepare(need);
                symbols = step<Raw, true>(table, planes, kLanes,
                                          [&] { sink(index, high_of(symbols), symbols.raw); });
            }
            sink(index, high_of(symbols), symbols.raw);
        }
        if (rest != 0) {
            words_.prepare(need);
            const Symbols symbols = step<Raw, false>(table, planes, rest, [] {});
            const std::int32_t high = high_of(symbols);
            if (lane_id() < rest) sink(full * kLanes + lane_id(), high, symbols.raw);
            __syncwarp();
        }
    }

    // One symbol of each of the first n lanes, 1 to 32; Full: of all. `meanwhile` finishes the step before,
    // which may take words, while the table is asked.
    template <bool Raw, bool Full, typename Meanwhile>
    __device__ __forceinline__ Symbols step(const LaneTable& table, unsigned planes, std::uint32_t n,
                                            Meanwhile meanwhile) {
        const bool active = Full || lane_id() < n;
        const LaneTable bucket = table.bucket_of(state_);
        meanwhile();
        const std::uint32_t entry = bucket.entry_of(state_);
        const std::uint32_t after = active ? state_after(state_, entry) : state_;
        const bool low = active && after < kStateLow;
        const unsigned lows = __ballot_sync(kFullWarp, low);
        const std::uint32_t word = words_.peek(static_cast<std::uint32_t>(__popc(lows & before_)));
        state_ = low ? after << 16 | word : after;
        words_.skip(static_cast<std::uint32_t>(__popc(lows)));
        std::uint32_t raw = 0;
        if constexpr (Raw) raw = take_raw(planes, Full || n > 16 ? 2 : 1);
        return {entry, raw, __ballot_sync(kFullWarp, active && entry_symbol(entry) == kEscape)};
    }

    // What the symbols say without their raw bits; takes the words of escapes.
    __device__ __forceinline__ std::int32_t high_of(const Symbols& symbols) {
        auto high = static_cast<std::int32_t>(entry_symbol(symbols.entry)) - kSymbolZero;
        if (symbols.escapes != 0) {
            const std::uint32_t w =
                words_.peek(static_cast<std::uint32_t>(__popc(symbols.escapes & before_)));
            high = (symbols.escapes >> lane_id() & 1u) != 0 ? static_cast<std::int16_t>(w) : high;
            words_.skip(static_cast<std::uint32_t>(__popc(symbols.escapes)));
        }
        return high;
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

    const AliasTable* tables_;
    WordRing words_;
    std::uint32_t state_;
    std::uint32_t before_;  // lanes before this one
};

}  // namespace kvcast::kernels::cuda
