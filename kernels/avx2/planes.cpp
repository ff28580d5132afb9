// Rows to tiles and back; see kernels/avx512/planes.cpp. Tiles of 16 tokens by 8 channels of 16-bit elements
// are transposed in registers; what is left over, and elements of 32 bits, the scalar backend does.
#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>

#include "kernels/avx2/elements.h"
#include "kernels/avx2/slots.h"
#include "kernels/avx2/target.h"
#include "kernels/scalar/elements.h"
#include "kernels/x86/lanes.h"

namespace kvcast::kernels::avx2 {
namespace {

constexpr std::size_t kTile = 16;            // tokens on their way at once
constexpr std::size_t kMostChannels = 1024;  // of a head: 32 KiB of scratch memory

// Calls tile(token) for tiles of kTile tokens, of which there are so many at least. Where some are left over,
// the last tile begins within the one before it.
template <typename F>
KVCAST_AVX2_INLINE void for_tiles(std::size_t tokens, F&& tile) {
    for (std::size_t token = 0; token < tokens; token += kTile) tile(std::min(token, tokens - kTile));
}

KVCAST_AVX2_INLINE void store128(void* p, __m128i v) {
    _mm_storeu_si128(static_cast<__m128i*>(p), v);
}

// Within each 128-bit lane, 8 x 8 elements of 16 bits change places.
KVCAST_AVX2_INLINE void transpose16(__m256i (&r)[8]) {
    __m256i a[8], b[8];
    KVCAST_UNROLL
    for (int i = 0; i < 4; ++i) {
        a[2 * i] = _mm256_unpacklo_epi16(r[2 * i], r[2 * i + 1]);
        a[2 * i + 1] = _mm256_unpackhi_epi16(r[2 * i], r[2 * i + 1]);
    }
    KVCAST_UNROLL
    for (int i = 0; i < 8; i += 4) {
        b[i] = _mm256_unpacklo_epi32(a[i], a[i + 2]);
        b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 2]);
        b[i + 2] = _mm256_unpacklo_epi32(a[i + 1], a[i + 3]);
        b[i + 3] = _mm256_unpackhi_epi32(a[i + 1], a[i + 3]);
    }
    KVCAST_UNROLL
    for (int i = 0; i < 4; ++i) {
        r[2 * i] = _mm256_unpacklo_epi64(b[i], b[i + 4]);
        r[2 * i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 4]);
    }
}

// Stores 8 channels of 16 tokens, transposed: lane L of r[j] is token 8 L + j.
KVCAST_AVX2_INLINE void store_lanes(const __m256i (&r)[8], std::uint8_t* rows, std::size_t row_bytes) {
    KVCAST_UNROLL
    for (std::size_t j = 0; j < 8; ++j) {
        store128(rows + j * row_bytes, _mm256_castsi256_si128(r[j]));
        store128(rows + (j + 8) * row_bytes, _mm256_extracti128_si256(r[j], 1));
    }
}

KVCAST_AVX2_INLINE __m256i load_lanes(const std::uint8_t* rows, std::size_t row_bytes, std::size_t j) {
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + j * row_bytes));
    const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + (j + 8) * row_bytes));
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}

// ---- states to elements ----

struct Scratch {
    alignas(32) std::uint16_t at[kMostChannels][kTile];
};

// Puts 16 states, given in the order that unpacking leaves, into a row of scratch memory.
template <Dtype D>
KVCAST_AVX2_INLINE void put_row(Scratch& scratch, std::size_t channel, __m256i low, __m256i high,
                                __m256 scale) {
    store256(scratch.at[channel], elements16<D>(low, high, scale));
}

// 16 states of a channel.
KVCAST_AVX2_INLINE __m256i states_at(const HeadStore& h, std::size_t channel, std::size_t token) {
    return load256(h.tile + channel * h.tile_stride + token);
}

template <Dtype D>
KVCAST_AVX2_INLINE void put_pair(Scratch& scratch, const HeadStore& h, std::size_t pair, std::size_t token,
                                 __m256 scale) {
    const Rotation& r = h.rotation;
    const std::size_t first = r.first + pair * r.pair_step, second = first + r.partner;
    const __m256i a = states_at(h, first, token), b = states_at(h, second, token);
    const __m256i cos = load256(r.cos + pair * r.table_stride + token);
    const __m256i sin = load256(r.sin + pair * r.table_stride + token);
    const __m256i minus = _mm256_sub_epi16(_mm256_setzero_si256(), sin);
    const __m256i low = _mm256_unpacklo_epi16(a, b), high = _mm256_unpackhi_epi16(a, b);
    put_row<D>(scratch, first, turned(low, _mm256_unpacklo_epi16(cos, minus)),
               turned(high, _mm256_unpackhi_epi16(cos, minus)), scale);
    put_row<D>(scratch, second, turned(low, _mm256_unpacklo_epi16(sin, cos)),
               turned(high, _mm256_unpackhi_epi16(sin, cos)), scale);
}

template <Dtype D>
KVCAST_AVX2 void store_whole(const HeadStore& h) {
    Scratch scratch;
    const Rotation& r = h.rotation;
    const __m256 scale = _mm256_set1_ps(value_of(1, h.scale));
    const std::size_t turned_end = r.first + 2 * r.pairs;
    for_tiles(h.tokens, [&](std::size_t token) KVCAST_AVX2_LAMBDA {
        for (std::size_t p = 0; p < r.pairs; ++p) put_pair<D>(scratch, h, p, token, scale);
        for (std::size_t c = 0; c < h.channels; ++c) {
            if (r.pairs != 0 && c == r.first) c = turned_end;
            if (c >= h.channels) break;
            const __m256i s = states_at(h, c, token);
            put_row<D>(scratch, c, low_states(s), high_states(s), scale);
        }
        std::uint8_t* rows = static_cast<std::uint8_t*>(h.rows) + token * h.row_bytes;
        std::size_t c = 0;
        for (; c + 8 <= h.channels; c += 8) {
            __m256i t[8];
            KVCAST_UNROLL
            for (std::size_t i = 0; i < 8; ++i) t[i] = load256(scratch.at[c + i]);
            transpose16(t);
            store_lanes(t, rows + 2 * c, h.row_bytes);
        }
        for (; c < h.channels; ++c) {
            for (std::size_t t = 0; t < kTile; ++t)
                std::memcpy(rows + t * h.row_bytes + 2 * c, &scratch.at[c][t], 2);
        }
    });
}

// ---- rows to tiles ----

struct FromBf16 {
    KVCAST_AVX2_INLINE static __m256i of16(__m128i element) {
        return _mm256_slli_epi32(_mm256_cvtepu16_epi32(element), 16);
    }
};
struct FromF16 {
    KVCAST_AVX2_INLINE static __m256i of16(__m128i element) {
        return _mm256_castps_si256(_mm256_cvtph_ps(element));
    }
};

// 8 channels of 16 tokens, transposed.
KVCAST_AVX2_INLINE void load_channels(const std::uint8_t* rows, std::size_t row_bytes, __m256i (&r)[8]) {
    KVCAST_UNROLL
    for (std::size_t j = 0; j < 8; ++j) r[j] = load_lanes(rows, row_bytes, j);
    transpose16(r);
}

// What follows leaves channels over that are no eight.
constexpr std::size_t whole_channels(std::size_t channels) {
    return channels / 8 * 8;
}

template <typename Convert>
KVCAST_AVX2 void load_tile(const HeadLoad& h) {
    for_tiles(h.tokens, [&](std::size_t token) KVCAST_AVX2_LAMBDA {
        const auto* rows = static_cast<const std::uint8_t*>(h.rows) + token * h.row_bytes;
        for (std::size_t c = 0; c < whole_channels(h.channels); c += 8) {
            __m256i r[8];
            load_channels(rows + 2 * c, h.row_bytes, r);
            KVCAST_UNROLL
            for (std::size_t i = 0; i < 8; ++i) {
                float* to = h.tile + (c + i) * h.tile_stride + token;
                store256(to, Convert::of16(_mm256_castsi256_si128(r[i])));
                store256(to + 8, Convert::of16(_mm256_extracti128_si256(r[i], 1)));
            }
        }
    });
}

KVCAST_AVX2 void load_elements16(const void* from, std::size_t row_bytes, std::size_t tokens,
                                 std::size_t channels, std::uint16_t* tile, std::size_t stride) {
    for_tiles(tokens, [&](std::size_t token) KVCAST_AVX2_LAMBDA {
        const auto* rows = static_cast<const std::uint8_t*>(from) + token * row_bytes;
        for (std::size_t c = 0; c < whole_channels(channels); c += 8) {
            __m256i r[8];
            load_channels(rows + 2 * c, row_bytes, r);
            KVCAST_UNROLL
            for (std::size_t i = 0; i < 8; ++i) store256(tile + (c + i) * stride + token, r[i]);
        }
    });
}

KVCAST_AVX2 void store_elements16(const ExactStore& h) {
    const auto* tile = static_cast<const std::uint16_t*>(h.tile);
    for_tiles(h.tokens, [&](std::size_t token) KVCAST_AVX2_LAMBDA {
        for (std::size_t c = 0; c < whole_channels(h.channels); c += 8) {
            __m256i r[8];
            KVCAST_UNROLL
            for (std::size_t i = 0; i < 8; ++i) r[i] = load256(tile + (c + i) * h.tile_stride + token);
            transpose16(r);
            store_lanes(r, static_cast<std::uint8_t*>(h.rows) + token * h.row_bytes + 2 * c, h.row_bytes);
        }
    });
}

KVCAST_AVX2 void unrotate(float* a, float* b, const std::int16_t* cos, const std::int16_t* sin,
                          std::size_t tokens) {
    constexpr float kUnit = 1.0f / (1 << kTrigBits);
    std::size_t t = 0;
    for (; t + 8 <= tokens; t += 8) {
        const Turned r =
            unrotated(_mm256_loadu_ps(a + t), _mm256_loadu_ps(b + t), as_floats(cos + t), as_floats(sin + t));
        _mm256_storeu_ps(a + t, r.first);
        _mm256_storeu_ps(b + t, r.second);
    }
    for (; t < tokens; ++t) {
        const auto c = static_cast<float>(cos[t]), s = static_cast<float>(sin[t]);
        const float x = a[t], y = b[t];
        a[t] = (x * c + y * s) * kUnit;
        b[t] = (y * c - x * s) * kUnit;
    }
}

KVCAST_AVX2_INLINE __m256 rounded(__m256 x) {
    const __m256 shifter = _mm256_set1_ps(12582912.0f);  // as round_even()
    return _mm256_sub_ps(_mm256_add_ps(x, shifter), shifter);
}

KVCAST_AVX2_INLINE std::int64_t sum_of_lanes(__m256i v) {
    alignas(32) std::int64_t lanes[4];
    store256(lanes, v);
    return lanes[0] + lanes[1] + lanes[2] + lanes[3];
}

}  // namespace

void store_head(const HeadStore& head) {
    if (head.dtype == Dtype::kF32 || head.channels > kMostChannels || head.tokens < kTile)
        return scalar::store_head(head);
    head.dtype == Dtype::kBf16 ? store_whole<Dtype::kBf16>(head) : store_whole<Dtype::kF16>(head);
}

void store_exact(const ExactStore& head) {
    const bool plain = head.rotation.pairs == 0 && head.source == head.dtype && head.dtype != Dtype::kF32;
    if (!plain || head.tokens < kTile) return scalar::store_exact(head);
    store_elements16(head);
    const std::size_t done = whole_channels(head.channels);
    ExactStore rest = head;
    rest.channels -= done;
    rest.tile = static_cast<const std::uint16_t*>(head.tile) + done * head.tile_stride;
    rest.rows = static_cast<std::uint8_t*>(head.rows) + 2 * done;
    if (rest.channels != 0) scalar::store_exact(rest);
}

void load_elements(const void* rows, std::size_t row_bytes, Dtype dtype, std::size_t tokens,
                   std::size_t channels, void* tile, std::size_t tile_stride) {
    if (dtype == Dtype::kF32 || tokens < kTile)
        return scalar::load_elements(rows, row_bytes, dtype, tokens, channels, tile, tile_stride);
    auto* to = static_cast<std::uint16_t*>(tile);
    load_elements16(rows, row_bytes, tokens, channels, to, tile_stride);
    const std::size_t done = whole_channels(channels);
    scalar::load_elements(static_cast<const std::uint8_t*>(rows) + 2 * done, row_bytes, dtype, tokens,
                          channels - done, to + done * tile_stride, tile_stride);
}

namespace {

KVCAST_AVX2 std::uint32_t largest_magnitude(const float* values, std::size_t count) {
    const __m256i mask = _mm256_set1_epi32(0x7fffffff);
    __m256i largest = _mm256_setzero_si256();
    std::size_t i = 0;
    for (; i + 8 <= count; i += 8)
        largest = _mm256_max_epi32(largest, _mm256_and_si256(load256(values + i), mask));
    alignas(32) std::uint32_t lanes[8];
    store256(lanes, largest);
    std::uint32_t bits = *std::max_element(lanes, lanes + 8);
    for (; i < count; ++i) bits = std::max(bits, std::bit_cast<std::uint32_t>(values[i]) & 0x7fffffffu);
    return bits;
}

}  // namespace

float load_head(const HeadLoad& head) {
    if (head.dtype == Dtype::kF32 || head.tokens < kTile) return scalar::load_head(head);
    head.dtype == Dtype::kBf16 ? load_tile<FromBf16>(head) : load_tile<FromF16>(head);
    const std::size_t done = whole_channels(head.channels);
    HeadLoad rest = head;
    rest.rotation = {};
    rest.rows = static_cast<const std::uint8_t*>(head.rows) + 2 * done;
    rest.channels -= done;
    rest.tile += done * head.tile_stride;
    scalar::load_head(rest);
    scalar::turn_back(head, unrotate);
    std::uint32_t largest = 0;
    for (std::size_t c = 0; c < head.channels; ++c)
        largest = std::max(largest, largest_magnitude(head.tile + c * head.tile_stride, head.tokens));
    return scalar::magnitude_of(largest);
}

KVCAST_AVX2 Moments moments(const float* values, std::size_t count, float scale) {
    const __m256 factor = _mm256_set1_ps(scale);
    __m256i sum = _mm256_setzero_si256(), squares = sum;
    std::size_t i = 0;
    for (; i + 8 <= count; i += 8) {
        const __m256i v = _mm256_cvttps_epi32(rounded(_mm256_mul_ps(_mm256_loadu_ps(values + i), factor)));
        const __m256i odd = _mm256_srli_epi64(v, 32);
        squares = _mm256_add_epi64(squares, _mm256_mul_epi32(v, v));
        squares = _mm256_add_epi64(squares, _mm256_mul_epi32(odd, odd));
        sum = _mm256_add_epi64(sum, _mm256_cvtepi32_epi64(_mm256_castsi256_si128(v)));
        sum = _mm256_add_epi64(sum, _mm256_cvtepi32_epi64(_mm256_extracti128_si256(v, 1)));
    }
    const Moments rest = scalar::moments(values + i, count - i, scale);
    return {sum_of_lanes(sum) + rest.sum,
            static_cast<std::uint64_t>(sum_of_lanes(squares)) + rest.sum_of_squares};
}

KVCAST_AVX2 std::int64_t rounded_sum(const float* values, std::size_t count, float scale) {
    const __m256 factor = _mm256_set1_ps(scale);
    __m256i sum = _mm256_setzero_si256();
    std::size_t i = 0;
    for (; i + 8 <= count; i += 8) {
        const __m256i v = _mm256_cvttps_epi32(rounded(_mm256_mul_ps(_mm256_loadu_ps(values + i), factor)));
        sum = _mm256_add_epi64(sum, _mm256_cvtepi32_epi64(_mm256_castsi256_si128(v)));
        sum = _mm256_add_epi64(sum, _mm256_cvtepi32_epi64(_mm256_extracti128_si256(v, 1)));
    }
    return sum_of_lanes(sum) + scalar::rounded_sum(values + i, count - i, scale);
}

namespace {

// The part of it from `begin` on.
Quantisation rest_of(const Quantisation& x, std::size_t begin) {
    Quantisation rest = x;
    rest.values += begin;
    rest.count -= begin;
    rest.prediction = x.prediction == nullptr ? nullptr : x.prediction + begin;
    rest.q += begin;
    return rest;
}

template <bool Constant>
KVCAST_AVX2 std::uint64_t quantise_as(const Quantisation& x) {
    const __m256 factor = _mm256_set1_ps(x.inverse_unit);
    const __m256 step = _mm256_set1_ps(power_of_two(-static_cast<int>(x.shift)));
    const __m256 most = _mm256_set1_ps(static_cast<float>(x.limit));
    const __m256 least = _mm256_sub_ps(_mm256_setzero_ps(), most);
    const __m256 mean = _mm256_set1_ps(x.mean);
    __m256i sum = _mm256_setzero_si256();
    std::size_t i = 0;
    for (; i + 8 <= x.count; i += 8) {
        const __m256 state = _mm256_mul_ps(_mm256_loadu_ps(x.values + i), factor);
        const __m256 predicted = Constant ? mean : as_floats(x.prediction + i);
        const __m256 residual = _mm256_mul_ps(_mm256_sub_ps(state, predicted), step);
        const __m256i v = _mm256_cvttps_epi32(rounded(_mm256_min_ps(most, _mm256_max_ps(least, residual))));
        const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(v, v), 0xd8);
        store128(x.q + i, _mm256_castsi256_si128(packed));
        const __m256i magnitude = _mm256_abs_epi32(v);
        sum = _mm256_add_epi64(sum,
                               _mm256_add_epi64(_mm256_srli_epi64(magnitude, 32),
                                                _mm256_and_si256(magnitude, _mm256_set1_epi64x(0xffffffff))));
    }
    return static_cast<std::uint64_t>(sum_of_lanes(sum)) + scalar::quantise(rest_of(x, i));
}

}  // namespace

std::uint64_t quantise(const Quantisation& x) {
    return x.prediction == nullptr ? quantise_as<true>(x) : quantise_as<false>(x);
}

KVCAST_AVX2 void reconstruct(const std::int16_t* q, const std::int16_t* prediction, std::size_t count,
                             unsigned shift, std::int16_t* states) {
    const __m256i factors = _mm256_set1_epi32(1 | 1 << (16 + shift));  // prediction * 1 + q * 2^shift
    std::size_t i = 0;
    for (; i + 16 <= count; i += 16) {
        const __m256i p = load256(prediction + i), x = load256(q + i);
        const __m256i low = _mm256_madd_epi16(_mm256_unpacklo_epi16(p, x), factors);
        const __m256i high = _mm256_madd_epi16(_mm256_unpackhi_epi16(p, x), factors);
        store256(states + i, _mm256_packs_epi32(low, high));
    }
    scalar::reconstruct(q + i, prediction + i, count - i, shift, states + i);
}

}  // namespace kvcast::kernels::avx2
