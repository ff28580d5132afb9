// Projections with VNNI: 32 products of 16-bit integers and their sums in one instruction.
//
// A panel is one vector of a matrix: a pair of a token's features, broadcast, serves 16 outputs at once, and
// no sum crosses lanes. Four tokens share the panels of 64 outputs.
#include <immintrin.h>

#include <algorithm>
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
    accumulate<Vectors, Tokens>(p.panels + output / kLanes32 * row, row,
                                p.features + token * p.feature_stride, p.feature_stride, p.inputs, sums);
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

// Two columns whose features are not zero, interleaved, are a panel of one pair. Sums of 32 outputs lie in
// two vectors in the order that unpacking gives, and are put straight at the end.
KVCAST_AVX512 void project_sparse(const Projection& p) {
    constexpr std::size_t kOutputs = 192;  // sums held at once, in 12 registers
    constexpr std::size_t kGroups = kOutputs / 32;
    const __m512i low_half = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i high_half = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    for (std::size_t begin = 0; begin < p.outputs; begin += kOutputs) {
        const std::size_t outputs = std::min(kOutputs, p.outputs - begin);
        __mmask32 masks[kGroups];
        for (std::size_t g = 0; g < kGroups; ++g) {
            const std::size_t there = outputs > 32 * g ? std::min<std::size_t>(outputs - 32 * g, 32) : 0;
            masks[g] = static_cast<__mmask32>((std::uint64_t{1} << there) - 1);
        }
        for (std::size_t t = 0; t < p.tokens; ++t) {
            const std::int16_t* features = p.features + t * p.feature_stride;
            __m512i low[kGroups], high[kGroups];
            for (std::size_t g = 0; g < kGroups; ++g) low[g] = high[g] = _mm512_setzero_si512();
            std::size_t i = 0;
            const auto next = [&] {
                while (i < p.inputs && features[i] == 0) ++i;
                return i;
            };
            while (next() < p.inputs) {
                const std::size_t first = i++;
                const std::size_t second = next() < p.inputs ? i++ : first;
                const auto f = static_cast<std::uint16_t>(features[first]);
                const auto g2 = static_cast<std::uint16_t>(second == first ? 0 : features[second]);
                const __m512i pair =
                    _mm512_set1_epi32(static_cast<std::int32_t>(f | std::uint32_t{g2} << 16));
                const std::int16_t* a = p.matrix + first * p.outputs + begin;
                const std::int16_t* b = p.matrix + second * p.outputs + begin;
                for (std::size_t g = 0; g < kGroups; ++g) {
                    const __m512i x = _mm512_maskz_loadu_epi16(masks[g], a + 32 * g);
                    const __m512i y = _mm512_maskz_loadu_epi16(masks[g], b + 32 * g);
                    low[g] = _mm512_dpwssd_epi32(low[g], _mm512_unpacklo_epi16(x, y), pair);
                    high[g] = _mm512_dpwssd_epi32(high[g], _mm512_unpackhi_epi16(x, y), pair);
                }
            }
            for (std::size_t g = 0; 32 * g < outputs; ++g) {
                const std::size_t output = begin + 32 * g;
                add(p, t, output, _mm512_permutex2var_epi32(low[g], low_half, high[g]));
                if (output + kLanes32 < p.outputs)
                    add(p, t, output + kLanes32, _mm512_permutex2var_epi32(low[g], high_half, high[g]));
            }
        }
    }
}

}  // namespace kvcast::kernels::avx512
