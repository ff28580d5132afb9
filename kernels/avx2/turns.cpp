// Cosines and sines, by the same polynomials as sin_cos() in math.h, four at a time: numbers of 32 bits in
// the lower halves of 64, where products have room.
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "kernels/avx2/slots.h"
#include "kernels/avx2/target.h"
#include "kernels/math.h"

namespace kvcast::kernels::avx2 {
namespace {

constexpr std::size_t kStep = 4;

KVCAST_AVX2_INLINE __m256i number(std::int32_t value) {
    return _mm256_set1_epi64x(static_cast<std::uint32_t>(value));
}

// a * b / 2^30, which fits 32 bits.
KVCAST_AVX2_INLINE __m256i product(__m256i a, __m256i b) {
    return _mm256_srli_epi64(_mm256_mul_epi32(a, b), 30);
}

// (highest v + next) v + ...
template <typename... Next>
KVCAST_AVX2_INLINE __m256i polynomial(__m256i v, std::int32_t highest, Next... next) {
    __m256i sum = number(highest);
    ((sum = _mm256_add_epi32(number(next), product(sum, v))), ...);
    return sum;
}

// To units of 2^-14.
KVCAST_AVX2_INLINE __m256i rounded(__m256i q30) {
    return _mm256_srai_epi32(_mm256_add_epi32(q30, number(1 << 15)), 16);
}

// All ones where that bit of x is set.
KVCAST_AVX2_INLINE __m256i where_bit(__m256i x, int bit) {
    return _mm256_srai_epi32(_mm256_slli_epi32(x, 31 - bit), 31);
}

KVCAST_AVX2_INLINE __m256i negated(__m256i x, __m256i where) {
    return _mm256_sub_epi32(_mm256_xor_si256(x, where), where);
}

// The lowest words of 64 bits each.
KVCAST_AVX2_INLINE void store_words(std::int16_t* to, __m256i x, std::size_t count) {
    const __m256i words =
        _mm256_shuffle_epi8(x, _mm256_set1_epi64x(static_cast<std::int64_t>(0x8080808009080100)));
    const __m128i four =
        _mm_unpacklo_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    const auto bits = static_cast<std::uint64_t>(_mm_cvtsi128_si64(four));
    std::memcpy(to, &bits, std::min(count, kStep) * sizeof *to);
}

}  // namespace

KVCAST_AVX2 void turns(std::uint64_t first, std::uint64_t step, std::size_t count, std::int16_t* cos,
                       std::int16_t* sin) {
    const auto at = [&](std::uint64_t i) { return static_cast<std::int64_t>(first + i * step); };
    __m256i phase = _mm256_setr_epi64x(at(0), at(1), at(2), at(3));
    const __m256i all = _mm256_set1_epi64x(static_cast<std::int64_t>(step * kStep));
    for (std::size_t t = 0; t < count; t += kStep, phase = _mm256_add_epi64(phase, all)) {
        const __m256i turn = _mm256_srli_epi64(phase, 32);
        const __m256i quarter = _mm256_srli_epi32(_mm256_add_epi32(turn, number(1 << 29)), 30);
        const __m256i v = _mm256_slli_epi32(_mm256_sub_epi32(turn, _mm256_slli_epi32(quarter, 30)), 1);
        const __m256i v2 = product(v, v);
        const __m256i s = rounded(product(polynomial(v2, kSine7, kSine5, kSine3, kSine1), v));
        const __m256i c = rounded(polynomial(v2, kCosine8, kCosine6, kCosine4, kCosine2, kCosine0));
        const __m256i odd = where_bit(quarter, 0), lower = where_bit(quarter, 1);
        store_words(cos + t, negated(_mm256_blendv_epi8(c, s, odd), _mm256_xor_si256(odd, lower)), count - t);
        store_words(sin + t, negated(_mm256_blendv_epi8(s, c, odd), lower), count - t);
    }
}

}  // namespace kvcast::kernels::avx2
