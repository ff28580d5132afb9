// A warp reads one block: lane i holds state i, a group of 32 symbols is one step of the warp. FORMAT.md,
// section 5; what a CPU does is kernels/scalar/rans.cpp and codec/entropy/block_reader.cpp.
//
// The table of a step lives in registers, an alias table's 16 dividers and 32 entries one or two to a lane,
// and is looked up by two shuffles. Words come through the read-only cache: what the next steps of a warp
// take lies in one or two cache lines. No address depends on decoded data but by a bounded count of words,
// and every index is compared with the end, so that no bytes make the warp read outside the block.
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
    std::uint32_t entry;    // entry[lane]

    __device__ static LaneTable load(const AliasTable& table) {
        return {table.divider[lane_id() % kSymbols], table.entry[lane_id()]};
    }

    // The entry of this lane's slot.
    __device__ std::uint32_t find(std::uint32_t state) const {
        const std::uint32_t slot = state & kProbabilityMask;
        const std::uint32_t bucket = slot >> kBucketBits;
        const std::uint32_t edge = __shfl_sync(kFullWarp, divider, static_cast<int>(bucket));
        const std::uint32_t second = (slot & (kBucketSlots - 1)) >= edge ? 1 : 0;
        return __shfl_sync(kFullWarp, entry, static_cast<int>(2 * bucket + second));
    }
};

class WarpReader {
  public:
    // `begin` is even and has `bytes` >= 128 bytes; `tables` are the format's 25.
    __device__ WarpReader(const std::uint8_t* begin, std::uint32_t bytes, const AliasTable* tables)
        : tables_(tables) {
        const auto* words = reinterpret_cast<const std::uint16_t*>(begin);
        state_ = std::uint32_t{words[2 * lane_id()]} | std::uint32_t{words[2 * lane_id() + 1]} << 16;
        next_piece(begin + kStateBytes, bytes - kStateBytes);
    }

    // Goes on with another piece of words, states kept. `begin` is even, `bytes` too.
    __device__ void next_piece(const std::uint8_t* begin, std::uint32_t bytes) {
        words_ = reinterpret_cast<const std::uint16_t*>(begin);
        at_ = 0;
        end_ = bytes / 2;
    }

    __device__ std::uint32_t word() { return word_at(at_++); }

    // sink(index, value) for `count` values of a class; a lane takes index lane, lane + 32, ... in order.
    template <typename Sink>
    __device__ void strip(unsigned spread_class, std::uint32_t count, Sink sink) {
        if (spread_class == 0) {
            for (std::uint32_t i = lane_id(); i < count; i += kLanes) sink(i, std::int16_t{0});
            return;
        }
        const ClassCoding c = class_coding(spread_class);
        const LaneTable table = LaneTable::load(tables_[c.table]);
        const std::int32_t half = c.shift == 0 ? 0 : 1 << (c.shift - 1);
        for (std::uint32_t at = 0; at < count; at += kLanes) {
            const std::uint32_t n = count - at < kLanes ? count - at : kLanes;
            const Group g = group(table, c.shift, n);
            const std::int32_t value = g.high * (1 << c.shift) + static_cast<std::int32_t>(g.raw) - half;
            if (lane_id() < n) sink(at + lane_id(), static_cast<std::int16_t>(value));
        }
    }

    // A side vector, clamped into [low, high]. False, in all lanes, where that changed it.
    __device__ bool vector(std::uint32_t count, std::int32_t low, std::int32_t high, std::int16_t* values) {
        const std::uint32_t head = word();
        const std::int32_t reference = static_cast<std::int16_t>(head) >> 5;
        bool inside = true;
        strip(head & 31u, count, [&](std::uint32_t i, std::int16_t v) {
            const std::int32_t sum = v + reference;
            const std::int32_t clamped = sum < low ? low : sum > high ? high : sum;
            inside = inside && clamped == sum;
            values[i] = static_cast<std::int16_t>(clamped);
        });
        __syncwarp();  // before lanes read what others wrote
        return __all_sync(kFullWarp, inside) != 0;
    }

    // sink(index, bits) for `count` elements; `table` counts from the first exponent table.
    template <typename Sink>
    __device__ void floats(std::uint32_t center, std::uint32_t table, Dtype dtype, std::uint32_t count,
                           Sink sink) {
        const LaneTable lanes = LaneTable::load(tables_[kFirstExponentTable + table]);
        const unsigned mantissa = mantissa_bits(dtype);
        const unsigned sign_shift = dtype == Dtype::kF32 ? 31 : 15;
        for (std::uint32_t at = 0; at < count; at += kLanes) {
            const std::uint32_t n = count - at < kLanes ? count - at : kLanes;
            const Group g = group(lanes, mantissa + 1, n);
            const std::uint32_t exponent =
                (center - static_cast<std::uint32_t>(g.high)) & exponent_mask(dtype);
            const std::uint32_t bits =
                g.raw >> mantissa << sign_shift | exponent << mantissa | (g.raw & ((1u << mantissa) - 1));
            if (lane_id() < n) sink(at + lane_id(), bits);
        }
    }

    // Faults of the words of the present piece: all used, none missing.
    __device__ std::uint32_t check_used() const {
        return at_ > end_ ? kEndsEarly : at_ < end_ ? kLeftOver : 0u;
    }

    // check_used, and whether the coder ends as it began.
    __device__ std::uint32_t close() const {
        const bool closed = __all_sync(kFullWarp, state_ == kStateLow) != 0;
        return check_used() | (closed ? 0u : kNotClosed);
    }

    static constexpr std::uint32_t kStateBytes = kLanes * sizeof(std::uint32_t);

  private:
    struct Group {
        std::int32_t high;
        std::uint32_t raw;
    };

    // Words that are missing are zero; close() finds out.
    __device__ std::uint32_t word_at(std::uint32_t index) const {
        return index < end_ ? __ldg(words_ + index) : 0u;
    }

    // One symbol of each of the first n lanes, 1 to 32.
    __device__ Group group(const LaneTable& table, unsigned planes, std::uint32_t n) {
        const bool active = lane_id() < n;
        const std::uint32_t entry = table.find(state_);
        if (active) state_ = state_after(state_, entry);
        const bool low = active && state_ < kStateLow;
        const unsigned lows = __ballot_sync(kFullWarp, low);
        if (low) state_ = state_ << 16 | word_at(at_ + rank_in(lows));
        at_ += static_cast<std::uint32_t>(__popc(lows));

        const std::uint32_t raw = planes == 0 ? 0 : take_raw(planes, n);

        const bool escaped = active && entry_symbol(entry) == kEscape;
        const unsigned escapes = __ballot_sync(kFullWarp, escaped);
        auto high = static_cast<std::int32_t>(entry_symbol(entry)) - kSymbolZero;
        if (escaped) high = static_cast<std::int16_t>(word_at(at_ + rank_in(escapes)));
        at_ += static_cast<std::uint32_t>(__popc(escapes));
        return {high, raw};
    }

    // This lane's bit of each plane, lowest first: two words a plane, or one for up to 16 lanes.
    __device__ std::uint32_t take_raw(unsigned planes, std::uint32_t n) {
        const std::uint32_t per_plane = n > 16 ? 2 : 1;
        const std::uint32_t own = per_plane == 2 ? lane_id() / 16 : 0;
        std::uint32_t raw = 0;
        for (unsigned plane = 0; plane < planes; ++plane) {
            const std::uint32_t w = word_at(at_ + plane * per_plane + own);
            raw |= (w >> (lane_id() % 16) & 1u) << plane;
        }
        at_ += planes * per_plane;
        return raw;
    }

    const AliasTable* tables_;
    const std::uint16_t* words_ = nullptr;
    std::uint32_t state_;
    std::uint32_t at_ = 0;
    std::uint32_t end_ = 0;
};

}  // namespace kvcast::kernels::cuda
