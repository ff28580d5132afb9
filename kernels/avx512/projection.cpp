// Projections with VNNI: 32 products of 16-bit integers, or 64 of 8 bits, and their sums in one instruction.
//
// A pair or a quad is one vector of a matrix: two or four of a token's features, broadcast, serve 16 outputs
// at once, and no sum crosses lanes. Four tokens share the vectors of 64 outputs.
//
// Instructions of bytes take unsigned ones by signed ones. Quads are the unsigned ones, 128 more than the
// entries, so that what is too much depends on features only: 128 times their sum.
#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <type_traits>

#include "kernels/avx512/slots.h"
#include "kernels/avx512/target.h"
#include "kernels/x86/lanes.h"

namespace kvcast::kernels::avx512 {
namespace {

constexpr std::size_t kLanes32 = 16;  // sums in a vector
constexpr std::size_t kVectors = 4;   // of sums per token
constexpr std::size_t kTokens = 4;    // tokens that share a vector's loads

// sum + products of pairs or quads. Not the intrinsics: GCC 12 copies their accumulator around.
template <typename Column>
KVCAST_AVX512_INLINE __m512i multiply_add(__m512i sum, __m512i entries, __m512i features) {
    if constexpr (std::is_same_v<Column, MatrixPair>) {
        asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(entries), "v"(features));
    } else {
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(entries), "v"(features));
    }
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

// Features that are to be rows of bytes, stored 32 at a time, with zeros behind them.
constexpr std::size_t kBytesRoom = 32 << 10;

constexpr std::size_t bytes_stride(std::size_t inputs) {
    return (inputs + 31) / 32 * 32;
}

// Tokens that share a vector's loads.
struct Group {
    std::size_t token;  // the first one
    std::size_t tokens;
    const std::int8_t* bytes;     // their features; null where some do not fit, or there are no quads
    std::size_t used;             // of bytes: up to the last one that is not zero for all of the tokens
    std::int32_t start[kTokens];  // of sums over bytes
};

// Packs the features of a group's tokens into bytes, unless they do not fit.
KVCAST_AVX512 void pack(const Projection& p, std::int8_t* bytes, Group& group) {
    Group packed = group;
    const std::size_t stride = bytes_stride(p.inputs);
    const __m512i ones = _mm512_set1_epi16(1);
    for (std::size_t t = 0; t < group.tokens; ++t) {
        const std::int16_t* features = p.features + (group.token + t) * p.feature_stride;
        __m512i sum = _mm512_setzero_si512();
        for (std::size_t i = 0; i < p.inputs; i += 32) {
            const __m512i wide = _mm512_maskz_loadu_epi16(x86::first_lanes(p.inputs - i), features + i);
            const __m256i narrow = _mm512_cvtepi16_epi8(wide);
            if (_mm512_cmpneq_epi16_mask(wide, _mm512_cvtepi8_epi16(narrow)) != 0) return;
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(bytes + t * stride + i), narrow);
            sum = multiply_add<MatrixPair>(sum, wide, ones);
            if (const std::uint32_t found = _mm512_test_epi16_mask(wide, wide); found != 0)
                packed.used = std::max(packed.used, i + 32 - static_cast<unsigned>(std::countl_zero(found)));
        }
        packed.start[t] = -128 * _mm512_reduce_add_epi32(sum);
    }
    packed.bytes = bytes;
    group = packed;
}

template <std::size_t Vectors, std::size_t Tokens>
struct Sums {
    __m512i at[Tokens][Vectors];
};

std::int32_t four_bytes(const void* from) {
    std::int32_t four = 0;
    std::memcpy(&four, from, sizeof four);
    return four;
}

// Adds the products of one pair or quad of inputs to the sums; `row` is vectors from 16 outputs to the next.
// feature(t) is that pair or quad of token t.
template <std::size_t Vectors, std::size_t Tokens, typename Column, typename Feature>
KVCAST_AVX512_INLINE void step(const Column* column, std::size_t row, Feature feature,
                               Sums<Vectors, Tokens>& sums) {
    __m512i entries[Vectors];
    KVCAST_UNROLL
    for (std::size_t v = 0; v < Vectors; ++v) entries[v] = _mm512_load_si512(column + v * row);
    KVCAST_UNROLL
    for (std::size_t t = 0; t < Tokens; ++t) {
        const __m512i f = _mm512_set1_epi32(feature(t));
        KVCAST_UNROLL
        for (std::size_t v = 0; v < Vectors; ++v)
            sums.at[t][v] = multiply_add<Column>(sums.at[t][v], entries[v], f);
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

// Adds to a group's sums of 16 * Vectors outputs what pairs give.
template <std::size_t Vectors, std::size_t Tokens>
KVCAST_AVX512_INLINE void multiply_pairs(const Projection& p, const Group& group, std::size_t output,
                                         Sums<Vectors, Tokens>& sums) {
    const std::size_t row = (p.inputs + 1) / 2, stride = p.feature_stride;
    const MatrixPair* pairs = p.packed->pairs.data() + output / kLanes32 * row;
    const std::int16_t* features = p.features + group.token * stride;
    const std::size_t used = leading<Tokens>(features, stride, p.inputs);
    for (std::size_t i = 0; i < used / 2; ++i) {
        const auto pair = [&](std::size_t t) { return four_bytes(features + t * stride + 2 * i); };
        step(pairs + i, row, pair, sums);
    }
    if (used % 2 == 0) return;
    const auto last = [&](std::size_t t) {
        return std::int32_t{static_cast<std::uint16_t>(features[t * stride + used - 1])};
    };
    step(pairs + used / 2, row, last, sums);
}

// What quads give.
template <std::size_t Vectors, std::size_t Tokens>
KVCAST_AVX512_INLINE void multiply_quads(const Projection& p, const Group& group, std::size_t output,
                                         Sums<Vectors, Tokens>& sums) {
    const std::size_t row = (p.inputs + 3) / 4, stride = bytes_stride(p.inputs);
    const MatrixQuad* quads = p.packed->quads.data() + output / kLanes32 * row;
    const std::int8_t* bytes = group.bytes;
    for (std::size_t i = 0; i < (group.used + 3) / 4; ++i) {
        const auto quad = [&](std::size_t t) { return four_bytes(bytes + t * stride + 4 * i); };
        step(quads + i, row, quad, sums);
    }
}

template <std::size_t Vectors, std::size_t Tokens>
KVCAST_AVX512_INLINE void project_group(const Projection& p, const Group& group, std::size_t output) {
    Sums<Vectors, Tokens> sums;
    KVCAST_UNROLL
    for (std::size_t t = 0; t < Tokens; ++t) {
        KVCAST_UNROLL
        for (std::size_t v = 0; v < Vectors; ++v) sums.at[t][v] = _mm512_set1_epi32(group.start[t]);
    }
    if (group.bytes != nullptr) {
        multiply_quads(p, group, output, sums);
    } else {
        multiply_pairs(p, group, output, sums);
    }
    KVCAST_UNROLL
    for (std::size_t t = 0; t < Tokens; ++t) {
        KVCAST_UNROLL
        for (std::size_t v = 0; v < Vectors; ++v)
            add(p, group.token + t, output + v * kLanes32, sums.at[t][v]);
    }
}

template <std::size_t Vectors>
KVCAST_AVX512 void project_outputs(const Projection& p, std::span<const Group> groups, std::size_t output) {
    for (const Group& group : groups) {
        if (group.tokens == kTokens) {
            project_group<Vectors, kTokens>(p, group, output);
        } else {
            project_group<Vectors, 1>(p, group, output);
        }
    }
}

void project_groups(const Projection& p, std::span<const Group> groups) {
    for (std::size_t output = 0; output < p.outputs; output += kVectors * kLanes32) {
        switch ((std::min(p.outputs - output, kVectors * kLanes32) + kLanes32 - 1) / kLanes32) {
            case 1:
                project_outputs<1>(p, groups, output);
                break;
            case 2:
                project_outputs<2>(p, groups, output);
                break;
            case 3:
                project_outputs<3>(p, groups, output);
                break;
            default:
                project_outputs<4>(p, groups, output);
        }
    }
}

}  // namespace

void project(const Projection& p) {
    constexpr std::size_t kGroups = 16;
    alignas(64) std::int8_t bytes[kBytesRoom];
    Group groups[kGroups];
    const std::size_t group_bytes = kTokens * bytes_stride(p.inputs);
    const bool narrow = !p.packed->quads.empty() && group_bytes <= kBytesRoom;
    const std::size_t most = narrow ? std::min(kGroups, kBytesRoom / group_bytes) : kGroups;
    for (std::size_t token = 0; token < p.tokens;) {
        std::size_t count = 0;
        for (; count < most && token < p.tokens; ++count) {
            Group& group = groups[count];
            group = {token, p.tokens - token < kTokens ? 1 : kTokens, nullptr, 0, {}};
            if (narrow) pack(p, bytes + count * group_bytes, group);
            token += group.tokens;
        }
        project_groups(p, {groups, count});
    }
}

}  // namespace kvcast::kernels::avx512
