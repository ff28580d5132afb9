// A warp reads one block: lane i holds state i, a group of 32 symbols is one step of the warp. FORMAT.md,
// section 5; what a CPU does is kernels/scalar/rans.cpp and codec/entropy/block_reader.cpp.
//
// A step waits for the step before: what is fast here is what has few instructions between one state and the
// next. The table of a step lives in registers, an alias table's 16 dividers and 32 entries one or two to a
// lane, and is looked up by three shuffles that do not wait for each other. Words come through a ring in
// shared memory, which is filled a piece ahead by loads that have long been under way. No address depends on
// decoded data but by a bounded count of words, and every index is compared with the end, so that no bytes
// make the warp read outside the block.
//
// All functions are called by all 32 lanes together. Counts, classes and offsets are the same in all lanes.
#pragma once

#include <cuda_runtime.h>

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

// An alias table across a warp's registers.
struct LaneTable {
    std::uint32_t divider;  // of bucket lane % 16
    std::uint32_t entry;    // of bucket lane % 16: the first one in lanes 0 to 15, the second in the others

    __device__ static LaneTable load(const AliasTable& table) {
        const unsigned bucket = lane_id() % kSymbols;
        return {table.divider[bucket], table.entry[2 * bucket + lane_id() / kSymbols]};
    }

    // The entry of this lane's slot.
    __device__ std::uint32_t find(std::uint32_t state) const {
        const std::uint32_t slot = state & kProbabilityMask;
        const auto bucket = static_cast<int>(slot >> kBucketBits);
        const std::uint32_t edge = __shfl_sync(kFullWarp, divider, bucket);
        const std::uint32_t first = __shfl_sync(kFullWarp, entry, bucket);
        const std::uint32_t second = __shfl_sync(kFullWarp, entry, bucket + static_cast<int>(kSymbols));
        return (slot & (kBucketSlots - 1)) >= edge ? second : first;
    }
};

// Words of a block, in order. Words beyond the end are zero; past() finds out.
class WordRing {
  public:
    static constexpr std::uint32_t kPiece = 4 * kLanes;  // words: eight bytes a lane
    static constexpr std::uint32_t kWords = 2 * kPiece;
    // What a group of elements takes at most: a refill of every lane, 24 planes of raw bits, an escape of
    // every lane. A piece that begins with up to three words of something else still has as many.
    static constexpr std::uint32_t kMost = kLanes + 2 * 24 + kLanes;
    static_assert(kMost + 3 <= kPiece);

    // A warp's ring, in shared memory.
    struct alignas(8) Memory {
        std::uint16_t words[kWords];
    };

    __device__ explicit WordRing(Memory& ring) : ring_(ring.words) {}

    // Goes on with `count` words at `begin`. Positions count from the 8 bytes that hold the first one, so
    // that loads are aligned.
    __device__ void start(const std::uint16_t* begin, std::uint32_t count) {
        first_ = static_cast<std::uint32_t>(reinterpret_cast<std::uintptr_t>(begin) / sizeof(*begin) % 4);
        base_ = begin - first_;
        end_ = first_ + count;
        at_ = first_;
        filled_ = 0;
        pending_ = load();
        advance();
    }

    // Has kMost words ready from here on.
    __device__ void prepare() {
        if (filled_ - at_ < kMost) advance();
    }

    // After prepare(): the word `ahead` of the next one, below kMost.
    __device__ std::uint32_t peek(std::uint32_t ahead) const { return ring_[(at_ + ahead) % kWords]; }
    __device__ void skip(std::uint32_t count) { at_ += count; }

    __device__ bool ended() const { return at_ >= end_; }
    __device__ bool past() const { return at_ > end_; }

  private:
    // The piece under way takes the place of one that has been read, and the next one is sent for.
    __device__ void advance() {
        __syncwarp();  // all lanes have read what is overwritten
        *reinterpret_cast<unsigned long long*>(ring_ + (filled_ + 4 * lane_id()) % kWords) = pending_;
        filled_ += kPiece;
        __syncwarp();
        pending_ = load();
    }

    // This lane's four words of the piece at filled_.
    __device__ unsigned long long load() const {
        const std::uint32_t at = filled_ + 4 * lane_id();
        if (at >= first_ && at + 4 <= end_)
            return __ldg(reinterpret_cast<const unsigned long long*>(base_ + at));
        unsigned long long words = 0;
        for (std::uint32_t i = 0; i < 4; ++i) {
            if (at + i >= first_ && at + i < end_)
                words |= static_cast<unsigned long long>(__ldg(base_ + at + i)) << 16 * i;
        }
        return words;
    }

    std::uint16_t* ring_;
    const std::uint16_t* base_ = nullptr;
    std::uint32_t first_ = 0;
    std::uint32_t end_ = 0;
    std::uint32_t at_ = 0;
    std::uint32_t filled_ = 0;
    unsigned long long pending_ = 0;
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
        words_.prepare();
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
            for (std::uint32_t i = lane_id(); i < count; i += kLanes) sink(i, std::int16_t{0});
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
    // sink(index, high, raw) of `count` symbols.
    template <bool Raw, typename Sink>
    __device__ __forceinline__ void groups(const LaneTable& table, unsigned planes, std::uint32_t count,
                                           Sink sink) {
        std::uint32_t at = 0;
        for (; at + kLanes <= count; at += kLanes) group<Raw, true>(table, planes, kLanes, at, sink);
        if (at < count) group<Raw, false>(table, planes, count - at, at, sink);
    }

    // One symbol of each of the first n lanes, 1 to 32; Full: of all.
    template <bool Raw, bool Full, typename Sink>
    __device__ __forceinline__ void group(const LaneTable& table, unsigned planes, std::uint32_t n,
                                          std::uint32_t at, Sink& sink) {
        words_.prepare();
        const bool active = Full || lane_id() < n;
        const std::uint32_t entry = table.find(state_);
        const std::uint32_t after = active ? state_after(state_, entry) : state_;
        const bool low = active && after < kStateLow;
        const unsigned lows = __ballot_sync(kFullWarp, low);
        const std::uint32_t refilled =
            after << 16 | words_.peek(static_cast<std::uint32_t>(__popc(lows & before_)));
        state_ = low ? refilled : after;
        words_.skip(static_cast<std::uint32_t>(__popc(lows)));

        std::uint32_t raw = 0;
        if constexpr (Raw) raw = take_raw(planes, Full || n > 16 ? 2 : 1);

        const bool escaped = active && entry_symbol(entry) == kEscape;
        const unsigned escapes = __ballot_sync(kFullWarp, escaped);
        auto high = static_cast<std::int32_t>(entry_symbol(entry)) - kSymbolZero;
        if (escapes != 0) {
            const std::uint32_t w = words_.peek(static_cast<std::uint32_t>(__popc(escapes & before_)));
            if (escaped) high = static_cast<std::int16_t>(w);
            words_.skip(static_cast<std::uint32_t>(__popc(escapes)));
        }
        if (active) sink(at + lane_id(), high, raw);
    }

    // This lane's bit of each plane, lowest first: two words a plane, or one for up to 16 lanes.
    __device__ __forceinline__ std::uint32_t take_raw(unsigned planes, std::uint32_t per_plane) {
        const std::uint32_t own = per_plane == 2 ? lane_id() / 16 : 0;
        std::uint32_t raw = 0;
        for (unsigned plane = 0; plane < planes; ++plane)
            raw |= (words_.peek(plane * per_plane + own) >> (lane_id() % 16) & 1u) << plane;
        words_.skip(planes * per_plane);
        return raw;
    }

    const AliasTable* tables_;
    WordRing words_;
    std::uint32_t state_;
    std::uint32_t before_;  // lanes before this one
};

}  // namespace kvcast::kernels::cuda
