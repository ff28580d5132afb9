// A warp writes one block, backwards: the inverse of WarpReader, step by step. FORMAT.md, section 5; a CPU's
// is kernels/scalar/rans.cpp and codec/entropy/block_writer.cpp, and the bytes are the same.
//
// All functions are called by all 32 lanes together, in the reverse of the decoder's order.
#pragma once

#include "kernels/cuda/encode_tasks.h"
#include "kernels/cuda/warp_rans.cuh"

namespace kvcast::kernels::cuda {

__device__ __forceinline__ std::uint32_t symbol_of(std::int32_t high) {
    const bool inside = high >= -kSymbolZero && high <= kSymbolZero;
    return inside ? static_cast<std::uint32_t>(high + kSymbolZero) : kEscape;
}

// What a value costs in class 1..31, in 1/256 bit.
__device__ __forceinline__ std::uint32_t value_cost(const CoderTables& tables, unsigned spread_class,
                                                    std::int32_t value) {
    const ClassCoding c = class_coding(spread_class);
    const std::int32_t half = c.shift == 0 ? 0 : 1 << (c.shift - 1);
    return tables.cost[c.table][symbol_of((value + half) >> c.shift)] + c.shift * 256;
}

class WarpWriter {
  public:
    // Writes below `end`, which is even. The caller has room for 4 bytes per value, 2 per started 16 values
    // and raw bit, 2 per word, and the states.
    __device__ WarpWriter(std::uint8_t* end, const CoderTables* tables)
        : tables_(tables), next_(reinterpret_cast<std::uint16_t*>(end)), state_(kStateLow) {}

    __device__ void word(std::uint32_t value) {
        --next_;
        if (lane_id() == 0) *next_ = static_cast<std::uint16_t>(value);
    }

    // value(index) gives the values of a strip.
    template <typename Value>
    __device__ void strip(unsigned spread_class, std::uint32_t count, Value value) {
        if (spread_class == 0) return;
        const ClassCoding c = class_coding(spread_class);
        const std::int32_t half = c.shift == 0 ? 0 : 1 << (c.shift - 1);
        for (std::uint32_t groups = div_up(count, kLanes); groups-- > 0;) {
            const std::uint32_t at = groups * kLanes;
            const std::uint32_t n = count - at < kLanes ? count - at : kLanes;
            const std::int32_t shifted = lane_id() < n ? value(at + lane_id()) + half : 0;
            group(tables_->encode[c.table], c.shift, n, shifted >> c.shift,
                  static_cast<std::uint32_t>(shifted) & ((1u << c.shift) - 1));
        }
    }

    // bits(index) gives the elements.
    template <typename Bits>
    __device__ void floats(std::uint32_t center, std::uint32_t table, Dtype dtype, std::uint32_t count,
                           Bits bits) {
        const unsigned mantissa = mantissa_bits(dtype);
        const unsigned sign_shift = dtype == Dtype::kF32 ? 31 : 15;
        for (std::uint32_t groups = div_up(count, kLanes); groups-- > 0;) {
            const std::uint32_t at = groups * kLanes;
            const std::uint32_t n = count - at < kLanes ? count - at : kLanes;
            const std::uint32_t b = lane_id() < n ? bits(at + lane_id()) : 0;
            const auto exponent = static_cast<std::int32_t>(b >> mantissa & exponent_mask(dtype));
            group(tables_->encode[kFirstExponentTable + table], mantissa + 1, n,
                  static_cast<std::int32_t>(center) - exponent,
                  (b >> sign_shift & 1u) << mantissa | (b & ((1u << mantissa) - 1)));
        }
    }

    // A side vector of value(index), with the reference and the class that cost least.
    template <typename Value>
    __device__ void vector(std::uint32_t count, Value value) {
        const std::int32_t reference = reference_of(count, value);
        const unsigned spread_class = cheapest_class(count, value, reference);
        strip(spread_class, count, [&](std::uint32_t i) { return value(i) - reference; });
        word(static_cast<std::uint32_t>(reference * 32 | static_cast<std::int32_t>(spread_class)));
    }
    __device__ void vector(std::uint32_t count, const std::int16_t* values) {
        vector(count, [&](std::uint32_t i) { return std::int32_t{values[i]}; });
    }

    // Where what was written last begins.
    __device__ const std::uint8_t* begin() const { return reinterpret_cast<const std::uint8_t*>(next_); }

    // Puts the states in front. The block is [begin, end).
    __device__ const std::uint8_t* finish() {
        next_ -= 2 * kLanes;
        next_[2 * lane_id()] = static_cast<std::uint16_t>(state_);
        next_[2 * lane_id() + 1] = static_cast<std::uint16_t>(state_ >> 16);
        return begin();
    }

  private:
    // WarpReader's group backwards: what is read last is written first.
    __device__ void group(const EncodeTable& table, unsigned planes, std::uint32_t n, std::int32_t high,
                          std::uint32_t raw) {
        const bool active = lane_id() < n;
        const std::uint32_t symbol = symbol_of(high);
        put_some(active && symbol == kEscape, static_cast<std::uint32_t>(high));
        if (planes != 0) put_raw(planes, n, active ? raw : 0);
        const std::uint32_t frequency = table.frequency[symbol];
        const bool full = active && state_ >= state_limit(frequency);
        put_some(full, state_);
        if (full) state_ >>= 16;
        if (active) {
            const std::uint32_t quotient = state_ / frequency;
            const std::uint32_t rank = state_ - quotient * frequency;
            state_ = quotient << kProbabilityBits | table.slot[table.start[symbol] + rank];
        }
    }

    // The low halves of the lanes that have one to give, in ascending lane order.
    __device__ void put_some(bool mine, std::uint32_t value) {
        const unsigned lanes = __ballot_sync(kFullWarp, mine);
        next_ -= __popc(lanes);
        if (mine) next_[rank_in(lanes)] = static_cast<std::uint16_t>(value);
    }

    // Bit planes, lowest first; lane p writes plane p. At most 24 of them.
    __device__ void put_raw(unsigned planes, std::uint32_t n, std::uint32_t raw) {
        const std::uint32_t per_plane = n > 16 ? 2 : 1;
        unsigned mine = 0;
        for (unsigned plane = 0; plane < planes; ++plane) {
            const unsigned bits = __ballot_sync(kFullWarp, (raw >> plane & 1u) != 0);
            if (lane_id() == plane) mine = bits;
        }
        next_ -= planes * per_plane;
        if (lane_id() < planes) {
            next_[lane_id() * per_plane] = static_cast<std::uint16_t>(mine);
            if (per_plane == 2) next_[lane_id() * 2 + 1] = static_cast<std::uint16_t>(mine >> 16);
        }
    }

    // The median (element count / 2 of the sorted values), within what a vector's word can hold: the least
    // value that more than count / 2 values do not exceed.
    template <typename Value>
    __device__ static std::int32_t reference_of(std::uint32_t count, Value value) {
        if (count == 0) return 0;
        std::int32_t low = -32768, high = 32767;
        while (low < high) {
            const std::int32_t middle = (low + high) >> 1;
            unsigned below = 0;
            for (std::uint32_t i = lane_id(); i < count; i += kLanes) below += value(i) <= middle ? 1 : 0;
            if (__reduce_add_sync(kFullWarp, below) > count / 2) {
                high = middle;
            } else {
                low = middle + 1;
            }
        }
        return low < -1024 ? -1024 : low > 1023 ? 1023 : low;
    }

    // 0 where all values are the reference; else the first of the cheapest, lane c trying class c.
    template <typename Value>
    __device__ unsigned cheapest_class(std::uint32_t count, Value value, std::int32_t reference) const {
        bool equal = true;
        for (std::uint32_t i = lane_id(); i < count; i += kLanes) equal = equal && value(i) == reference;
        if (__all_sync(kFullWarp, equal) != 0) return 0;
        std::uint64_t cost = 0;
        for (std::uint32_t i = 0; i < count && lane_id() != 0; ++i)
            cost += value_cost(*tables_, lane_id(), value(i) - reference);
        std::uint64_t best = lane_id() == 0 ? ~std::uint64_t{0} : cost * kClasses + lane_id();
        for (int step = 16; step > 0; step /= 2) {
            const std::uint64_t other = __shfl_xor_sync(kFullWarp, best, step);
            best = other < best ? other : best;
        }
        return static_cast<unsigned>(best % kClasses);
    }

    const CoderTables* tables_;
    std::uint16_t* next_;
    std::uint32_t state_;
};

}  // namespace kvcast::kernels::cuda
