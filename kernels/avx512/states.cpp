// States that lie as rows do, to rows, and rows to floats: channels of a token are neighbours, and nothing is
// transposed.
#include <immintrin.h>

#include <algorithm>

#include "kernels/avx512/elements.h"
#include "kernels/avx512/slots.h"
#include "kernels/avx512/target.h"
#include "kernels/x86/lanes.h"

namespace kvcast::kernels::avx512 {
namespace {

using x86::first_lanes;

// Stores up to 32 states, given in the order that unpacking leaves.
template <Dtype D>
KVCAST_AVX512_INLINE void put(std::uint8_t* row, std::size_t channel, std::uint32_t lanes, __m512i low,
                              __m512i high, __m512 scale) {
    std::uint8_t* to = row + channel * dtype_bytes(D);
    if constexpr (D == Dtype::kF32) {
        const Floats v = floats_of(low, high, scale);
        _mm512_mask_storeu_ps(to, static_cast<__mmask16>(lanes), v.first);
        _mm512_mask_storeu_ps(to + 64, static_cast<__mmask16>(lanes >> 16), v.second);
    } else {
        _mm512_mask_storeu_epi16(to, lanes, elements16<D>(low, high, scale));
    }
}

template <Dtype D>
KVCAST_AVX512_INLINE void put_channels(const std::int16_t* states, std::uint8_t* row, std::size_t begin,
                                       std::size_t end, __m512 scale) {
    for (std::size_t c = begin; c < end; c += 32) {
        const std::uint32_t lanes = first_lanes(end - c);
        const __m512i s = _mm512_maskz_loadu_epi16(lanes, states + c);
        put<D>(row, c, lanes, low_states(s), high_states(s), scale);
    }
}

// Pairs of channels that are `partner` apart, 32 pairs at once.
template <Dtype D>
KVCAST_AVX512_INLINE void put_half_pairs(const Rotation& r, const std::int16_t* cosines,
                                         const std::int16_t* sines, const std::int16_t* states,
                                         std::uint8_t* row, __m512 scale) {
    for (std::size_t p = 0; p < r.pairs; p += 32) {
        const std::uint32_t lanes = first_lanes(r.pairs - p);
        const std::size_t first = r.first + p, second = first + r.partner;
        const __m512i a = _mm512_maskz_loadu_epi16(lanes, states + first);
        const __m512i b = _mm512_maskz_loadu_epi16(lanes, states + second);
        const __m512i cos = _mm512_maskz_loadu_epi16(lanes, cosines + p);
        const __m512i sin = _mm512_maskz_loadu_epi16(lanes, sines + p);
        const __m512i minus = _mm512_sub_epi16(_mm512_setzero_si512(), sin);
        const __m512i low = _mm512_unpacklo_epi16(a, b), high = _mm512_unpackhi_epi16(a, b);
        put<D>(row, first, lanes, turned(low, _mm512_unpacklo_epi16(cos, minus)),
               turned(high, _mm512_unpackhi_epi16(cos, minus)), scale);
        put<D>(row, second, lanes, turned(low, _mm512_unpacklo_epi16(sin, cos)),
               turned(high, _mm512_unpackhi_epi16(sin, cos)), scale);
    }
}

// Pairs of neighbours, 16 at once.
template <Dtype D>
KVCAST_AVX512_INLINE void put_interleaved_pairs(const Rotation& r, const std::int16_t* cosines,
                                                const std::int16_t* sines, const std::int16_t* states,
                                                std::uint8_t* row, __m512 scale) {
    for (std::size_t p = 0; p < r.pairs; p += 16) {
        const auto there = static_cast<__mmask16>(first_lanes(r.pairs - p));
        const std::uint32_t lanes = first_lanes(2 * (r.pairs - p));
        const __m512i x = _mm512_maskz_loadu_epi16(lanes, states + r.first + 2 * p);
        const __m512i cos = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, cosines + p));
        const __m512i sin = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, sines + p));
        const __m512i minus = _mm512_slli_epi32(_mm512_sub_epi32(_mm512_setzero_si512(), sin), 16);
        const __m512i a = turned(x, _mm512_or_si512(cos, minus));
        const __m512i b = turned(x, _mm512_or_si512(sin, _mm512_slli_epi32(cos, 16)));
        put<D>(row, r.first + 2 * p, lanes, _mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b), scale);
    }
}

template <Dtype D>
KVCAST_AVX512 void store_states_as(const StateStore& s) {
    const Rotation& r = s.rotation;
    const __m512 scale = _mm512_set1_ps(value_of(1, s.scale));
    const std::size_t turned_end = r.first + 2 * r.pairs;
    for (std::size_t t = 0; t < s.tokens; ++t) {
        const std::int16_t* states = s.states + t * s.state_stride;
        std::uint8_t* row = static_cast<std::uint8_t*>(s.rows) + t * s.row_bytes;
        if (r.pairs == 0) {
            put_channels<D>(states, row, 0, s.channels, scale);
            continue;
        }
        const std::int16_t *cos = r.cos + t * r.table_stride, *sin = r.sin + t * r.table_stride;
        put_channels<D>(states, row, 0, r.first, scale);
        if (r.pair_step == 1) {
            put_half_pairs<D>(r, cos, sin, states, row, scale);
        } else {
            put_interleaved_pairs<D>(r, cos, sin, states, row, scale);
        }
        put_channels<D>(states, row, turned_end, s.channels, scale);
    }
}

// ---- rows to floats ----

template <Dtype D>
KVCAST_AVX512_INLINE __m512 load_floats(const std::uint8_t* row, std::size_t channel, __mmask16 lanes) {
    const std::uint8_t* from = row + channel * dtype_bytes(D);
    if constexpr (D == Dtype::kF32) {
        return _mm512_maskz_loadu_ps(lanes, from);
    } else {
        const __m256i elements = _mm256_maskz_loadu_epi16(lanes, from);
        if constexpr (D == Dtype::kF16) return _mm512_cvtph_ps(elements);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(elements), 16));
    }
}

template <Dtype D>
KVCAST_AVX512_INLINE void take_channels(const std::uint8_t* row, float* values, std::size_t begin,
                                        std::size_t end) {
    for (std::size_t c = begin; c < end; c += 16) {
        const auto lanes = static_cast<__mmask16>(first_lanes(end - c));
        _mm512_mask_storeu_ps(values + c, lanes, load_floats<D>(row, c, lanes));
    }
}

template <Dtype D>
KVCAST_AVX512_INLINE void take_half_pairs(const Rotation& r, const std::int16_t* cosines,
                                          const std::int16_t* sines, const std::uint8_t* row, float* values) {
    for (std::size_t p = 0; p < r.pairs; p += 16) {
        const auto lanes = static_cast<__mmask16>(first_lanes(r.pairs - p));
        const std::size_t first = r.first + p, second = first + r.partner;
        const __m512 x = load_floats<D>(row, first, lanes), y = load_floats<D>(row, second, lanes);
        const Turned turned = unrotated(x, y, load_trig(cosines + p, lanes), load_trig(sines + p, lanes));
        _mm512_mask_storeu_ps(values + first, lanes, turned.first);
        _mm512_mask_storeu_ps(values + second, lanes, turned.second);
    }
}

template <Dtype D>
KVCAST_AVX512 void load_rows_as(const RowLoad& l) {
    const Rotation& r = l.rotation;
    for (std::size_t t = 0; t < l.tokens; ++t) {
        const auto* row = static_cast<const std::uint8_t*>(l.rows) + t * l.row_bytes;
        float* values = l.values + t * l.value_stride;
        take_channels<D>(row, values, 0, r.pairs == 0 ? l.channels : r.first);
        if (r.pairs == 0) continue;
        take_half_pairs<D>(r, r.cos + t * r.table_stride, r.sin + t * r.table_stride, row, values);
        take_channels<D>(row, values, r.first + 2 * r.pairs, l.channels);
    }
}

}  // namespace

void load_rows(const RowLoad& rows) {
    if (rows.rotation.pairs != 0 && rows.rotation.pair_step != 1) return scalar::load_rows(rows);
    switch (rows.dtype) {
        case Dtype::kBf16:
            return load_rows_as<Dtype::kBf16>(rows);
        case Dtype::kF16:
            return load_rows_as<Dtype::kF16>(rows);
        default:
            return load_rows_as<Dtype::kF32>(rows);
    }
}

// Lanes whose magnitude is at most `most`: NaN has none.
KVCAST_AVX512_INLINE __mmask16 within(__m512 x, __m512 most) {
    return _mm512_cmp_ps_mask(_mm512_abs_ps(x), most, _CMP_LE_OQ);
}

KVCAST_AVX512 bool residual(const float* values, const std::int32_t* sums, std::size_t count, float scale,
                            float most, float* residual) {
    const __m512 factor = _mm512_set1_ps(scale), limit = _mm512_set1_ps(most);
    bool all = true;
    for (std::size_t i = 0; i < count; i += 16) {
        const auto lanes = static_cast<__mmask16>(first_lanes(count - i));
        const __m512 state = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, values + i), factor);
        const __m512 sum = _mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32(lanes, sums + i));
        const __mmask16 fit = within(state, limit);
        all = all && fit == 0xffff;
        _mm512_mask_storeu_ps(residual + i, lanes, _mm512_maskz_sub_ps(fit, state, sum));
    }
    return all;
}

// Rounded to 16-bit integers, which they fit.
KVCAST_AVX512_INLINE void store_rounded(__m512 x, __mmask16 lanes, std::int16_t* to) {
    _mm256_mask_storeu_epi16(to, lanes, _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(x)));
}

KVCAST_AVX512 int share_exponent(const float* values, std::size_t count, std::int16_t* integers) {
    __m512 largest = _mm512_setzero_ps();
    for (std::size_t i = 0; i < count; i += 16) {
        const auto lanes = static_cast<__mmask16>(first_lanes(count - i));
        largest = _mm512_max_ps(largest, _mm512_abs_ps(_mm512_maskz_loadu_ps(lanes, values + i)));
    }
    const int exponent = shared_exponent(_mm512_reduce_max_ps(largest));
    const __m512 factor = _mm512_set1_ps(power_of_two(exponent));
    for (std::size_t i = 0; i < count; i += 16) {
        const auto lanes = static_cast<__mmask16>(first_lanes(count - i));
        store_rounded(_mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, values + i), factor), lanes, integers + i);
    }
    return exponent;
}

KVCAST_AVX512 bool round_steps(const std::int32_t* values, std::size_t count, float unit, float step,
                               float most, std::int16_t* q) {
    const __m512 inverse = _mm512_set1_ps(1 / step), units = _mm512_set1_ps(unit);
    const __m512 limit = _mm512_set1_ps(most);
    bool all = true;
    for (std::size_t i = 0; i < count; i += 16) {
        const auto lanes = static_cast<__mmask16>(first_lanes(count - i));
        const __m512 value = _mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32(lanes, values + i));
        const __m512 x = _mm512_mul_ps(value, units);
        const __mmask16 fit = within(x, limit);
        all = all && fit == 0xffff;
        store_rounded(_mm512_maskz_mul_ps(fit, x, inverse), lanes, q + i);
    }
    return all;
}

KVCAST_AVX512 void saturate(const std::int32_t* sums, std::size_t count, std::int16_t* states) {
    for (std::size_t i = 0; i < count; i += 16) {
        const auto lanes = static_cast<__mmask16>(first_lanes(count - i));
        const __m512i v = _mm512_maskz_loadu_epi32(lanes, sums + i);
        _mm256_mask_storeu_epi16(states + i, lanes, _mm512_cvtsepi32_epi16(v));
    }
}

KVCAST_AVX512 void state_features(const std::int16_t* states, const std::int16_t* bias,
                                  const std::int16_t* factors, std::size_t count, std::int16_t* features) {
    const __m512i least = _mm512_set1_epi16(-128), most = _mm512_set1_epi16(127);
    for (std::size_t i = 0; i < count; i += 32) {
        const __mmask32 lanes = x86::first_lanes(count - i);
        const __m512i state = _mm512_maskz_loadu_epi16(lanes, states + i);
        const __m512i distance = _mm512_subs_epi16(state, _mm512_maskz_loadu_epi16(lanes, bias + i));
        const __m512i rounded = _mm512_mulhrs_epi16(distance, _mm512_maskz_loadu_epi16(lanes, factors + i));
        _mm512_mask_storeu_epi16(features + i, lanes,
                                 _mm512_max_epi16(least, _mm512_min_epi16(most, rounded)));
    }
}

void store_states(const StateStore& states) {
    switch (states.dtype) {
        case Dtype::kBf16:
            return store_states_as<Dtype::kBf16>(states);
        case Dtype::kF16:
            return store_states_as<Dtype::kF16>(states);
        default:
            return store_states_as<Dtype::kF32>(states);
    }
}

}  // namespace kvcast::kernels::avx512
