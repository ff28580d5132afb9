// Rows that are stored exactly: attention sinks, and what integers cannot hold. FORMAT.md, section 7.
#pragma once

#include "kernels/cuda/platform.cuh"
#include "kernels/cuda/warp_rans.cuh"

namespace kvcast::kernels::cuda {

// put(index, bits) for `count` elements of a model: four groups at a time where raw bits fit a byte.
template <typename Put>
__device__ __forceinline__ void read_elements(WarpReader& in, const BitTransposer& transposed,
                                              std::uint32_t center, std::uint32_t table, Dtype source,
                                              std::uint32_t count, Put put) {
    const StepCoding coding = {in.exponents_of(table), mantissa_bits(source) + 1};
    if (coding.planes > WarpReader::kBytePlanes) {
        in.floats(center, coding.table, source, count, put);
        return;
    }
    KVCAST_UNROLL(1)
    for (std::uint32_t first = 0; first < count; first += 4 * kLanes) {
        std::int32_t escapes[4] = {};
        std::uint32_t escaped = 0;
        const auto escape = [&](unsigned g, std::int32_t value) { escapes[g] = value; };
        const std::uint32_t left = count - first;
        const WarpReader::CodedQuad quad =
            left > 3 * kLanes
                ? in.coded_quad_but_last<true>(coding, lesser(left - 3 * kLanes, kLanes), escape, escaped)
                : in.coded_quad(coding, left, escape, escaped);
        const std::uint32_t raw = transposed(quad.planes);
        KVCAST_UNROLL(4)
        for (unsigned g = 0; g < 4; ++g) {
            const std::uint32_t i = first + g * kLanes + lane_id();
            const std::int32_t high = WarpReader::high_of(WarpReader::symbol_of(quad.symbols, g), escapes[g]);
            if (i < count) put(i, WarpReader::element(center, source, high, raw >> 8 * g & 255u));
        }
        __syncwarp();
    }
}

// `rows` rows of one head: put(row, channel, bits). False, in all lanes, where a model is out of range.
template <typename Put>
__device__ __forceinline__ bool read_exact_rows(WarpReader& in, Dtype source, std::uint32_t rows,
                                                std::uint32_t channels, Put put) {
    const BitTransposer transposed;
    bool fits = true;
    KVCAST_UNROLL(1)
    for (std::uint32_t t = 0; t < rows; ++t) {
        const std::uint32_t model = in.word();
        fits = fits && model < 4096 && (model & 255u) <= exponent_mask(source);
        read_elements(in, transposed, model & 255u, model >> 8 & 15u, source, channels,
                      [&](std::uint32_t c, std::uint32_t bits) { put(t, c, bits); });
    }
    return fits;
}

}  // namespace kvcast::kernels::cuda
