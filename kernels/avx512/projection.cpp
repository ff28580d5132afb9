// Projections with VNNI: 32 products of 16-bit integers and their sums in one instruction.
//
// A panel is one vector of a matrix: a pair of a token's features, broadcast, serves 16 outputs at once, and
// no sum crosses lanes. Four tokens share the panels of 64 outputs.
#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "kernels/avx512/slots.h"
#include "kernels/avx512/target.h"
#include "kernels/x86/lanes.h"

namespace kvcast::kernels::avx512 {
namespace {

constexpr std::size_t kLanes32 = 16;  // sums in a vector
constexpr std::size_t kPanels = 4;    // vectors of sums per token
constexpr std::size_t kTokens = 4;    // tokens that share a panel's loads

std::int32_t pair_at(const std::int16_t* features) {
    std::int32_t pair = 0;
    std::memcpy(&pair, features, sizeof pair);
    return pair;
}

// The last feature of an odd number of them, and nothing.
std::int32_t single_at(const std::int16_t* features) {
    return static_cast<std::uint16_t>(*features);
}

// sum + products of pairs. Not the intrinsic: GCC 12 copies its accumulator around.
KVCAST_AVX512_INLINE __m512i multiply_add(__m512i sum, __m512i a, __m512i b) {
    asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
}

// How many of `count` features are up to the last one that is not zero for all of some tokens, or one more:
// coefficients that a level leaves none of stand behind all others.
template <std::size_t Tokens>
KVCAST_AVX512_INLINE std::size_t leading(const std::int16_t* features, std::size_t stride,
                                         std::size_t count) {
    for (std::size_t end = count; end != 0;) {
        const std::size_t begin = (end - 1) / 32 * 32;
        const std::uint32_t lanes = x86::first_lanes(end - begin);
        __m512i any = _mm512_setzero_si512();
        KVCAST_UNROLL
        for (std::size_t t = 0; t < Tokens; ++t)
            any = _mm512_or_si512(any, _mm512_maskz_loadu_epi16(lanes, features + t * stride + begin));
        if (const std::uint32_t found = _mm512_test_epi16_mask(any, any); found != 0) {
            const std::size_t used = begin + 32 - static_cast<std::size_t>(std::countl_zero(found));
            return std::min(count, used + used % 2);
        }
        end = begin;
    }
    return 0;
}

template <std::size_t Vectors, std::size_t Tokens>
struct Sums {
    __m512i at[Tokens][Vectors];
};

// Adds the products of `count` inputs to the sums; `row` is panels from one row of them to the next.
template <std::size_t Vectors, std::size_t Tokens>
KVCAST_AVX512_INLINE void accumulate(const MatrixPanel* panels, std::size_t row, const std::int16_t* features,
                                     std::size_t stride, std::size_t count, Sums<Vectors, Tokens>& sums) {
    const std::size_t whole = count / 2;
    for (std::size_t pair = 0; pair < whole; ++pair) {
        __m512i column[Vectors];
        KVCAST_UNROLL
        for (std::size_t v = 0; v < Vectors; ++v) column[v] = _mm512_load_si512(panels + v * row + pair);
        KVCAST_UNROLL
        for (std::size_t t = 0; t < Tokens; ++t) {
            const __m512i f = _mm512_set1_epi32(pair_at(features + t * stride + 2 * pair));
            KVCAST_UNROLL
            for (std::size_t v = 0; v < Vectors; ++v)
                sums.at[t][v] = multiply_add(sums.at[t][v], column[v], f);
        }
    }
    if (count % 2 == 0) return;
    KVCAST_UNROLL
    for (std::size_t t = 0; t < Tokens; ++t) {
        const __m512i f = _mm512_set1_epi32(single_at(features + t * stride + 2 * whole));
        KVCAST_UNROLL
        for (std::size_t v = 0; v < Vectors; ++v)
            sums.at[t][v] = multiply_add(sums.at[t][v], _mm512_load_si512(panels + v * row + whole), f);
    }
}

// Multiplies, rounds, shifts and adds one token's sums of 16 outputs from `output` on.
KVCAST_AVX512_INLINE void add(const Projection& p, std::size_t token, std::size_t output, __m512i sum) {
    if (p.multiplier != 1) sum = _mm512_mullo_epi32(sum, _mm512_set1_epi32(p.multiplier));
    const std::size_t outputs = std::min(kLanes32, p.outputs - output);
    const auto mask = static_cast<__mmask16>((1u << outputs) - 1);
    const __m512i shift = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, p.shifts + output));
    const __m512i half =
        _mm512_sllv_epi32(_mm512_set1_epi32(1), _mm512_sub_epi32(shift, _mm512_set1_epi32(1)));
    std::int32_t* out = p.sums + token * p.sum_stride + output;
    const __m512i shifted = _mm512_srav_epi32(_mm512_add_epi32(sum, half), shift);
    _mm512_mask_storeu_epi32(out, mask, _mm512_add_epi32(_mm512_maskz_loadu_epi32(mask, out), shifted));
}

template <std::size_t Vectors, std::size_t Tokens>
KVCAST_AVX512_INLINE void project_tile(const Projection& p, std::size_t token, std::size_t output) {
    Sums<Vectors, Tokens> sums;
    KVCAST_UNROLL
    for (std::size_t t = 0; t < Tokens; ++t) {
        KVCAST_UNROLL
        for (std::size_t v = 0; v < Vectors; ++v) sums.at[t][v] = _mm512_setzero_si512();
    }
    const std::size_t row = (p.inputs + 1) / 2;
    const std::int16_t* features = p.features + token * p.feature_stride;
    accumulate<Vectors, Tokens>(p.panels + output / kLanes32 * row, row, features, p.feature_stride,
                                leading<Tokens>(features, p.feature_stride, p.inputs), sums);
    KVCAST_UNROLL
    for (std::size_t t = 0; t < Tokens; ++t) {
        KVCAST_UNROLL
        for (std::size_t v = 0; v < Vectors; ++v) add(p, token + t, output + v * kLanes32, sums.at[t][v]);
    }
}

template <std::size_t Vectors>
KVCAST_AVX512 void project_outputs(const Projection& p, std::size_t output) {
    std::size_t t = 0;
    for (; t + kTokens <= p.tokens; t += kTokens) project_tile<Vectors, kTokens>(p, t, output);
    for (; t < p.tokens; ++t) project_tile<Vectors, 1>(p, t, output);
}

}  // namespace

void project(const Projection& p) {
    for (std::size_t output = 0; output < p.outputs; output += kPanels * kLanes32) {
        switch ((std::min(p.outputs - output, kPanels * kLanes32) + kLanes32 - 1) / kLanes32) {
            case 1:
                project_outputs<1>(p, output);
                break;
            case 2:
                project_outputs<2>(p, output);
                break;
            case 3:
                project_outputs<3>(p, output);
                break;
            default:
                project_outputs<4>(p, output);
        }
    }
}

}  // namespace kvcast::kernels::avx512
