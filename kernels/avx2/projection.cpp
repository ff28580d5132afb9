// Projections with pmaddwd: 16 products of 16-bit integers, added in pairs, in one instruction.
//
// As with AVX-512, a matrix is turned into panels of input pairs, 16 outputs at a time: lane o of the vector
// of pair i holds (matrix[o][2i], matrix[o][2i + 1]), and a pair of a token's features is broadcast.
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "kernels/avx2/slots.h"
#include "kernels/avx2/target.h"

namespace kvcast::kernels::avx2 {
namespace {

constexpr std::size_t kLanes32 = 8;       // sums in a vector
constexpr std::size_t kPanels = 2;        // vectors of sums per token
constexpr std::size_t kTokens = 4;        // tokens that share a panel's loads: 8 of the 16 registers are sums
constexpr std::size_t kMostPairs = 1024;  // of inputs: 64 KiB of panels

struct Panels {
    alignas(32) std::int32_t pairs[kMostPairs][kPanels][kLanes32];
};

std::int32_t pair_at(const std::int16_t* features) {
    std::int32_t pair = 0;
    std::memcpy(&pair, features, sizeof pair);
    return pair;
}

void fill(const Projection& p, std::size_t output, Panels& out) {
    const std::size_t pairs = (p.inputs + 1) / 2;
    for (std::size_t i = 0; i < pairs; ++i) {
        for (std::size_t lane = 0; lane < kPanels * kLanes32; ++lane) {
            const std::size_t o = output + lane;
            std::int32_t pair = 0;
            if (o < p.outputs) {
                const std::int16_t* at = p.matrix + o * p.inputs + 2 * i;
                pair = 2 * i + 1 < p.inputs ? pair_at(at) : static_cast<std::uint16_t>(*at);
            }
            out.pairs[i][lane / kLanes32][lane % kLanes32] = pair;
        }
    }
}

KVCAST_AVX2_INLINE __m256i multiply_add(__m256i sum, __m256i a, __m256i b) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
}

// Rounds, shifts and adds one token's sums of up to 8 outputs from `output` on.
KVCAST_AVX2_INLINE void add(const Projection& p, std::size_t token, std::size_t output, __m256i sum) {
    alignas(32) std::int32_t sums[kLanes32];
    _mm256_store_si256(reinterpret_cast<__m256i*>(sums), sum);
    const std::size_t outputs = std::min(kLanes32, p.outputs - output);
    std::int32_t* out = p.sums + token * p.sum_stride + output;
    for (std::size_t o = 0; o < outputs; ++o) {
        const unsigned shift = p.shifts[output + o];
        out[o] += (sums[o] + (1 << (shift - 1))) >> shift;
    }
}

template <std::size_t Tokens>
struct Sums {
    __m256i at[Tokens][kPanels];
};

// Adds the products of one pair of inputs; Single: of the last of an odd number.
template <std::size_t Tokens, bool Single>
KVCAST_AVX2_INLINE void accumulate(const Panels& panels, std::size_t pair, const std::int16_t* features,
                                   std::size_t stride, Sums<Tokens>& sums) {
    const auto* column = reinterpret_cast<const __m256i*>(panels.pairs[pair]);
    const __m256i first = _mm256_load_si256(column), second = _mm256_load_si256(column + 1);
    for (std::size_t t = 0; t < Tokens; ++t) {
        const std::int16_t* at = features + t * stride + 2 * pair;
        const __m256i f =
            _mm256_set1_epi32(Single ? std::int32_t{static_cast<std::uint16_t>(*at)} : pair_at(at));
        sums.at[t][0] = multiply_add(sums.at[t][0], first, f);
        sums.at[t][1] = multiply_add(sums.at[t][1], second, f);
    }
}

template <std::size_t Tokens>
KVCAST_AVX2 void project_tile(const Projection& p, const Panels& panels, std::size_t token,
                              std::size_t output) {
    const std::int16_t* features = p.features + token * p.feature_stride;
    Sums<Tokens> sums;
    for (auto& row : sums.at) row[0] = row[1] = _mm256_setzero_si256();
    for (std::size_t pair = 0; pair < p.inputs / 2; ++pair)
        accumulate<Tokens, false>(panels, pair, features, p.feature_stride, sums);
    if (p.inputs % 2 != 0) accumulate<Tokens, true>(panels, p.inputs / 2, features, p.feature_stride, sums);
    for (std::size_t t = 0; t < Tokens; ++t) {
        add(p, token + t, output, sums.at[t][0]);
        if (output + kLanes32 < p.outputs) add(p, token + t, output + kLanes32, sums.at[t][1]);
    }
}

// Outputs of one token from `begin` on, fewer than 64, of a matrix by columns.
KVCAST_AVX2 void add_rest(const Projection& p, std::size_t token, std::size_t begin) {
    std::int32_t sums[64] = {};
    const std::size_t outputs = p.outputs - begin;
    for (std::size_t i = 0; i < p.inputs; ++i) {
        const std::int16_t f = p.features[token * p.feature_stride + i];
        if (f == 0) continue;
        const std::int16_t* column = p.matrix + i * p.outputs + begin;
        for (std::size_t o = 0; o < outputs; ++o) sums[o] += std::int32_t{column[o]} * f;
    }
    for (std::size_t o = 0; o < outputs; ++o) {
        const unsigned shift = p.shifts[begin + o];
        p.sums[token * p.sum_stride + begin + o] += (sums[o] + (1 << (shift - 1))) >> shift;
    }
}

}  // namespace

KVCAST_AVX2 void project(const Projection& p) {
    if (p.inputs > 2 * kMostPairs) return scalar::project(p);
    Panels panels;
    for (std::size_t output = 0; output < p.outputs; output += kPanels * kLanes32) {
        fill(p, output, panels);
        std::size_t t = 0;
        for (; t + kTokens <= p.tokens; t += kTokens) project_tile<kTokens>(p, panels, t, output);
        for (; t < p.tokens; ++t) project_tile<1>(p, panels, t, output);
    }
}

KVCAST_AVX2 void project_sparse(const Projection& p) {
    constexpr std::size_t kOutputs = 64;  // sums held at once, in 8 registers
    constexpr std::size_t kGroups = kOutputs / 16;
    const std::size_t whole = p.outputs / kOutputs * kOutputs;
    for (std::size_t begin = 0; begin < whole; begin += kOutputs) {
        for (std::size_t t = 0; t < p.tokens; ++t) {
            const std::int16_t* features = p.features + t * p.feature_stride;
            __m256i low[kGroups], high[kGroups];
            for (std::size_t g = 0; g < kGroups; ++g) low[g] = high[g] = _mm256_setzero_si256();
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
                const __m256i pair =
                    _mm256_set1_epi32(static_cast<std::int32_t>(f | std::uint32_t{g2} << 16));
                const auto* a = reinterpret_cast<const __m256i*>(p.matrix + first * p.outputs + begin);
                const auto* b = reinterpret_cast<const __m256i*>(p.matrix + second * p.outputs + begin);
                for (std::size_t g = 0; g < kGroups; ++g) {
                    const __m256i x = _mm256_loadu_si256(a + g), y = _mm256_loadu_si256(b + g);
                    low[g] = multiply_add(low[g], _mm256_unpacklo_epi16(x, y), pair);
                    high[g] = multiply_add(high[g], _mm256_unpackhi_epi16(x, y), pair);
                }
            }
            for (std::size_t g = 0; g < kGroups; ++g) {
                add(p, t, begin + 16 * g, _mm256_permute2x128_si256(low[g], high[g], 0x20));
                add(p, t, begin + 16 * g + kLanes32, _mm256_permute2x128_si256(low[g], high[g], 0x31));
            }
        }
    }
    if (whole == p.outputs) return;
    for (std::size_t t = 0; t < p.tokens; ++t) add_rest(p, t, whole);
}

}  // namespace kvcast::kernels::avx2
