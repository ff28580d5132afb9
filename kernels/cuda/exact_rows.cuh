// Rows that are stored exactly: attention sinks, and what integers cannot hold. FORMAT.md, section 7.
#pragma once

#include "kernels/cuda/platform.cuh"
#include "kernels/cuda/warp_rans.cuh"

namespace kvcast::kernels::cuda {

// `rows` rows of one head: put(row, channel, bits). False, in all lanes, where a model is out of range.
template <typename Put>
__device__ __forceinline__ bool read_exact_rows(WarpReader& in, Dtype source, std::uint32_t rows,
                                                std::uint32_t channels, Put put) {
    bool fits = true;
    KVCAST_UNROLL(1)
    for (std::uint32_t t = 0; t < rows; ++t) {
        const std::uint32_t model = in.word();
        fits = fits && model < 4096 && (model & 255u) <= exponent_mask(source);
        in.floats(model & 255u, in.exponents_of(model >> 8 & 15u), source, channels,
                  [&](std::uint32_t c, std::uint32_t bits) { put(t, c, bits); });
    }
    return fits;
}

}  // namespace kvcast::kernels::cuda
