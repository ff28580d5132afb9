// How side vectors are coded (FORMAT.md, section 5.4): the CPU encoder's choice (codec/entropy), by a warp.
#pragma once

#include "kernels/cuda/compiler.cuh"
#include "kernels/cuda/encode_tasks.h"
#include "kernels/cuda/warp_rans.cuh"

namespace kvcast::kernels::cuda {

struct SideVector {
    std::int32_t reference;
    unsigned spread_class;

    __device__ std::uint32_t word() const {
        return static_cast<std::uint32_t>(reference * 32 | static_cast<std::int32_t>(spread_class)) & 0xffffu;
    }
};

KVCAST_HD constexpr std::uint32_t symbol_of(std::int32_t high) {
    const auto symbol = static_cast<std::uint32_t>(high + kSymbolZero);
    return symbol < kEscape ? symbol : kEscape;
}

// What a value costs in class 1..31, in 1/256 bit.
__device__ __forceinline__ std::uint32_t value_cost(const CoderTables& tables, unsigned spread_class,
                                                    std::int32_t value) {
    const ClassCoding c = class_coding(spread_class);
    const std::int32_t half = c.shift == 0 ? 0 : 1 << (c.shift - 1);
    return tables.cost[c.table][symbol_of((value + half) >> c.shift)] + c.shift * 256;
}

// The median (element count / 2 of the sorted values), within what a vector's word can hold: the least
// value that more than count / 2 values do not exceed.
template <typename Value>
__device__ std::int32_t reference_of(std::uint32_t count, Value value) {
    if (count == 0) return 0;
    std::uint32_t least = 0xffffu, most = 0;  // plus 2^15
    by_lanes(count, [&](std::uint32_t i) {
        const auto v = static_cast<std::uint32_t>(value(i) + 32768);
        least = v < least ? v : least;
        most = v > most ? v : most;
    });
    auto low = static_cast<std::int32_t>(__reduce_min_sync(kFullWarp, least)) - 32768;
    auto high = static_cast<std::int32_t>(__reduce_max_sync(kFullWarp, most)) - 32768;
    while (low < high) {
        const std::int32_t middle = (low + high) >> 1;
        unsigned below = 0;
        by_lanes(count, [&](std::uint32_t i) { below += value(i) <= middle ? 1 : 0; });
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
__device__ unsigned cheapest_class(const CoderTables& tables, std::uint32_t count, Value value,
                                   std::int32_t reference) {
    bool equal = true;
    by_lanes(count, [&](std::uint32_t i) { equal = equal && value(i) == reference; });
    if (__all_sync(kFullWarp, equal) != 0) return 0;
    std::uint32_t cost = 0;  // of up to 2^16 values at up to 2^14 each
    const std::uint32_t end = uniform(count);
    for (std::uint32_t at = 0; at < end; at += kLanes) {
        const std::uint32_t n = end - at < kLanes ? end - at : kLanes;
        const std::int32_t own = lane_id() < n ? value(at + lane_id()) - reference : 0;
        KVCAST_UNROLL(8)
        for (std::uint32_t i = 0; i < n; ++i) {
            const std::int32_t v = __shfl_sync(kFullWarp, own, static_cast<int>(i));
            cost += value_cost(tables, lane_id() == 0 ? 1 : lane_id(), v);
        }
    }
    std::uint64_t best = lane_id() == 0 ? ~std::uint64_t{0} : std::uint64_t{cost} * kClasses + lane_id();
    for (int step = 16; step > 0; step /= 2) {
        const std::uint64_t other = __shfl_xor_sync(kFullWarp, best, step);
        best = other < best ? other : best;
    }
    return static_cast<unsigned>(best % kClasses);
}

// The same for up to kGroups * 32 values in registers: value g of a lane is number g * 32 + lane.
template <std::uint32_t kGroups>
class ShortVector {
  public:
    template <typename Value>
    __device__ __forceinline__ ShortVector(std::uint32_t count, Value value) : count_(count) {
        KVCAST_UNROLL(8)
        for (std::uint32_t g = 0; g < kGroups; ++g)
            values_[g] = inside(g) ? value(g * kLanes + lane_id()) : kBehind;
    }

    __device__ __forceinline__ bool inside(std::uint32_t g) const {
        return g < kGroups && g * kLanes + lane_id() < count_;
    }
    __device__ __forceinline__ std::int32_t value(std::uint32_t g) const { return values_[g]; }

    __device__ __forceinline__ SideVector chosen(const CoderTables& tables) const {
        const std::int32_t least = edge<false>(), most = edge<true>(), middle = median(least, most);
        const std::int32_t reference = middle < -1024 ? -1024 : middle > 1023 ? 1023 : middle;
        if (least == reference && most == reference) return {reference, 0};
        return {reference, cheapest(tables, reference)};
    }

  private:
    static constexpr std::int32_t kBehind = 1 << 20;  // more than any value

    // The least value, or the greatest one.
    template <bool kMost>
    __device__ __forceinline__ std::int32_t edge() const {
        std::uint32_t own = kMost ? 0 : 0xffffu;  // plus 2^15
        KVCAST_UNROLL(8)
        for (std::uint32_t g = 0; g < kGroups; ++g) {
            const auto v = static_cast<std::uint32_t>(values_[g] + 32768);
            if (inside(g) && (kMost ? v > own : v < own)) own = v;
        }
        const unsigned all = kMost ? __reduce_max_sync(kFullWarp, own) : __reduce_min_sync(kFullWarp, own);
        return static_cast<std::int32_t>(all) - 32768;
    }

    // As reference_of() has it.
    __device__ __forceinline__ std::int32_t median(std::int32_t low, std::int32_t high) const {
        KVCAST_UNROLL(1)
        while (low < high) {
            const std::int32_t middle = (low + high) >> 1;
            unsigned below = 0;
            KVCAST_UNROLL(8)
            for (const std::int32_t v : values_) below += v <= middle ? 1 : 0;
            if (__reduce_add_sync(kFullWarp, below) > count_ / 2) {
                high = middle;
            } else {
                low = middle + 1;
            }
        }
        return low;
    }

    // Class after class, until raw bits alone cost as much as the best so far: they only become more.
    __device__ __forceinline__ unsigned cheapest(const CoderTables& tables, std::int32_t reference) const {
        std::uint32_t best = 0xffffffffu, found = 0;
        KVCAST_UNROLL(1)
        for (unsigned spread_class = 1; spread_class < kClasses; ++spread_class) {
            const ClassCoding c = class_coding(spread_class);
            const std::uint32_t raw = c.shift * 256 * count_;
            if (raw >= best) break;
            const std::int32_t half = (c.shift == 0 ? 0 : 1 << (c.shift - 1)) - reference;
            const std::uint16_t* costs = tables.cost[c.table];
            std::uint32_t own = 0;
            KVCAST_UNROLL(8)
            for (std::uint32_t g = 0; g < kGroups; ++g)
                if (inside(g)) own += __ldg(costs + symbol_of((values_[g] + half) >> c.shift));
            const std::uint32_t cost = raw + __reduce_add_sync(kFullWarp, own);
            if (cost < best) {
                best = cost;
                found = spread_class;
            }
        }
        return found;
    }

    std::uint32_t count_;
    std::int32_t values_[kGroups];
};

// The reference and the class with which value(i) costs least.
template <typename Value>
__device__ SideVector side_vector(const CoderTables& tables, std::uint32_t count, Value value) {
    const std::uint32_t all = uniform(count);
    const std::int32_t reference = reference_of(all, value);
    return {reference, cheapest_class(tables, all, value, reference)};
}

}  // namespace kvcast::kernels::cuda
