// Rows to tiles and back. Tiles are transposed in registers, 8 channels by 32 tokens of 16-bit elements or 4
// by 16 of 32-bit ones: a 128-bit lane then holds neighbouring channels of one token.
#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <type_traits>

#include "kernels/avx512/elements.h"
#include "kernels/avx512/slots.h"
#include "kernels/avx512/target.h"
#include "kernels/scalar/elements.h"
#include "kernels/x86/elements.h"
#include "kernels/x86/lanes.h"

namespace kvcast::kernels::avx512 {
namespace {

using x86::ElementOf;
using x86::first_lanes;

constexpr std::size_t kTile = 32;            // tokens on their way at once
constexpr std::size_t kMostChannels = 1024;  // of a head: 64 KiB of scratch memory

// Calls tile(token, tokens, whole) for tiles of kTile tokens. Where some are left over, the last tile begins
// within the one before it; so only what has fewer than kTile altogether is less than a whole one.
template <typename F>
KVCAST_AVX512_INLINE void for_tiles(std::size_t tokens, F&& tile) {
    if (tokens < kTile) return tile(std::size_t{0}, tokens, std::false_type{});
    for (std::size_t token = 0; token < tokens; token += kTile)
        tile(std::min(token, tokens - kTile), kTile, std::true_type{});
}

// A row of a tile, of which `tokens` elements of 16 bits are there.
template <bool Whole>
KVCAST_AVX512_INLINE __m512i load_row16(const void* from, std::size_t tokens) {
    return Whole ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16(first_lanes(tokens), from);
}

// The last two of three steps of transpose16().
KVCAST_AVX512_INLINE void transpose_mixed16(__m512i (&r)[8]) {
    __m512i b[8];
    KVCAST_UNROLL
    for (int i = 0; i < 8; i += 4) {
        b[i] = _mm512_unpacklo_epi32(r[i], r[i + 2]);
        b[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 2]);
        b[i + 2] = _mm512_unpacklo_epi32(r[i + 1], r[i + 3]);
        b[i + 3] = _mm512_unpackhi_epi32(r[i + 1], r[i + 3]);
    }
    KVCAST_UNROLL
    for (int i = 0; i < 4; ++i) {
        r[2 * i] = _mm512_unpacklo_epi64(b[i], b[i + 4]);
        r[2 * i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 4]);
    }
}

// Within each 128-bit lane, 8 x 8 elements of 16 bits change places.
KVCAST_AVX512_INLINE void transpose16(__m512i (&r)[8]) {
    KVCAST_UNROLL
    for (int i = 0; i < 8; i += 2) {
        const __m512i low = _mm512_unpacklo_epi16(r[i], r[i + 1]);
        r[i + 1] = _mm512_unpackhi_epi16(r[i], r[i + 1]);
        r[i] = low;
    }
    transpose_mixed16(r);
}

// Within each 128-bit lane, 4 x 4 elements of 32 bits change places.
KVCAST_AVX512_INLINE void transpose32(__m512i (&r)[4]) {
    const __m512i a = _mm512_unpacklo_epi32(r[0], r[1]), b = _mm512_unpackhi_epi32(r[0], r[1]);
    const __m512i c = _mm512_unpacklo_epi32(r[2], r[3]), d = _mm512_unpackhi_epi32(r[2], r[3]);
    r[0] = _mm512_unpacklo_epi64(a, c);
    r[1] = _mm512_unpackhi_epi64(a, c);
    r[2] = _mm512_unpacklo_epi64(b, d);
    r[3] = _mm512_unpackhi_epi64(b, d);
}

KVCAST_AVX512_INLINE void store_at(std::uint8_t* to, __m128i v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), v);
}

// Writes channels of 16-bit elements to rows, eight of them at a time. They go by way of memory, as what
// takes lanes out of a register is busy with transposing; and line by line where channels come in order and
// in kChannels, since then far fewer stores do it.
class EightsWriter {
  public:
    static constexpr std::size_t kChannels = 32;

    KVCAST_AVX512_INLINE EightsWriter(void* rows, std::size_t row_bytes, bool lines)
        : rows_(static_cast<std::uint8_t*>(rows)), row_bytes_(row_bytes), lines_(lines) {}

    // Channels that are transposed, of up to kTile tokens: lane L of r[j] is token 8 L + j.
    template <bool Whole>
    KVCAST_AVX512_INLINE void put(const __m512i (&r)[8], std::size_t token, std::size_t tokens,
                                  std::size_t channel) {
        const std::size_t eight = channel / 8 % kEights;
        KVCAST_UNROLL
        for (int j = 0; j < 8; ++j) _mm512_store_si512(lanes_[eight][j], r[j]);
        asm("" : "+m"(lanes_));  // or the compiler takes them out of the registers
        std::uint8_t* const rows = rows_ + token * row_bytes_ + 2 * channel;
        if (!Whole || !lines_) {
            put_lanes<Whole>(lanes_[eight], tokens, rows);
        } else if (eight == kEights - 1) {
            put_lines(rows - 16 * eight);
        }
    }

  private:
    static constexpr std::size_t kEights = kChannels / 8;
    using Lanes = __m128i[8][4];

    template <bool Whole>
    KVCAST_AVX512_INLINE void put_lanes(const Lanes& lanes, std::size_t tokens, std::uint8_t* rows) const {
        KVCAST_UNROLL
        for (std::size_t j = 0; j < 8; ++j) {
            KVCAST_UNROLL
            for (std::size_t l = 0; l < 4; ++l) {
                if (Whole || 8 * l + j < tokens) store_at(rows + (8 * l + j) * row_bytes_, lanes[j][l]);
            }
        }
    }

    KVCAST_AVX512_INLINE void put_lines(std::uint8_t* rows) const {
        KVCAST_UNROLL
        for (std::size_t j = 0; j < 8; ++j) {
            KVCAST_UNROLL
            for (std::size_t l = 0; l < 4; ++l) {
                __m512i line = _mm512_castsi128_si512(lanes_[0][j][l]);
                line = _mm512_inserti32x4(line, lanes_[1][j][l], 1);
                line = _mm512_inserti32x4(line, lanes_[2][j][l], 2);
                _mm512_storeu_si512(rows + (8 * l + j) * row_bytes_,
                                    _mm512_inserti32x4(line, lanes_[3][j][l], 3));
            }
        }
    }

    std::uint8_t* rows_;
    std::size_t row_bytes_;
    bool lines_;
    alignas(64) Lanes lanes_[kEights];
};

// Stores 4 channels of 32 bits and up to 16 tokens, transposed: lane L of r[j] is token 4 L + j.
KVCAST_AVX512_INLINE void store_lanes32(const __m512i (&r)[4], std::size_t tokens, std::uint8_t* rows,
                                        std::size_t row_bytes) {
    KVCAST_UNROLL
    for (int j = 0; j < 4; ++j) {
        std::uint8_t* row = rows + static_cast<std::size_t>(j) * row_bytes;
        const auto t = static_cast<std::size_t>(j);
        if (t < tokens) store_at(row, _mm512_castsi512_si128(r[j]));
        if (t + 4 < tokens) store_at(row + 4 * row_bytes, _mm512_extracti32x4_epi32(r[j], 1));
        if (t + 8 < tokens) store_at(row + 8 * row_bytes, _mm512_extracti32x4_epi32(r[j], 2));
        if (t + 12 < tokens) store_at(row + 12 * row_bytes, _mm512_extracti32x4_epi32(r[j], 3));
    }
}

// Tokens first, first + step, ... in the four lanes; zeros for those that are not there.
template <bool Whole>
KVCAST_AVX512_INLINE __m512i load_lanes(const std::uint8_t* rows, std::size_t row_bytes, std::size_t first,
                                        std::size_t step, std::size_t tokens) {
    const auto row = [&](std::size_t token) KVCAST_AVX512_LAMBDA {
        if (!Whole && token >= tokens) return _mm_setzero_si128();
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + token * row_bytes));
    };
    __m512i r = _mm512_castsi128_si512(row(first));
    r = _mm512_inserti32x4(r, row(first + step), 1);
    r = _mm512_inserti32x4(r, row(first + 2 * step), 2);
    return _mm512_inserti32x4(r, row(first + 3 * step), 3);
}

// ---- states to elements ----

// Scratch memory of one tile: [channel][kTile] elements.
template <Dtype D>
struct Scratch {
    alignas(64) ElementOf<D> at[kMostChannels][kTile];
};

// Puts 32 states, given in the order that unpacking leaves, into a row of scratch memory.
template <Dtype D>
KVCAST_AVX512_INLINE void put_row(Scratch<D>& scratch, std::size_t channel, __m512i low, __m512i high,
                                  __m512 scale) {
    auto* row = scratch.at[channel];
    if constexpr (D == Dtype::kF32) {
        const Floats v = floats_of(low, high, scale);
        _mm512_store_ps(row, v.first);
        _mm512_store_ps(row + 16, v.second);
    } else {
        _mm512_store_si512(row, elements16<D>(low, high, scale));
    }
}

// Up to 32 states of a channel.
KVCAST_AVX512_INLINE __m512i states_at(const HeadStore& h, std::size_t channel, std::size_t token,
                                       std::uint32_t lanes) {
    return _mm512_maskz_loadu_epi16(lanes, h.tile + channel * h.tile_stride + token);
}

// 32 states in the order that unpacking leaves.
struct Unpacked {
    __m512i low;
    __m512i high;
};

// Up to 32 tokens of a pair of channels, turned.
KVCAST_AVX512_INLINE void turn_pair(const HeadStore& h, std::size_t pair, std::size_t token,
                                    std::uint32_t lanes, Unpacked& first, Unpacked& second) {
    const Rotation& r = h.rotation;
    const std::size_t channel = r.first + pair * r.pair_step;
    const __m512i a = states_at(h, channel, token, lanes);
    const __m512i b = states_at(h, channel + r.partner, token, lanes);
    const __m512i cos = _mm512_maskz_loadu_epi16(lanes, r.cos + pair * r.table_stride + token);
    const __m512i sin = _mm512_maskz_loadu_epi16(lanes, r.sin + pair * r.table_stride + token);
    const __m512i minus = _mm512_sub_epi16(_mm512_setzero_si512(), sin);
    const __m512i low = _mm512_unpacklo_epi16(a, b), high = _mm512_unpackhi_epi16(a, b);
    first = {turned(low, _mm512_unpacklo_epi16(cos, minus)), turned(high, _mm512_unpackhi_epi16(cos, minus))};
    second = {turned(low, _mm512_unpacklo_epi16(sin, cos)), turned(high, _mm512_unpackhi_epi16(sin, cos))};
}

// Scratch memory to rows.
template <Dtype D>
KVCAST_AVX512_INLINE void store_rows(const Scratch<D>& scratch, std::size_t channels, std::size_t tokens,
                                     std::uint8_t* rows, std::size_t row_bytes) {
    std::size_t c = 0;
    EightsWriter out(rows, row_bytes, false);
    if constexpr (D == Dtype::kF32) {
        for (; c + 4 <= channels; c += 4) {
            for (std::size_t t = 0; t < tokens; t += 16) {
                __m512i r[4];
                KVCAST_UNROLL
                for (int i = 0; i < 4; ++i)
                    r[i] = _mm512_load_si512(scratch.at[c + static_cast<std::size_t>(i)] + t);
                transpose32(r);
                store_lanes32(r, tokens - t, rows + t * row_bytes + 4 * c, row_bytes);
            }
        }
    } else {
        for (; c + 8 <= channels; c += 8) {
            __m512i r[8];
            KVCAST_UNROLL
            for (std::size_t i = 0; i < 8; ++i) r[i] = _mm512_load_si512(scratch.at[c + i]);
            transpose16(r);
            out.put<false>(r, 0, tokens, c);
        }
    }
    for (; c < channels; ++c) {
        for (std::size_t t = 0; t < tokens; ++t) {
            const auto element = scratch.at[c][t];
            std::memcpy(rows + t * row_bytes + c * sizeof element, &element, sizeof element);
        }
    }
}

template <Dtype D>
KVCAST_AVX512 void store_head_as(const HeadStore& h) {
    Scratch<D> scratch;
    const Rotation& r = h.rotation;
    const __m512 scale = _mm512_set1_ps(value_of(1, h.scale));
    const std::size_t turned_end = r.first + 2 * r.pairs;
    for (std::size_t token = 0; token < h.tokens; token += kTile) {
        const std::size_t tokens = std::min(kTile, h.tokens - token);
        const std::uint32_t lanes = first_lanes(tokens);
        for (std::size_t p = 0; p < r.pairs; ++p) {
            const std::size_t first = r.first + p * r.pair_step;
            Unpacked a, b;
            turn_pair(h, p, token, lanes, a, b);
            put_row<D>(scratch, first, a.low, a.high, scale);
            put_row<D>(scratch, first + r.partner, b.low, b.high, scale);
        }
        for (std::size_t c = 0; c < h.channels; ++c) {
            if (r.pairs != 0 && c == r.first) c = turned_end;
            if (c >= h.channels) break;
            const __m512i s = states_at(h, c, token, lanes);
            put_row<D>(scratch, c, low_states(s), high_states(s), scale);
        }
        store_rows<D>(scratch, h.channels, tokens, static_cast<std::uint8_t*>(h.rows) + token * h.row_bytes,
                      h.row_bytes);
    }
}

// Whether `some` pairs at a time have as many neighbours first and as many second, and other channels come in
// as many too.
bool come_in(std::size_t some, const Rotation& r, std::size_t channels) {
    if (channels % some != 0 || r.pairs == 0) return channels % some == 0;
    return r.pair_step == 1 && r.first % some == 0 && r.pairs % some == 0 && r.partner % some == 0;
}

// Elements of 16 bits and channels that come in eights. Neighbouring channels share a vector as soon as they
// are elements, which is the first of three steps of a transposition.
template <Dtype D>
class EightsStore {
  public:
    KVCAST_AVX512_INLINE explicit EightsStore(const HeadStore& h)
        : h_(h),
          scale_(_mm512_set1_ps(value_of(1, h.scale))),
          turned_zero_(_mm512_mul_ps(scale_, _mm512_set1_ps(kTurnedZero))) {}

    KVCAST_AVX512_INLINE void run() const {
        const bool lines = come_in(EightsWriter::kChannels, h_.rotation, h_.channels);
        EightsWriter out(h_.rows, h_.row_bytes, lines), seconds(h_.rows, h_.row_bytes, lines);
        for_tiles(h_.tokens, [&](std::size_t token, std::size_t tokens, auto whole) KVCAST_AVX512_LAMBDA {
            store_tile<whole.value>(token, tokens, out, seconds);
        });
    }

  private:
    struct Mixed {  // channels by turns, of tokens 0 to 3 of each eight, and of the others
        __m512i low;
        __m512i high;
    };

    template <bool Whole>
    KVCAST_AVX512_INLINE void store_tile(std::size_t token, std::size_t tokens, EightsWriter& out,
                                         EightsWriter& seconds) const {
        const Rotation& r = h_.rotation;
        for (std::size_t p = 0; p < r.pairs; p += 8) {
            __m512i first[8], second[8];
            KVCAST_UNROLL
            for (std::size_t i = 0; i < 8; i += 2) turn<Whole>(p + i, token, tokens, first + i, second + i);
            transpose_mixed16(first);
            out.put<Whole>(first, token, tokens, r.first + p);
            transpose_mixed16(second);
            seconds.put<Whole>(second, token, tokens, r.first + p + r.partner);
        }
        const std::size_t turned_end = r.first + 2 * r.pairs;
        for (std::size_t c = 0; c < h_.channels; c += 8) {
            if (r.pairs != 0 && c == r.first) c = turned_end;
            if (c >= h_.channels) break;
            __m512i mixed[8];
            KVCAST_UNROLL
            for (std::size_t i = 0; i < 8; i += 2) {
                const Mixed s = states<Whole>(c + i, c + i + 1, token, tokens);
                mixed[i] = elements(s.low);
                mixed[i + 1] = elements(s.high);
            }
            transpose_mixed16(mixed);
            out.put<Whole>(mixed, token, tokens, c);
        }
    }

    KVCAST_AVX512_INLINE static Mixed mixed(__m512i a, __m512i b) {
        return {_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b)};
    }

    // States of channels a and b by turns.
    template <bool Whole>
    KVCAST_AVX512_INLINE Mixed states(std::size_t a, std::size_t b, std::size_t token,
                                      std::size_t tokens) const {
        const std::int16_t* tile = h_.tile + token;
        return mixed(load_row16<Whole>(tile + a * h_.tile_stride, tokens),
                     load_row16<Whole>(tile + b * h_.tile_stride, tokens));
    }

    KVCAST_AVX512_INLINE __m512i elements(__m512i states) const {
        return paired<D>(values_of(_mm512_srai_epi32(_mm512_slli_epi32(states, 16), 16), scale_),
                         values_of(_mm512_srai_epi32(states, 16), scale_));
    }

    // What turned() gives is below 2^17 once it is made positive: as the mantissa of a float, it needs no
    // conversion.
    static constexpr float kTurnedZero = 0x1p23f + 0x1p16f;

    KVCAST_AVX512_INLINE __m512 turned_by(__m512i states, __m512i factors) const {
        constexpr int kExponent = 0x4b000000;  // of 2^23
        const __m512i half = _mm512_set1_epi32((1 << (kTrigBits - 1)) + (1 << (16 + kTrigBits)));
        const __m512i sum = _mm512_dpwssd_epi32(half, states, factors);
        const __m512i bits =
            _mm512_shldi_epi32(_mm512_set1_epi32(kExponent >> (32 - kTrigBits)), sum, 32 - kTrigBits);
        return _mm512_fmsub_ps(_mm512_castsi512_ps(bits), scale_, turned_zero_);
    }

    // Two pairs: of tokens 0 to 3 of each eight, and of the others.
    template <bool Whole>
    KVCAST_AVX512_INLINE void turn(std::size_t pair, std::size_t token, std::size_t tokens, __m512i* first,
                                   __m512i* second) const {
        const Rotation& r = h_.rotation;
        __m512 one[2][2], other[2][2];  // [pair][tokens]
        KVCAST_UNROLL
        for (std::size_t i = 0; i < 2; ++i) {
            const std::size_t a = r.first + pair + i;
            const Mixed s = states<Whole>(a, a + r.partner, token, tokens);
            const __m512i cos = load_row16<Whole>(r.cos + (pair + i) * r.table_stride + token, tokens);
            const __m512i sin = load_row16<Whole>(r.sin + (pair + i) * r.table_stride + token, tokens);
            const Mixed f = mixed(cos, _mm512_sub_epi16(_mm512_setzero_si512(), sin)), g = mixed(sin, cos);
            one[i][0] = turned_by(s.low, f.low);
            one[i][1] = turned_by(s.high, f.high);
            other[i][0] = turned_by(s.low, g.low);
            other[i][1] = turned_by(s.high, g.high);
        }
        KVCAST_UNROLL
        for (std::size_t k = 0; k < 2; ++k) {
            first[k] = paired<D>(one[0][k], one[1][k]);
            second[k] = paired<D>(other[0][k], other[1][k]);
        }
    }

    const HeadStore h_;
    const __m512 scale_;
    const __m512 turned_zero_;  // kTurnedZero times the scale
};

// Up to which exponent of the scale that is finite.
constexpr int kMostTurnedExponent = 96;

template <Dtype D>
KVCAST_AVX512 void store_eights(const HeadStore& h) {
    EightsStore<D>(h).run();
}

// ---- elements as they are ----

KVCAST_AVX512 void store_elements16(const ExactStore& h) {
    const auto* tile = static_cast<const std::uint16_t*>(h.tile);
    EightsWriter out(h.rows, h.row_bytes, h.channels % EightsWriter::kChannels == 0);
    for_tiles(h.tokens, [&](std::size_t token, std::size_t tokens, auto whole) KVCAST_AVX512_LAMBDA {
        for (std::size_t c = 0; c + 8 <= h.channels; c += 8) {
            __m512i r[8];
            KVCAST_UNROLL
            for (std::size_t i = 0; i < 8; ++i)
                r[i] = load_row16<whole.value>(tile + (c + i) * h.tile_stride + token, tokens);
            transpose16(r);
            out.put<whole.value>(r, token, tokens, c);
        }
    });
}

KVCAST_AVX512 void store_elements32(const ExactStore& h) {
    const auto* tile = static_cast<const std::uint32_t*>(h.tile);
    for (std::size_t token = 0; token < h.tokens; token += 16) {
        const std::size_t tokens = std::min<std::size_t>(16, h.tokens - token);
        const auto lanes = static_cast<__mmask16>(first_lanes(tokens));
        for (std::size_t c = 0; c + 4 <= h.channels; c += 4) {
            __m512i r[4];
            KVCAST_UNROLL
            for (std::size_t i = 0; i < 4; ++i)
                r[i] = _mm512_maskz_loadu_epi32(lanes, tile + (c + i) * h.tile_stride + token);
            transpose32(r);
            store_lanes32(r, tokens, static_cast<std::uint8_t*>(h.rows) + token * h.row_bytes + 4 * c,
                          h.row_bytes);
        }
    }
}

// ---- rows to tiles ----

// The elements of the lower and of the upper words of 32 bits, converted.
struct FromBf16 {
    KVCAST_AVX512_INLINE static __m512i lower(__m512i v) { return _mm512_slli_epi32(v, 16); }
    KVCAST_AVX512_INLINE static __m512i upper(__m512i v) {
        return _mm512_andnot_si512(_mm512_set1_epi32(0xffff), v);
    }
};
struct FromF16 {
    KVCAST_AVX512_INLINE static __m512i lower(__m512i v) {
        return _mm512_castps_si512(_mm512_cvtph_ps(_mm512_cvtepi32_epi16(v)));
    }
    KVCAST_AVX512_INLINE static __m512i upper(__m512i v) { return lower(_mm512_srli_epi32(v, 16)); }
};

// 8 channels of up to 32 tokens, transposed: tokens k and k + 16 in the words of lane k.
template <bool Whole>
KVCAST_AVX512_INLINE void load_channels16(const std::uint8_t* rows, std::size_t row_bytes, std::size_t tokens,
                                          __m512i (&channels)[8]) {
    KVCAST_UNROLL
    for (std::size_t j = 0; j < 8; ++j)
        channels[j] = load_lanes<Whole>(rows, row_bytes, j / 2 + j % 2 * 16, 4, tokens);
    transpose16(channels);
}

// The same with the tokens in order.
template <bool Whole>
KVCAST_AVX512_INLINE void load_ordered16(const std::uint8_t* rows, std::size_t row_bytes, std::size_t tokens,
                                         __m512i (&channels)[8]) {
    KVCAST_UNROLL
    for (std::size_t j = 0; j < 8; ++j) channels[j] = load_lanes<Whole>(rows, row_bytes, j, 8, tokens);
    transpose16(channels);
}

// The largest magnitude of floats, which are ordered like their bits.
class Largest {
  public:
    KVCAST_AVX512_INLINE Largest() : most_(_mm512_setzero_si512()) {}
    KVCAST_AVX512_INLINE void see(__m512i floats) {
        most_ = _mm512_max_epi32(most_, _mm512_and_si512(floats, _mm512_set1_epi32(0x7fffffff)));
    }
    KVCAST_AVX512_INLINE void see(__m512 floats) { see(_mm512_castps_si512(floats)); }
    KVCAST_AVX512_INLINE float magnitude() const {
        return scalar::magnitude_of(static_cast<std::uint32_t>(_mm512_reduce_max_epi32(most_)));
    }

  private:
    __m512i most_;
};

// The loads below leave channels over that do not fill a vector. What is loaded for tokens that are not there
// is zero.

// Rows of 16-bit elements to a channel-major tile of floats.
template <typename Convert>
KVCAST_AVX512_INLINE void load_tile16(const HeadLoad& h, Largest& largest) {
    const auto* rows = static_cast<const std::uint8_t*>(h.rows);
    for_tiles(h.tokens, [&](std::size_t token, std::size_t tokens, auto whole) KVCAST_AVX512_LAMBDA {
        const std::uint32_t lanes = first_lanes(tokens);
        for (std::size_t c = 0; c + 8 <= h.channels; c += 8) {
            __m512i r[8];
            load_channels16<whole.value>(rows + token * h.row_bytes + 2 * c, h.row_bytes, tokens, r);
            KVCAST_UNROLL
            for (std::size_t i = 0; i < 8; ++i) {
                float* to = h.tile + (c + i) * h.tile_stride + token;
                const __m512i lower = Convert::lower(r[i]), upper = Convert::upper(r[i]);
                _mm512_mask_storeu_epi32(to, static_cast<__mmask16>(lanes), lower);
                _mm512_mask_storeu_epi32(to + 16, static_cast<__mmask16>(lanes >> 16), upper);
                largest.see(lower);
                largest.see(upper);
            }
        }
    });
}

// Rows of 16-bit elements to a tile of the same.
KVCAST_AVX512 void load_elements16(const void* from, std::size_t row_bytes, std::size_t all_tokens,
                                   std::size_t channels, std::uint16_t* tile, std::size_t stride) {
    const auto* rows = static_cast<const std::uint8_t*>(from);
    for_tiles(all_tokens, [&](std::size_t token, std::size_t tokens, auto whole) KVCAST_AVX512_LAMBDA {
        for (std::size_t c = 0; c + 8 <= channels; c += 8) {
            __m512i r[8];
            load_ordered16<whole.value>(rows + token * row_bytes + 2 * c, row_bytes, tokens, r);
            KVCAST_UNROLL
            for (std::size_t i = 0; i < 8; ++i) {
                std::uint16_t* to = tile + (c + i) * stride + token;
                whole.value ? _mm512_storeu_si512(to, r[i])
                            : _mm512_mask_storeu_epi16(to, first_lanes(tokens), r[i]);
            }
        }
    });
}

KVCAST_AVX512 void load_elements32(const void* from, std::size_t row_bytes, std::size_t all_tokens,
                                   std::size_t channels, void* tile, std::size_t stride) {
    auto* out = static_cast<std::uint32_t*>(tile);
    for (std::size_t token = 0; token < all_tokens; token += 16) {
        const auto* rows = static_cast<const std::uint8_t*>(from) + token * row_bytes;
        const std::size_t tokens = std::min<std::size_t>(16, all_tokens - token);
        for (std::size_t c = 0; c + 4 <= channels; c += 4) {
            __m512i r[4];
            KVCAST_UNROLL
            for (std::size_t j = 0; j < 4; ++j)
                r[j] = load_lanes<false>(rows + 4 * c, row_bytes, j, 4, tokens);
            transpose32(r);
            KVCAST_UNROLL
            for (std::size_t i = 0; i < 4; ++i)
                _mm512_mask_storeu_epi32(out + (c + i) * stride + token,
                                         static_cast<__mmask16>(first_lanes(tokens)), r[i]);
        }
    }
}

// Channels at once.
std::size_t vector_channels(Dtype dtype) {
    return dtype == Dtype::kF32 ? 4 : 8;
}

// Calls step(i, lanes) for every Step elements, all of them there, and for what is left; `lanes` is a
// constant in the first case.
template <std::size_t Step, typename F>
KVCAST_AVX512_INLINE void for_lanes(std::size_t begin, std::size_t end, F&& step) {
    std::size_t i = begin;
    for (; i + Step <= end; i += Step) step(i, std::true_type{}, first_lanes(Step));
    if (i < end) step(i, std::false_type{}, first_lanes(end - i));
}

template <typename Whole>
KVCAST_AVX512_INLINE __m512 load_some(Whole, std::uint32_t lanes, const float* from) {
    if constexpr (Whole::value) return _mm512_loadu_ps(from);
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes), from);
}

KVCAST_AVX512 void unrotate(float* a, float* b, const std::int16_t* cos, const std::int16_t* sin,
                            std::size_t tokens) {
    for_lanes<16>(0, tokens, [&](std::size_t t, auto whole, std::uint32_t some) KVCAST_AVX512_LAMBDA {
        const auto lanes = static_cast<__mmask16>(some);
        const Turned r = unrotated(load_some(whole, lanes, a + t), load_some(whole, lanes, b + t),
                                   load_trig(cos + t, lanes), load_trig(sin + t, lanes));
        _mm512_mask_storeu_ps(a + t, lanes, r.first);
        _mm512_mask_storeu_ps(b + t, lanes, r.second);
    });
}

// Turns channels while they are in registers.
template <typename Convert>
KVCAST_AVX512_INLINE void load_pairs16(const HeadLoad& h, Largest& largest) {
    const Rotation& r = h.rotation;
    for_tiles(h.tokens, [&](std::size_t token, std::size_t tokens, auto whole) KVCAST_AVX512_LAMBDA {
        const auto* rows = static_cast<const std::uint8_t*>(h.rows) + token * h.row_bytes;
        const std::uint32_t lanes = first_lanes(tokens);
        const auto low = static_cast<__mmask16>(lanes), high = static_cast<__mmask16>(lanes >> 16);
        for (std::size_t p = 0; p < r.pairs; p += 8) {
            const std::size_t first = r.first + p, second = first + r.partner;
            __m512i x[8], y[8];
            load_channels16<whole.value>(rows + 2 * first, h.row_bytes, tokens, x);
            load_channels16<whole.value>(rows + 2 * second, h.row_bytes, tokens, y);
            KVCAST_UNROLL
            for (std::size_t i = 0; i < 8; ++i) {
                const std::int16_t* cos = r.cos + (p + i) * r.table_stride + token;
                const std::int16_t* sin = r.sin + (p + i) * r.table_stride + token;
                float* a = h.tile + (first + i) * h.tile_stride + token;
                float* b = h.tile + (second + i) * h.tile_stride + token;
                const Turned lower = unrotated(_mm512_castsi512_ps(Convert::lower(x[i])),
                                               _mm512_castsi512_ps(Convert::lower(y[i])), load_trig(cos, low),
                                               load_trig(sin, low));
                const Turned upper = unrotated(_mm512_castsi512_ps(Convert::upper(x[i])),
                                               _mm512_castsi512_ps(Convert::upper(y[i])),
                                               load_trig(cos + 16, high), load_trig(sin + 16, high));
                _mm512_mask_storeu_ps(a, low, lower.first);
                _mm512_mask_storeu_ps(a + 16, high, upper.first);
                _mm512_mask_storeu_ps(b, low, lower.second);
                _mm512_mask_storeu_ps(b + 16, high, upper.second);
                largest.see(lower.first);
                largest.see(lower.second);
                largest.see(upper.first);
                largest.see(upper.second);
            }
        }
    });
}

// As round_even(), whatever the mode of the processor is.
KVCAST_AVX512_INLINE __m512i rounded(__m512 x) {
    return _mm512_cvt_roundps_epi32(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

KVCAST_AVX512_INLINE std::int64_t sum_of(__m512i signed32) {
    return _mm512_reduce_add_epi64(
        _mm512_add_epi64(_mm512_cvtepi32_epi64(_mm512_castsi512_si256(signed32)),
                         _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(signed32, 1))));
}

}  // namespace

void store_head(const HeadStore& head) {
    const bool eights =
        head.scale.exponent <= kMostTurnedExponent && come_in(8, head.rotation, head.channels);
    if (eights && head.dtype != Dtype::kF32)
        return head.dtype == Dtype::kF16 ? store_eights<Dtype::kF16>(head) : store_eights<Dtype::kBf16>(head);
    if (head.channels > kMostChannels) return scalar::store_head(head);
    switch (head.dtype) {
        case Dtype::kBf16:
            return store_head_as<Dtype::kBf16>(head);
        case Dtype::kF16:
            return store_head_as<Dtype::kF16>(head);
        default:
            return store_head_as<Dtype::kF32>(head);
    }
}

void store_exact(const ExactStore& head) {
    if (head.rotation.pairs != 0 || head.source != head.dtype) return scalar::store_exact(head);
    head.dtype == Dtype::kF32 ? store_elements32(head) : store_elements16(head);
    const std::size_t bytes = dtype_bytes(head.dtype);
    const std::size_t done = head.channels / vector_channels(head.dtype) * vector_channels(head.dtype);
    ExactStore rest = head;
    rest.tile = static_cast<const std::uint8_t*>(head.tile) + done * head.tile_stride * bytes;
    rest.channels -= done;
    rest.rows = static_cast<std::uint8_t*>(head.rows) + done * bytes;
    if (rest.channels != 0) scalar::store_exact(rest);
}

void load_elements(const void* rows, std::size_t row_bytes, Dtype dtype, std::size_t tokens,
                   std::size_t channels, void* tile, std::size_t tile_stride) {
    dtype == Dtype::kF32
        ? load_elements32(rows, row_bytes, tokens, channels, tile, tile_stride)
        : load_elements16(rows, row_bytes, tokens, channels, static_cast<std::uint16_t*>(tile), tile_stride);
    const std::size_t bytes = dtype_bytes(dtype);
    const std::size_t done = channels / vector_channels(dtype) * vector_channels(dtype);
    if (done != channels)
        scalar::load_elements(static_cast<const std::uint8_t*>(rows) + done * bytes, row_bytes, dtype, tokens,
                              channels - done, static_cast<std::uint8_t*>(tile) + done * tile_stride * bytes,
                              tile_stride);
}

namespace {

// Channels from `begin` to `end` of 16-bit elements, not turned.
template <typename Convert>
KVCAST_AVX512_INLINE float load_plain16(const HeadLoad& head, std::size_t begin, std::size_t end,
                                        Largest& largest) {
    if (begin >= end) return 0;
    const auto from = [&](std::size_t channel) {
        HeadLoad some = head;
        some.rows = static_cast<const std::uint16_t*>(head.rows) + channel;
        some.channels = end - channel;
        some.tile += channel * head.tile_stride;
        some.rotation = {};
        return some;
    };
    load_tile16<Convert>(from(begin), largest);
    const std::size_t left = (end - begin) % 8;
    return left == 0 ? 0 : scalar::load_head(from(end - left));
}

// Turns what comes in eights.
template <typename Convert>
KVCAST_AVX512 float load_eights16(const HeadLoad& h) {
    const Rotation& r = h.rotation;
    Largest largest;
    load_plain16<Convert>(h, 0, r.first, largest);
    load_pairs16<Convert>(h, largest);
    load_plain16<Convert>(h, r.first + 2 * r.pairs, h.channels, largest);
    return largest.magnitude();
}

template <typename Convert>
KVCAST_AVX512 float load_all16(const HeadLoad& h) {
    Largest largest;
    const float rest = load_plain16<Convert>(h, 0, h.channels, largest);
    return std::max(largest.magnitude(), rest);
}

KVCAST_AVX512 float largest_of_tile(const HeadLoad& h) {
    Largest largest;
    for (std::size_t c = 0; c < h.channels; ++c) {
        const float* row = h.tile + c * h.tile_stride;
        for_lanes<16>(0, h.tokens, [&](std::size_t t, auto whole, std::uint32_t lanes) KVCAST_AVX512_LAMBDA {
            largest.see(load_some(whole, lanes, row + t));
        });
    }
    return largest.magnitude();
}

// Any channels, turned where they lie in the tile.
float load_any(const HeadLoad& h) {
    if (h.dtype == Dtype::kF32) {
        load_elements(h.rows, h.row_bytes, h.dtype, h.tokens, h.channels, h.tile, h.tile_stride);
    } else {
        h.dtype == Dtype::kBf16 ? load_all16<FromBf16>(h) : load_all16<FromF16>(h);
    }
    scalar::turn_back(h, unrotate);
    return largest_of_tile(h);
}

}  // namespace

float load_head(const HeadLoad& head) {
    const Rotation& r = head.rotation;
    if (head.dtype == Dtype::kF32 || (r.pairs != 0 && !come_in(8, r, head.channels))) return load_any(head);
    if (r.pairs == 0)
        return head.dtype == Dtype::kBf16 ? load_all16<FromBf16>(head) : load_all16<FromF16>(head);
    return head.dtype == Dtype::kBf16 ? load_eights16<FromBf16>(head) : load_eights16<FromF16>(head);
}

KVCAST_AVX512 Moments moments(const float* values, std::size_t count, float scale) {
    constexpr std::size_t kMostAtOnce = 16 * 256;  // values whose sum of 22 bits each stays within 32
    const __m512 factor = _mm512_set1_ps(scale);
    __m512i squares = _mm512_setzero_si512(), more_squares = squares;
    Moments m = {0, 0};
    for (std::size_t begin = 0; begin < count; begin += kMostAtOnce) {
        const std::size_t end = std::min(count, begin + kMostAtOnce);
        __m512i sum = _mm512_setzero_si512();
        for_lanes<16>(begin, end, [&](std::size_t i, auto whole, std::uint32_t lanes) KVCAST_AVX512_LAMBDA {
            const __m512i v = rounded(_mm512_mul_ps(load_some(whole, lanes, values + i), factor));
            const __m512i odd = _mm512_srli_epi64(v, 32);
            squares = _mm512_add_epi64(squares, _mm512_mul_epi32(v, v));
            more_squares = _mm512_add_epi64(more_squares, _mm512_mul_epi32(odd, odd));
            sum = _mm512_add_epi32(sum, v);
        });
        m.sum += sum_of(sum);
    }
    m.sum_of_squares =
        static_cast<std::uint64_t>(_mm512_reduce_add_epi64(_mm512_add_epi64(squares, more_squares)));
    return m;
}

KVCAST_AVX512 std::int64_t rounded_sum(const float* values, std::size_t count, float scale) {
    constexpr std::size_t kMostAtOnce = 16 * 256;  // as above
    const __m512 factor = _mm512_set1_ps(scale);
    std::int64_t total = 0;
    for (std::size_t begin = 0; begin < count; begin += kMostAtOnce) {
        __m512i sum = _mm512_setzero_si512();
        for_lanes<16>(begin, std::min(count, begin + kMostAtOnce),
                      [&](std::size_t i, auto whole, std::uint32_t lanes) KVCAST_AVX512_LAMBDA {
                          const __m512 v = _mm512_mul_ps(load_some(whole, lanes, values + i), factor);
                          sum = _mm512_add_epi32(sum, rounded(v));
                      });
        total += sum_of(sum);
    }
    return total;
}

namespace {

struct QuantiseStep {
    __m512 factor;
    __m512 step;
    __m512 most;
    __m512 least;
};

KVCAST_AVX512_INLINE __m512i quantised(const QuantiseStep& s, __m512 value, __m512 prediction) {
    const __m512 residual = _mm512_mul_ps(_mm512_sub_ps(_mm512_mul_ps(value, s.factor), prediction), s.step);
    return rounded(_mm512_min_ps(s.most, _mm512_max_ps(s.least, residual)));
}

template <bool Constant>
KVCAST_AVX512 std::uint64_t quantise_as(const Quantisation& x) {
    const __m512 most = _mm512_set1_ps(static_cast<float>(x.limit));
    const QuantiseStep s = {_mm512_set1_ps(x.inverse_unit),
                            _mm512_set1_ps(power_of_two(-static_cast<int>(x.shift))), most,
                            _mm512_sub_ps(_mm512_setzero_ps(), most)};
    const __m512 mean = _mm512_set1_ps(x.mean);
    const __m512i ordered = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), ones = _mm512_set1_epi16(1);
    std::uint64_t total = 0;
    constexpr std::size_t kMostAtOnce =
        32 * 32768;  // values whose magnitudes' sum stays within 32 bits a lane
    for (std::size_t begin = 0; begin < x.count; begin += kMostAtOnce) {
        const std::size_t end = std::min(x.count, begin + kMostAtOnce);
        __m512i sum = _mm512_setzero_si512();
        for_lanes<32>(begin, end, [&](std::size_t i, auto whole, std::uint32_t lanes) KVCAST_AVX512_LAMBDA {
            __m512 first = mean, second = mean;
            if constexpr (!Constant) {
                const __m512i p = whole.value ? _mm512_loadu_si512(x.prediction + i)
                                              : _mm512_maskz_loadu_epi16(lanes, x.prediction + i);
                first = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_castsi512_si256(p)));
                second = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(p, 1)));
            }
            const __m512i a = quantised(s, load_some(whole, lanes, x.values + i), first);
            const __m512i b = quantised(s, load_some(whole, lanes >> 16, x.values + i + 16), second);
            __m512i v = _mm512_permutexvar_epi64(ordered, _mm512_packs_epi32(a, b));
            if constexpr (whole.value) {
                _mm512_storeu_si512(x.q + i, v);
            } else {
                v = _mm512_maskz_mov_epi16(lanes, v);
                _mm512_mask_storeu_epi16(x.q + i, lanes, v);
            }
            sum = _mm512_dpwssd_epi32(sum, _mm512_abs_epi16(v), ones);
        });
        total += static_cast<std::uint64_t>(_mm512_reduce_add_epi64(
            _mm512_add_epi64(_mm512_cvtepu32_epi64(_mm512_castsi512_si256(sum)),
                             _mm512_cvtepu32_epi64(_mm512_extracti64x4_epi64(sum, 1)))));
    }
    return total;
}

}  // namespace

std::uint64_t quantise(const Quantisation& x) {
    return x.prediction == nullptr ? quantise_as<true>(x) : quantise_as<false>(x);
}

KVCAST_AVX512 void reconstruct(const std::int16_t* q, const std::int16_t* prediction, std::size_t count,
                               unsigned shift, std::int16_t* states) {
    const __m512i factors = _mm512_set1_epi32(1 | 1 << (16 + shift));  // prediction * 1 + q * 2^shift
    for (std::size_t i = 0; i < count; i += 32) {
        const std::uint32_t lanes = first_lanes(count - i);
        const __m512i p = _mm512_maskz_loadu_epi16(lanes, prediction + i);
        const __m512i x = _mm512_maskz_loadu_epi16(lanes, q + i);
        const __m512i low = _mm512_madd_epi16(_mm512_unpacklo_epi16(p, x), factors);
        const __m512i high = _mm512_madd_epi16(_mm512_unpackhi_epi16(p, x), factors);
        _mm512_mask_storeu_epi16(states + i, lanes, _mm512_packs_epi32(low, high));
    }
}

}  // namespace kvcast::kernels::avx512
