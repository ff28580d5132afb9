// How exactly stored elements are modelled: the CPU encoder's choice (codec/entropy/model.h), by a warp.
#pragma once

#include "kernels/cuda/encode_tasks.h"
#include "kernels/cuda/warp_rans.cuh"

namespace kvcast::kernels::cuda {

struct ExponentModel {
    std::uint32_t center;
    std::uint32_t table;
};

// The first of the cheapest models for elements bits(i): tables 0..15, centers next to the most frequent
// exponent (the first of those). `counts` is shared memory, one entry per exponent value.
template <typename Bits>
__device__ ExponentModel exponent_model(const CoderTables& tables, Dtype dtype, std::uint32_t count,
                                        std::uint32_t* counts, Bits bits) {
    const std::uint32_t exponents = exponent_mask(dtype) + 1;
    for (std::uint32_t e = lane_id(); e < exponents; e += kLanes) counts[e] = 0;
    __syncwarp();
    for (std::uint32_t i = lane_id(); i < count; i += kLanes)
        atomicAdd(counts + (bits(i) >> mantissa_bits(dtype) & exponent_mask(dtype)), 1u);
    __syncwarp();
    std::uint64_t mode = 0;  // count, then the lower exponent first
    for (std::uint32_t e = lane_id(); e < exponents; e += kLanes) {
        const std::uint64_t key = std::uint64_t{counts[e]} << 8 | (255 - e);
        mode = key > mode ? key : mode;
    }
    for (int step = 16; step > 0; step /= 2) {
        const std::uint64_t other = __shfl_xor_sync(kFullWarp, mode, step);
        mode = other > mode ? other : mode;
    }
    const auto middle = static_cast<std::int32_t>(255 - (mode & 255));
    // Lanes 0..15 try the tables.
    std::uint64_t best = ~std::uint64_t{0};
    for (std::int32_t offset = -1; offset <= 1; ++offset) {
        const std::int32_t center = middle + offset;
        if (center < 0 || center >= static_cast<std::int32_t>(exponents) || lane_id() >= 16) continue;
        const std::uint16_t(&costs)[kSymbols] = tables.cost[kFirstExponentTable + lane_id()];
        std::uint64_t cost = 0;
        std::uint32_t escapes = count;
        for (std::uint32_t symbol = 0; symbol < kEscape; ++symbol) {
            const std::int32_t e = center - (static_cast<std::int32_t>(symbol) - kSymbolZero);
            if (e < 0 || e >= static_cast<std::int32_t>(exponents)) continue;
            cost += std::uint64_t{counts[e]} * costs[symbol];
            escapes -= counts[e];
        }
        cost += std::uint64_t{escapes} * costs[kEscape];
        const std::uint64_t key = cost << 6 | static_cast<std::uint64_t>(offset + 1) << 4 | lane_id();
        best = key < best ? key : best;
    }
    for (int step = 16; step > 0; step /= 2) {
        const std::uint64_t other = __shfl_xor_sync(kFullWarp, best, step);
        best = other < best ? other : best;
    }
    __syncwarp();  // counts may be used again
    return {static_cast<std::uint32_t>(middle + static_cast<std::int32_t>(best >> 4 & 3) - 1),
            static_cast<std::uint32_t>(best & 15)};
}

}  // namespace kvcast::kernels::cuda
