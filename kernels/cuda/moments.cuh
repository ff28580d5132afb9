// Sums over the values of a channel, by a warp.
#pragma once

#include "kernels/cuda/tile_values.cuh"
#include "kernels/cuda/warp_rans.cuh"

namespace kvcast::kernels::cuda {

// Of round_even(value(i) * scale), of magnitudes up to 2^22.
template <typename Value>
__device__ Moments moments_of(std::uint32_t count, float scale, Value value) {
    std::int64_t sum = 0, squares = 0;
    for (std::uint32_t i = lane_id(); i < count; i += kLanes) {
        const std::int64_t v = nearest_integer(value(i) * scale);
        sum += v;
        squares += v * v;
    }
    return {sum_of_lanes(sum), static_cast<std::uint64_t>(sum_of_lanes(squares))};
}

}  // namespace kvcast::kernels::cuda
