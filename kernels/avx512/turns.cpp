// Cosines and sines, by the same polynomials as sin_cos() in math.h, eight at a time: numbers of 32 bits in
// the lower halves of 64, where products have room.
#include <immintrin.h>

#include "kernels/avx512/slots.h"
#include "kernels/avx512/target.h"
#include "kernels/math.h"
#include "kernels/x86/lanes.h"

namespace kvcast::kernels::avx512 {
namespace {

constexpr std::size_t kStep = 8;

KVCAST_AVX512_INLINE __m512i number(std::int32_t value) {
    return _mm512_set1_epi64(static_cast<std::uint32_t>(value));
}

// a * b / 2^30, which fits 32 bits.
KVCAST_AVX512_INLINE __m512i product(__m512i a, __m512i b) {
    return _mm512_srli_epi64(_mm512_mul_epi32(a, b), 30);
}

// (highest v + next) v + ...
template <typename... Next>
KVCAST_AVX512_INLINE __m512i polynomial(__m512i v, std::int32_t highest, Next... next) {
    __m512i sum = number(highest);
    ((sum = _mm512_add_epi32(number(next), product(sum, v))), ...);
    return sum;
}

// To units of 2^-14.
KVCAST_AVX512_INLINE __m512i rounded(__m512i q30) {
    return _mm512_srai_epi32(_mm512_add_epi32(q30, number(1 << 15)), 16);
}

KVCAST_AVX512_INLINE __m512i negated(__m512i x, __mmask8 lanes) {
    return _mm512_mask_sub_epi32(x, static_cast<__mmask16>(_pdep_u32(lanes, 0x5555)), _mm512_setzero_si512(),
                                 x);
}

}  // namespace

KVCAST_AVX512 void turns(std::uint64_t first, std::uint64_t step, std::size_t count, std::int16_t* cos,
                         std::int16_t* sin) {
    const __m512i each = _mm512_set1_epi64(static_cast<std::int64_t>(step));
    __m512i phase = _mm512_add_epi64(_mm512_set1_epi64(static_cast<std::int64_t>(first)),
                                     _mm512_mullo_epi64(each, _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7)));
    const __m512i all = _mm512_set1_epi64(static_cast<std::int64_t>(step * kStep));
    for (std::size_t t = 0; t < count; t += kStep, phase = _mm512_add_epi64(phase, all)) {
        const __m512i turn = _mm512_srli_epi64(phase, 32);
        const __m512i quarter = _mm512_srli_epi32(_mm512_add_epi32(turn, number(1 << 29)), 30);
        const __m512i v = _mm512_slli_epi32(_mm512_sub_epi32(turn, _mm512_slli_epi32(quarter, 30)), 1);
        const __m512i v2 = product(v, v);
        const __m512i s = rounded(product(polynomial(v2, kSine7, kSine5, kSine3, kSine1), v));
        const __m512i c = rounded(polynomial(v2, kCosine8, kCosine6, kCosine4, kCosine2, kCosine0));
        const __mmask8 odd = _mm512_test_epi64_mask(quarter, _mm512_set1_epi64(1));
        const __mmask8 lower = _mm512_test_epi64_mask(quarter, _mm512_set1_epi64(2));
        const auto lanes = static_cast<__mmask8>(x86::first_lanes(count - t < kStep ? count - t : kStep));
        _mm512_mask_cvtepi64_storeu_epi16(
            cos + t, lanes, negated(_mm512_mask_mov_epi64(c, odd, s), static_cast<__mmask8>(odd ^ lower)));
        _mm512_mask_cvtepi64_storeu_epi16(sin + t, lanes, negated(_mm512_mask_mov_epi64(s, odd, c), lower));
    }
}

}  // namespace kvcast::kernels::avx512
