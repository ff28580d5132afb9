// Projections with pmaddwd: 16 products of 16-bit integers, added in pairs, in one instruction.
//
// A pair is two vectors of a matrix, by which two of a token's features, broadcast, are multiplied.
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "kernels/avx2/slots.h"
#include "kernels/avx2/target.h"
#include "kernels/x86/lanes.h"

namespace kvcast::kernels::avx2 {
namespace {

constexpr std::size_t kLanes32 = 8;  // sums in a vector
constexpr std::size_t kVectors = 2;  // of sums per token
constexpr std::size_t kTokens = 4;   // tokens that share a pair's loads: 8 of the 16 registers are sums

std::int32_t pair_at(const std::int16_t* features) {
    std::int32_t pair = 0;
    std::memcpy(&pair, features, sizeof pair);
    return pair;
}

KVCAST_AVX2_INLINE __m256i multiply_add(__m256i sum, __m256i a, __m256i b) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
}

// Multiplies, rounds, shifts and adds one token's sums of up to 8 outputs from `output` on.
KVCAST_AVX2_INLINE void add(const Projection& p, std::size_t token, std::size_t output, __m256i sum) {
    if (p.multiplier != 1) sum = _mm256_mullo_epi32(sum, _mm256_set1_epi32(p.multiplier));
    std::int32_t* out = p.sums + token * p.sum_stride + output;
    const std::uint8_t* shifts = p.shifts + output;
    if (output + kLanes32 <= p.outputs) {
        const __m256i shift = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(shifts)));
        const __m256i one = _mm256_set1_epi32(1);
        const __m256i half = _mm256_sllv_epi32(one, _mm256_sub_epi32(shift, one));
        const __m256i shifted = _mm256_srav_epi32(_mm256_add_epi32(sum, half), shift);
        auto* at = reinterpret_cast<__m256i*>(out);
        _mm256_storeu_si256(at, _mm256_add_epi32(_mm256_loadu_si256(at), shifted));
        return;
    }
    alignas(32) std::int32_t sums[kLanes32];
    _mm256_store_si256(reinterpret_cast<__m256i*>(sums), sum);
    for (std::size_t o = 0; output + o < p.outputs; ++o) out[o] += shifted_sum(sums[o], shifts[o]);
}

// How many of `count` features are up to the last one that is not zero for all of some tokens, and a few
// more: see the AVX-512 backend.
template <std::size_t Tokens>
KVCAST_AVX2_INLINE std::size_t leading(const std::int16_t* features, std::size_t stride, std::size_t count) {
    constexpr std::size_t kStep = 16;
    std::size_t used = count;
    if (count % kStep != 0) {
        for (std::size_t t = 0; t < Tokens; ++t) {
            const std::int16_t* row = features + t * stride;
            if (std::any_of(row + count / kStep * kStep, row + count, [](std::int16_t f) { return f != 0; }))
                return count;
        }
        used -= count % kStep;
    }
    for (; used != 0; used -= kStep) {
        __m256i any = _mm256_setzero_si256();
        KVCAST_UNROLL
        for (std::size_t t = 0; t < Tokens; ++t) {
            const auto* at = reinterpret_cast<const __m256i*>(features + t * stride + used - kStep);
            any = _mm256_or_si256(any, _mm256_loadu_si256(at));
        }
        if (_mm256_testz_si256(any, any) == 0) break;
    }
    return used;
}

template <std::size_t Tokens>
struct Sums {
    __m256i at[Tokens][kVectors];
};

// Adds the products of one pair of inputs; Single: of the last of an odd number.
template <std::size_t Tokens, bool Single>
KVCAST_AVX2_INLINE void accumulate(const MatrixPair& matrix, const std::int16_t* features, std::size_t stride,
                                   Sums<Tokens>& sums) {
    const auto* column = reinterpret_cast<const __m256i*>(matrix.lanes);
    const __m256i first = _mm256_load_si256(column), second = _mm256_load_si256(column + 1);
    KVCAST_UNROLL
    for (std::size_t t = 0; t < Tokens; ++t) {
        const std::int16_t* at = features + t * stride;
        const __m256i f =
            _mm256_set1_epi32(Single ? std::int32_t{static_cast<std::uint16_t>(*at)} : pair_at(at));
        sums.at[t][0] = multiply_add(sums.at[t][0], first, f);
        sums.at[t][1] = multiply_add(sums.at[t][1], second, f);
    }
}

template <std::size_t Tokens>
KVCAST_AVX2 void project_tile(const Projection& p, std::size_t token, std::size_t output) {
    const std::int16_t* features = p.features + token * p.feature_stride;
    const MatrixPair* pairs = p.packed->pairs.data() + output / (kVectors * kLanes32) * ((p.inputs + 1) / 2);
    Sums<Tokens> sums;
    KVCAST_UNROLL
    for (std::size_t t = 0; t < Tokens; ++t) sums.at[t][0] = sums.at[t][1] = _mm256_setzero_si256();
    const std::size_t inputs = leading<Tokens>(features, p.feature_stride, p.inputs);
    for (std::size_t pair = 0; pair < inputs / 2; ++pair)
        accumulate<Tokens, false>(pairs[pair], features + 2 * pair, p.feature_stride, sums);
    if (inputs % 2 != 0)
        accumulate<Tokens, true>(pairs[inputs / 2], features + inputs - 1, p.feature_stride, sums);
    KVCAST_UNROLL
    for (std::size_t t = 0; t < Tokens; ++t) {
        add(p, token + t, output, sums.at[t][0]);
        if (output + kLanes32 < p.outputs) add(p, token + t, output + kLanes32, sums.at[t][1]);
    }
}

}  // namespace

KVCAST_AVX2 void project(const Projection& p) {
    for (std::size_t output = 0; output < p.outputs; output += kVectors * kLanes32) {
        std::size_t t = 0;
        for (; t + kTokens <= p.tokens; t += kTokens) project_tile<kTokens>(p, t, output);
        for (; t < p.tokens; ++t) project_tile<1>(p, t, output);
    }
}

}  // namespace kvcast::kernels::avx2
