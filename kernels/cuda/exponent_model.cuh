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
    by_lanes(exponents, [&](std::uint32_t e) { counts[e] = 0; });
    by_lanes(count, [&](std::uint32_t i) {
        atomicAdd(counts + (bits(i) >> mantissa_bits(dtype) & exponent_mask(dtype)), 1u);
    });
    std::uint64_t mode = 0;  // count, then the lower exponent first
    by_lanes(exponents, [&](std::uint32_t e) {
        const std::uint64_t key = std::uint64_t{counts[e]} << 8 | (255 - e);
        mode = key > mode ? key : mode;
    });
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

// The same for up to a batch of bf16 in registers, channel after channel: all lanes try a table, under two
// centers at once and then under the third, in numbers of 32 bits.
class ShortModeller {
  public:
    // One entry per exponent, and zeros on both sides, so that windows need no limits.
    static constexpr std::uint32_t kMargin = 8;
    struct alignas(16) Counts {
        std::uint32_t of[kMargin + 256 + kMargin];
    };

    // `counts` is the warp's own, in shared memory.
    __device__ __forceinline__ ShortModeller(const CoderTables& tables, Counts& counts) : counts_(counts.of) {
        const auto* own =
            reinterpret_cast<const uint4*>(tables.cost[kFirstExponentTable + lane_id() % kModels]);
        const uint4 low = __ldg(own), high = __ldg(own + 1);
        const std::uint32_t pairs[] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        KVCAST_UNROLL(8)
        for (unsigned i = 0; i < kSymbols / 2; ++i) costs_[i] = pairs[i];
    }

    // exponents[g], where inside(g), are a lane's.
    template <typename Inside>
    __device__ __forceinline__ ExponentModel operator()(const std::uint32_t (&exponents)[kBatchGroups],
                                                        std::uint32_t count, Inside inside) const {
        count_all(exponents, inside);
        const std::uint32_t middle = most_frequent();
        const std::uint32_t below = lane_id() / kModels;  // centers middle - 1 and middle
        std::uint32_t best = key(middle - 1 + below, below, count);
        const std::uint32_t above = key(middle + 1, 2, count);
        best = __reduce_min_sync(kFullWarp, above < best ? above : best);
        __syncwarp();  // counts may be used again
        return {middle + (best >> 4 & 3u) - 1, best & 15u};
    }

  private:
    static constexpr std::uint32_t kModels = 16;

    template <typename Inside>
    __device__ __forceinline__ void count_all(const std::uint32_t (&exponents)[kBatchGroups],
                                              Inside inside) const {
        constexpr std::uint32_t pieces = sizeof(Counts) / sizeof(uint4);
        KVCAST_UNROLL(3)
        for (std::uint32_t i = 0; i < pieces; i += kLanes)
            if (i + lane_id() < pieces) reinterpret_cast<uint4*>(counts_)[i + lane_id()] = {0, 0, 0, 0};
        __syncwarp();
        KVCAST_UNROLL(8)
        for (std::uint32_t g = 0; g < kBatchGroups; ++g)
            if (inside(g)) atomicAdd(counts_ + kMargin + exponents[g], 1u);
        __syncwarp();
    }

    // The first of them.
    __device__ __forceinline__ std::uint32_t most_frequent() const {
        std::uint32_t mode = 0;  // count, then the lower exponent first
        KVCAST_UNROLL(8)
        for (std::uint32_t i = 0; i < 8; ++i) {
            const std::uint32_t e = i * kLanes + lane_id(), own = counts_[kMargin + e] << 8 | (255 - e);
            mode = own > mode ? own : mode;
        }
        return 255 - (__reduce_max_sync(kFullWarp, mode) & 255u);
    }

    // What the lane's table costs under a center, then the center's place, then the table.
    __device__ __forceinline__ std::uint32_t key(std::uint32_t center, std::uint32_t place,
                                                 std::uint32_t count) const {
        if (center > 255) return ~0u;
        const std::uint32_t* const window = counts_ + kMargin + center + kSymbolZero;  // of symbol 0
        std::uint32_t cost = 0, escapes = count;
        KVCAST_UNROLL(15)
        for (std::uint32_t symbol = 0; symbol < kEscape; ++symbol) {
            const std::uint32_t n = *(window - symbol);
            cost += n * cost_of(symbol);
            escapes -= n;
        }
        cost += escapes * cost_of(kEscape);
        return cost << 6 | place << 4 | lane_id() % kModels;
    }

    __device__ __forceinline__ std::uint32_t cost_of(std::uint32_t symbol) const {
        return costs_[symbol / 2] >> 16 * (symbol % 2) & 0xffffu;
    }

    std::uint32_t* counts_;
    std::uint32_t costs_[kSymbols / 2];  // of the lane's table, two a word
};

}  // namespace kvcast::kernels::cuda
