// Two numbers to a word, and states to values.
#pragma once

#include <cuda_runtime.h>

#include <bit>
#include <cstdint>

#include "kernels/cuda/tasks.h"
#include "kernels/math.h"

namespace kvcast::kernels::cuda {

// The low halves of both.
__device__ __forceinline__ std::uint32_t halves(std::int32_t low, std::int32_t high) {
    return __byte_perm(static_cast<std::uint32_t>(low), static_cast<std::uint32_t>(high), 0x5410);
}

// As integers of 16 bits.
__device__ __forceinline__ std::uint32_t saturated_halves(std::int32_t low, std::int32_t high) {
#ifdef KVCAST_SIMT
    return halves(saturate16(low), saturate16(high));
#else
    std::uint32_t word;
    asm("cvt.pack.sat.s16.s32 %0, %1, %2;" : "=r"(word) : "r"(high), "r"(low));
    return word;
#endif
}

// As bfloat16, nearest even; neither overflows, neither is NaN.
__device__ __forceinline__ std::uint32_t bf16_halves(float low, float high) {
#ifdef KVCAST_SIMT
    return halves(to_bf16(low), to_bf16(high));
#else
    std::uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
#endif
}

__device__ __forceinline__ std::int32_t low_half(std::uint32_t word) {
    return static_cast<std::int16_t>(word);
}
__device__ __forceinline__ std::int32_t high_half(std::uint32_t word) {
    return static_cast<std::int32_t>(word) >> 16;
}

// With this added, integers below 2^22 in magnitude are the bits of a float that is 1.5 * 2^23 too large.
inline constexpr std::int32_t kFloatBias = 0x4b400000;
__device__ __forceinline__ float biased_float(std::int32_t v) {
    return std::bit_cast<float>(v) - std::bit_cast<float>(kFloatBias);  // exact
}

// States that become bf16 or fp16.
template <Dtype To>
struct StateValues {
    float unit;

    __device__ explicit StateValues(Scale scale) : unit(unit_of(scale)) {}

    // Two of them, to a word. A state has 17 bits and the mantissa 8: the product is exact, as value_of's is,
    // and at most 2^127.
    __device__ __forceinline__ std::uint32_t operator()(std::int32_t low, std::int32_t high) const {
        return of_biased(low + kFloatBias, high + kFloatBias);
    }
    // The same of states with kFloatBias.
    __device__ __forceinline__ std::uint32_t of_biased(std::int32_t low, std::int32_t high) const {
        const float a = biased_float(low) * unit, b = biased_float(high) * unit;
        if constexpr (To == Dtype::kF16) return halves(to_f16(a), to_f16(b));
        return bf16_halves(a, b);
    }
};

// The same for bf16 and scales of up to 2^kMostFusedExponent, where a state's bias can be taken away after
// the multiplication, by an addition fused with it: both products have less than 24 bits, and so has the sum.
struct FusedStateValues {
    float unit;
    float bias;

    __device__ explicit FusedStateValues(Scale scale)
        : unit(unit_of(scale)), bias(-std::bit_cast<float>(kFloatBias) * unit) {}

    // Two states with kFloatBias.
    __device__ __forceinline__ std::uint32_t of_biased(std::int32_t low, std::int32_t high) const {
        return bf16_halves(__fmaf_rn(std::bit_cast<float>(low), unit, bias),
                           __fmaf_rn(std::bit_cast<float>(high), unit, bias));
    }
};

}  // namespace kvcast::kernels::cuda
