// States that lie as rows do, to rows of 16-bit elements, and rows to floats; see kernels/avx512/states.cpp.
// Shapes that do not come in 16s (8s, to floats), and elements of 32 bits, the scalar backend does.
#include <immintrin.h>

#include <algorithm>
#include <cmath>

#include "kernels/avx2/elements.h"
#include "kernels/avx2/slots.h"
#include "kernels/avx2/target.h"
#include "kernels/x86/lanes.h"

namespace kvcast::kernels::avx2 {
namespace {

template <Dtype D>
KVCAST_AVX2_INLINE void put_channels(const std::int16_t* states, std::uint8_t* row, std::size_t begin,
                                     std::size_t end, __m256 scale) {
    for (std::size_t c = begin; c < end; c += 16) {
        const __m256i s = load256(states + c);
        store256(row + 2 * c, elements16<D>(low_states(s), high_states(s), scale));
    }
}

template <Dtype D>
KVCAST_AVX2_INLINE void put_half_pairs(const Rotation& r, std::size_t token, const std::int16_t* states,
                                       std::uint8_t* row, __m256 scale) {
    for (std::size_t p = 0; p < r.pairs; p += 16) {
        const std::size_t first = r.first + p, second = first + r.partner;
        const __m256i a = load256(states + first), b = load256(states + second);
        const __m256i cos = load256(r.cos + token * r.table_stride + p);
        const __m256i sin = load256(r.sin + token * r.table_stride + p);
        const __m256i minus = _mm256_sub_epi16(_mm256_setzero_si256(), sin);
        const __m256i low = _mm256_unpacklo_epi16(a, b), high = _mm256_unpackhi_epi16(a, b);
        store256(row + 2 * first, elements16<D>(turned(low, _mm256_unpacklo_epi16(cos, minus)),
                                                turned(high, _mm256_unpackhi_epi16(cos, minus)), scale));
        store256(row + 2 * second, elements16<D>(turned(low, _mm256_unpacklo_epi16(sin, cos)),
                                                 turned(high, _mm256_unpackhi_epi16(sin, cos)), scale));
    }
}

template <Dtype D>
KVCAST_AVX2_INLINE void put_interleaved_pairs(const Rotation& r, std::size_t token,
                                              const std::int16_t* states, std::uint8_t* row, __m256 scale) {
    for (std::size_t p = 0; p < r.pairs; p += 8) {
        const __m256i x = load256(states + r.first + 2 * p);
        const auto* cosines = reinterpret_cast<const __m128i*>(r.cos + token * r.table_stride + p);
        const auto* sines = reinterpret_cast<const __m128i*>(r.sin + token * r.table_stride + p);
        const __m256i cos = _mm256_cvtepu16_epi32(_mm_loadu_si128(cosines));
        const __m256i sin = _mm256_cvtepu16_epi32(_mm_loadu_si128(sines));
        const __m256i minus = _mm256_slli_epi32(_mm256_sub_epi32(_mm256_setzero_si256(), sin), 16);
        const __m256i a = turned(x, _mm256_or_si256(cos, minus));
        const __m256i b = turned(x, _mm256_or_si256(sin, _mm256_slli_epi32(cos, 16)));
        store256(row + 2 * (r.first + 2 * p),
                 elements16<D>(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b), scale));
    }
}

template <Dtype D>
KVCAST_AVX2 void store_states_as(const StateStore& s) {
    const Rotation& r = s.rotation;
    const __m256 scale = _mm256_set1_ps(value_of(1, s.scale));
    for (std::size_t t = 0; t < s.tokens; ++t) {
        const std::int16_t* states = s.states + t * s.state_stride;
        std::uint8_t* row = static_cast<std::uint8_t*>(s.rows) + t * s.row_bytes;
        put_channels<D>(states, row, 0, r.pairs == 0 ? s.channels : r.first, scale);
        if (r.pairs == 0) continue;
        if (r.pair_step == 1) {
            put_half_pairs<D>(r, t, states, row, scale);
        } else {
            put_interleaved_pairs<D>(r, t, states, row, scale);
        }
        put_channels<D>(states, row, r.first + 2 * r.pairs, s.channels, scale);
    }
}

// ---- rows to floats ----

template <Dtype D>
KVCAST_AVX2_INLINE __m256 load_floats(const std::uint8_t* row, std::size_t channel) {
    const __m128i elements = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + 2 * channel));
    if constexpr (D == Dtype::kF16) return _mm256_cvtph_ps(elements);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(elements), 16));
}

template <Dtype D>
KVCAST_AVX2_INLINE void take_channels(const std::uint8_t* row, float* values, std::size_t begin,
                                      std::size_t end) {
    for (std::size_t c = begin; c < end; c += 8) _mm256_storeu_ps(values + c, load_floats<D>(row, c));
}

template <Dtype D>
KVCAST_AVX2_INLINE void take_half_pairs(const Rotation& r, const std::int16_t* cosines,
                                        const std::int16_t* sines, const std::uint8_t* row, float* values) {
    for (std::size_t p = 0; p < r.pairs; p += 8) {
        const std::size_t first = r.first + p, second = first + r.partner;
        const __m256 x = load_floats<D>(row, first), y = load_floats<D>(row, second);
        const Turned turned = unrotated(x, y, as_floats(cosines + p), as_floats(sines + p));
        _mm256_storeu_ps(values + first, turned.first);
        _mm256_storeu_ps(values + second, turned.second);
    }
}

template <Dtype D>
KVCAST_AVX2 void load_rows_as(const RowLoad& l) {
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

// Lanes whose magnitude is at most `most`, all ones: NaN has none.
KVCAST_AVX2_INLINE __m256 within(__m256 x, __m256 most) {
    return _mm256_cmp_ps(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), x), most, _CMP_LE_OQ);
}

// Rows to columns of 8 x 8 numbers.
KVCAST_AVX2_INLINE void transpose8(__m128i (&r)[8]) {
    __m128i pairs[8], fours[8];
    for (int i = 0; i < 4; ++i) {
        pairs[2 * i] = _mm_unpacklo_epi16(r[2 * i], r[2 * i + 1]);
        pairs[2 * i + 1] = _mm_unpackhi_epi16(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i) {
        const int at = i / 2 * 4 + i % 2;  // pairs of rows 0..3, then of 4..7
        fours[2 * i] = _mm_unpacklo_epi32(pairs[at], pairs[at + 2]);
        fours[2 * i + 1] = _mm_unpackhi_epi32(pairs[at], pairs[at + 2]);
    }
    for (int i = 0; i < 4; ++i) {
        r[2 * i] = _mm_unpacklo_epi64(fours[i], fours[i + 4]);
        r[2 * i + 1] = _mm_unpackhi_epi64(fours[i], fours[i + 4]);
    }
}

}  // namespace

KVCAST_AVX2 void strips_to_rows(const std::int16_t* tile, std::size_t coefficients, std::int16_t* const* rows,
                                std::size_t tokens) {
    const std::size_t whole_tokens = tokens / 8 * 8, whole = coefficients / 8 * 8;
    for (std::size_t t = 0; t < whole_tokens; t += 8) {
        for (std::size_t c = 0; c < whole; c += 8) {
            __m128i r[8];
            for (std::size_t i = 0; i < 8; ++i)
                r[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(tile + (c + i) * kLanes + t));
            transpose8(r);
            for (std::size_t i = 0; i < 8; ++i)
                _mm_storeu_si128(reinterpret_cast<__m128i*>(rows[t + i] + c), r[i]);
        }
        for (std::size_t i = 0; i < 8; ++i) {
            for (std::size_t c = whole; c < coefficients; ++c) rows[t + i][c] = tile[c * kLanes + t + i];
        }
    }
    scalar::strips_to_rows(tile + whole_tokens, coefficients, rows + whole_tokens, tokens - whole_tokens);
}

KVCAST_AVX2 void rows_to_strips(const std::int16_t* const* rows, std::size_t tokens, std::size_t coefficients,
                                std::int16_t* tile) {
    const std::size_t whole_tokens = tokens / 8 * 8, whole = coefficients / 8 * 8;
    for (std::size_t t = 0; t < whole_tokens; t += 8) {
        for (std::size_t c = 0; c < whole; c += 8) {
            __m128i r[8];
            for (std::size_t i = 0; i < 8; ++i)
                r[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[t + i] + c));
            transpose8(r);
            for (std::size_t i = 0; i < 8; ++i)
                _mm_storeu_si128(reinterpret_cast<__m128i*>(tile + (c + i) * kLanes + t), r[i]);
        }
        for (std::size_t i = 0; i < 8; ++i) {
            for (std::size_t c = whole; c < coefficients; ++c) tile[c * kLanes + t + i] = rows[t + i][c];
        }
    }
    scalar::rows_to_strips(rows + whole_tokens, tokens - whole_tokens, coefficients, tile + whole_tokens);
}

KVCAST_AVX2 void saturate(const std::int32_t* sums, std::size_t count, std::int16_t* states) {
    const std::size_t whole = count / 16 * 16;
    for (std::size_t i = 0; i < whole; i += 16) {
        const __m256i packed = _mm256_packs_epi32(load256(sums + i), load256(sums + i + 8));
        store256(states + i, _mm256_permute4x64_epi64(packed, _MM_SHUFFLE(3, 1, 2, 0)));
    }
    scalar::saturate(sums + whole, count - whole, states + whole);
}

KVCAST_AVX2 void state_features(const std::int16_t* states, const std::int16_t* bias,
                                const std::int16_t* factors, std::size_t count, std::int16_t* features) {
    const std::size_t whole = count / 16 * 16;
    const __m256i least = _mm256_set1_epi16(-128), most = _mm256_set1_epi16(127);
    for (std::size_t i = 0; i < whole; i += 16) {
        const __m256i distance = _mm256_subs_epi16(load256(states + i), load256(bias + i));
        const __m256i rounded = _mm256_mulhrs_epi16(distance, load256(factors + i));
        store256(features + i, _mm256_max_epi16(least, _mm256_min_epi16(most, rounded)));
    }
    scalar::state_features(states + whole, bias + whole, factors + whole, count - whole, features + whole);
}

void load_rows(const RowLoad& l) {
    const Rotation& r = l.rotation;
    const std::size_t sizes = l.channels | r.pairs | (r.pairs != 0 ? r.first : 0);
    if (l.dtype == Dtype::kF32 || sizes % 8 != 0 || (r.pairs != 0 && r.pair_step != 1))
        return scalar::load_rows(l);
    return l.dtype == Dtype::kF16 ? load_rows_as<Dtype::kF16>(l) : load_rows_as<Dtype::kBf16>(l);
}

KVCAST_AVX2 bool residual(const float* values, const std::int32_t* sums, std::size_t count, float scale,
                          float most, float* residual) {
    const __m256 factor = _mm256_set1_ps(scale), limit = _mm256_set1_ps(most);
    const std::size_t whole = count / 8 * 8;
    int all = 0xff;
    for (std::size_t i = 0; i < whole; i += 8) {
        const __m256 state = _mm256_mul_ps(_mm256_loadu_ps(values + i), factor);
        const __m256 fit = within(state, limit);
        all &= _mm256_movemask_ps(fit);
        const __m256 sum = _mm256_cvtepi32_ps(load256(sums + i));
        _mm256_storeu_ps(residual + i, _mm256_and_ps(fit, _mm256_sub_ps(state, sum)));
    }
    const bool rest =
        scalar::residual(values + whole, sums + whole, count - whole, scale, most, residual + whole);
    return all == 0xff && rest;
}

// Rounded to 16-bit integers, which they fit.
KVCAST_AVX2_INLINE void store_rounded(__m256 a, __m256 b, std::int16_t* to) {
    const __m256i packed = _mm256_packs_epi32(_mm256_cvtps_epi32(a), _mm256_cvtps_epi32(b));
    store256(to, _mm256_permute4x64_epi64(packed, _MM_SHUFFLE(3, 1, 2, 0)));
}

KVCAST_AVX2 int share_exponent(const float* values, std::size_t count, std::int16_t* integers) {
    const std::size_t whole = count / 16 * 16;
    __m256 most = _mm256_setzero_ps();
    for (std::size_t i = 0; i < whole; i += 8)
        most = _mm256_max_ps(most, _mm256_andnot_ps(_mm256_set1_ps(-0.0f), _mm256_loadu_ps(values + i)));
    float lanes[8];
    _mm256_storeu_ps(lanes, most);
    float largest = *std::max_element(lanes, lanes + 8);
    for (std::size_t i = whole; i < count; ++i) largest = std::max(largest, std::abs(values[i]));
    const int exponent = shared_exponent(largest);
    const float factor = power_of_two(exponent);
    const __m256 factors = _mm256_set1_ps(factor);
    for (std::size_t i = 0; i < whole; i += 16) {
        store_rounded(_mm256_mul_ps(_mm256_loadu_ps(values + i), factors),
                      _mm256_mul_ps(_mm256_loadu_ps(values + i + 8), factors), integers + i);
    }
    for (std::size_t i = whole; i < count; ++i)
        integers[i] = static_cast<std::int16_t>(static_cast<std::int32_t>(round_even(values[i] * factor)));
    return exponent;
}

KVCAST_AVX2 bool round_steps(const std::int32_t* values, std::size_t count, float unit, float step,
                             float most, std::int16_t* q) {
    const __m256 inverse = _mm256_set1_ps(1 / step), units = _mm256_set1_ps(unit);
    const __m256 limit = _mm256_set1_ps(most);
    const std::size_t whole = count / 16 * 16;
    int all = 0xff;
    for (std::size_t i = 0; i < whole; i += 16) {
        __m256 steps[2];
        KVCAST_UNROLL
        for (std::size_t half = 0; half < 2; ++half) {
            const __m256 x = _mm256_mul_ps(_mm256_cvtepi32_ps(load256(values + i + 8 * half)), units);
            const __m256 fit = within(x, limit);
            all &= _mm256_movemask_ps(fit);
            steps[half] = _mm256_mul_ps(_mm256_and_ps(fit, x), inverse);
        }
        store_rounded(steps[0], steps[1], q + i);
    }
    const bool rest = scalar::round_steps(values + whole, count - whole, unit, step, most, q + whole);
    return all == 0xff && rest;
}

void store_states(const StateStore& s) {
    const std::size_t sizes = s.channels | s.rotation.pairs | (s.rotation.pairs != 0 ? s.rotation.first : 0);
    if (s.dtype == Dtype::kF32 || sizes % 16 != 0) return scalar::store_states(s);
    return s.dtype == Dtype::kF16 ? store_states_as<Dtype::kF16>(s) : store_states_as<Dtype::kBf16>(s);
}

}  // namespace kvcast::kernels::avx2
