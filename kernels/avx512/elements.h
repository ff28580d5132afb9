// States to elements of a type, in registers. 32 states of 16 bits are unpacked to two vectors of 32: within
// each 128-bit lane its first four, and its last four. That order is put straight on the way to elements.
#pragma once

#include <immintrin.h>

#include "kernels/avx512/target.h"
#include "kernels/math.h"

namespace kvcast::kernels::avx512 {

KVCAST_AVX512_INLINE __m512i low_states(__m512i states) {
    return _mm512_srai_epi32(_mm512_unpacklo_epi16(states, states), 16);
}
KVCAST_AVX512_INLINE __m512i high_states(__m512i states) {
    return _mm512_srai_epi32(_mm512_unpackhi_epi16(states, states), 16);
}

// Values of an element type, in the low bits of 32. States times a scale are exact, and neither infinite, NaN
// nor subnormal.
KVCAST_AVX512_INLINE __m512 values_of(__m512i states, __m512 scale) {
    return _mm512_mul_ps(_mm512_cvtepi32_ps(states), scale);
}

// Rounded to bfloat16 in the high half of each lane: 0x7fff is added, and one more where the half is odd.
KVCAST_AVX512_INLINE __m512i rounded_bf16(__m512 value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i parts =
        _mm512_ternarylogic_epi32(bits, _mm512_set1_epi32(0x10000), _mm512_set1_epi32(0x7fff), 0xea);
    return _mm512_dpwssd_epi32(bits, parts, _mm512_set1_epi16(1));
}

KVCAST_AVX512_INLINE __m512i rounded_f16(__m512 value) {
    const __m512 most = _mm512_set1_ps(65504.0f);
    const __m512 inside = _mm512_max_ps(_mm512_min_ps(value, most), _mm512_sub_ps(_mm512_setzero_ps(), most));
    return _mm512_cvtepu16_epi32(_mm512_cvtps_ph(inside, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

struct Floats {
    __m512 first;
    __m512 second;
};

KVCAST_AVX512_INLINE Floats floats_of(__m512i low, __m512i high, __m512 scale) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    const __m512 a = values_of(low, scale), b = values_of(high, scale);
    return {_mm512_permutex2var_ps(a, first, b), _mm512_permutex2var_ps(a, second, b)};
}

// Values as elements of 16 bits, by turns.
template <Dtype D>
KVCAST_AVX512_INLINE __m512i paired(__m512 even, __m512 odd) {
    if constexpr (D == Dtype::kF16)
        return _mm512_or_si512(rounded_f16(even), _mm512_slli_epi32(rounded_f16(odd), 16));
    const __m512i upper =
        _mm512_broadcast_i32x4(_mm_setr_epi8(2, 3, 0, 0, 6, 7, 0, 0, 10, 11, 0, 0, 14, 15, 0, 0));
    return _mm512_mask_shuffle_epi8(rounded_bf16(odd), 0x3333333333333333, rounded_bf16(even), upper);
}

// States, given in the order that unpacking leaves, as elements of 16 bits in order.
template <Dtype D>
KVCAST_AVX512_INLINE __m512i elements16(__m512i low, __m512i high, __m512 scale) {
    const __m512i ordered =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
    return _mm512_shuffle_epi8(paired<D>(values_of(low, scale), values_of(high, scale)), ordered);
}

// x * f + y * g in units of 2^kTrigBits, of 16-bit integers that were unpacked to pairs.
KVCAST_AVX512_INLINE __m512i turned(__m512i pair, __m512i factors) {
    const __m512i half = _mm512_set1_epi32(1 << (kTrigBits - 1));
    return _mm512_srai_epi32(_mm512_dpwssd_epi32(half, pair, factors), kTrigBits);
}

// ---- and back: pairs of channels turned backwards ----

KVCAST_AVX512_INLINE __m512 load_trig(const std::int16_t* v, __mmask16 lanes) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_maskz_loadu_epi16(lanes, v)));
}

struct Turned {
    __m512 first;
    __m512 second;
};

// Products first, not fused.
KVCAST_AVX512_INLINE Turned unrotated(__m512 x, __m512 y, __m512 cos, __m512 sin) {
    const __m512 unit = _mm512_set1_ps(1.0f / (1 << kTrigBits));
    const __m512 first = _mm512_add_ps(_mm512_mul_ps(x, cos), _mm512_mul_ps(y, sin));
    const __m512 second = _mm512_sub_ps(_mm512_mul_ps(y, cos), _mm512_mul_ps(x, sin));
    return {_mm512_mul_ps(first, unit), _mm512_mul_ps(second, unit)};
}

}  // namespace kvcast::kernels::avx512
