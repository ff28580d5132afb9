// States to elements of 16 bits, in registers; see kernels/avx512/elements.h.
#pragma once

#include <immintrin.h>

#include "kernels/avx2/target.h"
#include "kernels/avx2/vectors.h"
#include "kernels/math.h"

namespace kvcast::kernels::avx2 {

KVCAST_AVX2_INLINE __m256i low_states(__m256i states) {
    return _mm256_srai_epi32(_mm256_unpacklo_epi16(states, states), 16);
}
KVCAST_AVX2_INLINE __m256i high_states(__m256i states) {
    return _mm256_srai_epi32(_mm256_unpackhi_epi16(states, states), 16);
}

KVCAST_AVX2_INLINE __m256i rounded_bf16(__m256 value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    return _mm256_srli_epi32(rounded, 16);
}

KVCAST_AVX2_INLINE __m256i rounded_f16(__m256 value) {
    const __m256 most = _mm256_set1_ps(65504.0f);
    const __m256 inside = _mm256_max_ps(_mm256_min_ps(value, most), _mm256_sub_ps(_mm256_setzero_ps(), most));
    return _mm256_cvtepu16_epi32(_mm256_cvtps_ph(inside, _MM_FROUND_TO_NEAREST_INT));
}

template <Dtype D>
KVCAST_AVX2_INLINE __m256i elements_of(__m256i states, __m256 scale) {
    const __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(states), scale);
    if constexpr (D == Dtype::kF16) return rounded_f16(value);
    return rounded_bf16(value);
}

// 16 states, given in the order that unpacking leaves.
template <Dtype D>
KVCAST_AVX2_INLINE __m256i elements16(__m256i low, __m256i high, __m256 scale) {
    return _mm256_packus_epi32(elements_of<D>(low, scale), elements_of<D>(high, scale));
}

// x * f + y * g in units of 2^kTrigBits, of 16-bit integers that were unpacked to pairs.
KVCAST_AVX2_INLINE __m256i turned(__m256i pair, __m256i factors) {
    const __m256i half = _mm256_set1_epi32(1 << (kTrigBits - 1));
    return _mm256_srai_epi32(_mm256_add_epi32(_mm256_madd_epi16(pair, factors), half), kTrigBits);
}

// ---- and back: pairs of channels turned backwards ----

KVCAST_AVX2_INLINE __m256 as_floats(const std::int16_t* v) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(v))));
}

struct Turned {
    __m256 first;
    __m256 second;
};

// Products first, not fused.
KVCAST_AVX2_INLINE Turned unrotated(__m256 x, __m256 y, __m256 cos, __m256 sin) {
    const __m256 unit = _mm256_set1_ps(1.0f / (1 << kTrigBits));
    const __m256 first = _mm256_add_ps(_mm256_mul_ps(x, cos), _mm256_mul_ps(y, sin));
    const __m256 second = _mm256_sub_ps(_mm256_mul_ps(y, cos), _mm256_mul_ps(x, sin));
    return {_mm256_mul_ps(first, unit), _mm256_mul_ps(second, unit)};
}

}  // namespace kvcast::kernels::avx2
