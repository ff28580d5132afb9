// 32 lanes are four vectors of states. A table is three pairs of vectors; look-ups permute both of a pair and
// blend. Refill spreads the next words over the lanes that are low by a table of permutations.
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#include "kernels/avx2/slots.h"
#include "kernels/avx2/target.h"
#include "kernels/avx2/vectors.h"
#include "kernels/x86/lanes.h"
#include "kernels/x86/words.h"

namespace kvcast::kernels::avx2 {
namespace {

using x86::first_lanes;
using x86::Words;

constexpr std::size_t kVectors = 4;  // of 8 lanes

struct States {
    __m256i at[kVectors];
};

KVCAST_AVX2_INLINE States load_states(const std::uint32_t* state) {
    return {{load256(state), load256(state + 8), load256(state + 16), load256(state + 24)}};
}

KVCAST_AVX2_INLINE void store_states(std::uint32_t* state, const States& s) {
    KVCAST_UNROLL
    for (std::size_t i = 0; i < kVectors; ++i) store256(state + 8 * i, s.at[i]);
}

// 16 numbers, and the one of each index (its low four bits).
struct Sixteen {
    __m256i low;
    __m256i high;
};

KVCAST_AVX2_INLINE Sixteen sixteen(const std::uint32_t* numbers) {
    return {load256(numbers), load256(numbers + 8)};
}

KVCAST_AVX2_INLINE __m256i blended(__m256i a, __m256i b, __m256i by_sign) {
    return _mm256_castps_si256(
        _mm256_blendv_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), _mm256_castsi256_ps(by_sign)));
}

KVCAST_AVX2_INLINE __m256i looked_up(const Sixteen& numbers, __m256i index) {
    return blended(_mm256_permutevar8x32_epi32(numbers.low, index),
                   _mm256_permutevar8x32_epi32(numbers.high, index), _mm256_slli_epi32(index, 28));
}

struct Table {
    Sixteen last;   // of a bucket's first entry: divider - 1
    Sixteen first;  // a bucket's entries
    Sixteen second;
};

KVCAST_AVX2_INLINE Table load_table(const DecodeTable& table) {
    const AliasTable& t = table.alias;
    alignas(32) std::uint32_t last[kSymbols], first[kSymbols], second[kSymbols];
    for (std::size_t b = 0; b < kSymbols; ++b) {
        last[b] = t.divider[b] - 1;
        first[b] = t.entry[2 * b];
        second[b] = t.entry[2 * b + 1];
    }
    return {sixteen(last), sixteen(first), sixteen(second)};
}

KVCAST_AVX2_INLINE __m256i entries_of(__m256i state, const Table& t) {
    const __m256i bucket = _mm256_srli_epi32(state, kBucketBits);
    const __m256i within = _mm256_and_si256(state, _mm256_set1_epi32(kBucketSlots - 1));
    const __m256i beyond = _mm256_sub_epi32(looked_up(t.last, bucket), within);  // negative: the second entry
    return blended(looked_up(t.first, bucket), looked_up(t.second, bucket), beyond);
}

KVCAST_AVX2_INLINE __m256i advanced(__m256i state, __m256i entry) {
    const __m256i mask = _mm256_set1_epi32(kProbabilityMask);
    const __m256i frequency = _mm256_and_si256(_mm256_srli_epi32(entry, 4), mask);
    const __m256i rank = _mm256_and_si256(_mm256_add_epi32(state, _mm256_srli_epi32(entry, 18)), mask);
    return _mm256_add_epi32(_mm256_mullo_epi32(frequency, _mm256_srli_epi32(state, kProbabilityBits)), rank);
}

// For each set of lanes, a permutation of 8: spread[m] gives lane i of m the number of lanes of m below it;
// gathered[m] puts the lanes of m, in order, at the upper end.
struct Permutations {
    std::uint8_t spread[256][8];
    std::uint8_t gathered[256][8];
};

constexpr Permutations permutations() {
    Permutations p = {};
    for (unsigned m = 0; m < 256; ++m) {
        unsigned below = 0, at = 8 - static_cast<unsigned>(std::popcount(m));
        for (unsigned i = 0; i < 8; ++i) {
            p.spread[m][i] = static_cast<std::uint8_t>(below);
            if ((m >> i & 1u) == 0) continue;
            ++below;
            p.gathered[m][at++] = static_cast<std::uint8_t>(i);
        }
    }
    return p;
}

alignas(64) constexpr Permutations kPermutations = permutations();

KVCAST_AVX2_INLINE __m256i permutation(const std::uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}

KVCAST_AVX2_INLINE unsigned sign_mask(__m256i v) {
    return static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(v)));
}

// Full lanes for the lowest eight bits.
KVCAST_AVX2_INLINE __m256i lanes_of(std::uint32_t bits) {
    const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), each), each);
}

KVCAST_AVX2_INLINE __m256i refilled(__m256i state, __m256i low, Words& words) {
    const unsigned mask = sign_mask(low);
    const __m256i next = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(words.next)));
    words.next += 2 * std::popcount(mask);
    const __m256i word = _mm256_permutevar8x32_epi32(next, permutation(kPermutations.spread[mask]));
    return _mm256_blendv_epi8(state, _mm256_or_si256(_mm256_slli_epi32(state, 16), word), low);
}

// 32 lanes of 16 bits.
struct Half {
    __m256i low;
    __m256i high;
};

// Lanes of 32 bits, each within unsigned 16.
KVCAST_AVX2_INLINE __m256i packed(__m256i a, __m256i b) {
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8);
}

template <bool Whole>
KVCAST_AVX2_INLINE Half take_symbols(States& s, const Table& t, std::uint32_t lanes, Words& words) {
    __m256i symbol[kVectors];
    KVCAST_UNROLL
    for (std::size_t i = 0; i < kVectors; ++i) {
        const __m256i entry = entries_of(s.at[i], t);
        symbol[i] = _mm256_and_si256(entry, _mm256_set1_epi32(15));
        __m256i x = advanced(s.at[i], entry);
        __m256i low = _mm256_cmpeq_epi32(_mm256_srli_epi32(x, 16), _mm256_setzero_si256());
        if constexpr (!Whole) {
            const __m256i there = lanes_of(lanes >> (8 * i));
            x = _mm256_blendv_epi8(s.at[i], x, there);
            low = _mm256_and_si256(low, there);
        }
        s.at[i] = refilled(x, low, words);
    }
    return {packed(symbol[0], symbol[1]), packed(symbol[2], symbol[3])};
}

// One bit per lane of 16 bits that is all ones.
KVCAST_AVX2_INLINE std::uint32_t lane_mask(const Half& v) {
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(v.low, v.high), 0xd8);
    return static_cast<std::uint32_t>(_mm256_movemask_epi8(bytes));
}

KVCAST_AVX2_INLINE std::uint32_t escapes_of(const Half& symbols) {
    const __m256i escape = _mm256_set1_epi16(kEscape);
    return lane_mask({_mm256_cmpeq_epi16(symbols.low, escape), _mm256_cmpeq_epi16(symbols.high, escape)});
}

KVCAST_AVX2_INLINE __m256i plane_of(std::uint16_t word, __m256i bit) {
    const __m256i each = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192,
                                           16384, static_cast<short>(-32768));
    const __m256i set = _mm256_and_si256(_mm256_set1_epi16(static_cast<short>(word)), each);
    return _mm256_and_si256(_mm256_cmpeq_epi16(set, each), bit);
}

KVCAST_AVX2_INLINE std::uint16_t word_at(const std::uint8_t* p) {
    std::uint16_t w;
    std::memcpy(&w, p, sizeof w);
    return w;
}

// Raw bits, up to 16 planes; planes of 16 lanes or fewer have one word.
KVCAST_AVX2_INLINE Half take_raw(unsigned planes, bool both, Words& words) {
    Half raw = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    __m256i bit = _mm256_set1_epi16(1);
    for (unsigned p = 0; p < planes; ++p) {
        raw.low = _mm256_or_si256(raw.low, plane_of(word_at(words.next), bit));
        words.next += 2;
        if (both) {
            raw.high = _mm256_or_si256(raw.high, plane_of(word_at(words.next), bit));
            words.next += 2;
        }
        bit = _mm256_add_epi16(bit, bit);
    }
    return raw;
}

KVCAST_AVX2_INLINE Half take_escapes(const Half& high, std::uint32_t escapes, Words& words) {
    alignas(32) std::uint16_t lanes[kLanes];
    store256(lanes, high.low);
    store256(lanes + 16, high.high);
    for (; escapes != 0; escapes &= escapes - 1, words.next += 2)
        std::memcpy(&lanes[std::countr_zero(escapes)], words.next, 2);
    return {load256(lanes), load256(lanes + 16)};
}

KVCAST_AVX2_INLINE __m256i value_of(__m256i high, __m256i raw, unsigned shift) {
    const __m256i half = _mm256_set1_epi16(static_cast<short>(shift == 0 ? 0 : 1 << (shift - 1)));
    const __m256i shifted = _mm256_sll_epi16(high, _mm_cvtsi32_si128(static_cast<int>(shift)));
    return _mm256_sub_epi16(_mm256_add_epi16(shifted, raw), half);
}

template <bool Whole>
KVCAST_AVX2_INLINE void decode_group(States& s, const Table& t, unsigned shift, std::uint32_t lanes,
                                     Words& words, std::int16_t* values) {
    words.prepare();
    const Half symbols = take_symbols<Whole>(s, t, lanes, words);
    std::uint32_t escapes = escapes_of(symbols);
    if constexpr (!Whole) escapes &= lanes;
    const __m256i zero = _mm256_set1_epi16(kSymbolZero);
    Half high = {_mm256_sub_epi16(symbols.low, zero), _mm256_sub_epi16(symbols.high, zero)};
    Half raw = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    if (shift != 0) raw = take_raw(shift, Whole || lanes > 0xffff, words);
    if (escapes != 0) [[unlikely]]
        high = take_escapes(high, escapes, words);
    const __m256i a = value_of(high.low, raw.low, shift), b = value_of(high.high, raw.high, shift);
    if constexpr (Whole) {
        store256(values, a);
        store256(values + 16, b);
    } else {
        alignas(32) std::int16_t out[kLanes];
        store256(out, a);
        store256(out + 16, b);
        std::memcpy(values, out, sizeof(std::int16_t) * static_cast<unsigned>(std::popcount(lanes)));
    }
}

KVCAST_AVX2 void decode_in_order(RansDecoder& decoder, const Strip* strips, std::size_t steps,
                                 std::size_t stride) {
    States s = load_states(decoder.state);
    Words words;
    Words::Tail tail;
    words.begin(decoder, tail);
    for (std::size_t step = 0; step < steps; ++step, strips += stride) {
        const Strip& strip = *strips;
        if (strip.table == nullptr) {
            std::fill_n(strip.values, strip.count, std::int16_t{0});
            continue;
        }
        const Table t = load_table(*strip.table);
        std::size_t at = 0;
        for (; at + kLanes <= strip.count; at += kLanes)
            decode_group<true>(s, t, strip.shift, ~0u, words, strip.values + at);
        if (at != strip.count)
            decode_group<false>(s, t, strip.shift, first_lanes(strip.count - at), words, strip.values + at);
    }
    words.finish(decoder);
    store_states(decoder.state, s);
}

// ---- floats ----

// 8 of 32 lanes of 16 bits, as 32.
template <bool Signed>
KVCAST_AVX2_INLINE __m256i eighth(const Half& v, std::size_t i) {
    const __m256i half = i < 2 ? v.low : v.high;
    const __m128i quarter = i % 2 == 0 ? _mm256_castsi256_si128(half) : _mm256_extracti128_si256(half, 1);
    return Signed ? _mm256_cvtepi16_epi32(quarter) : _mm256_cvtepu16_epi32(quarter);
}

template <Dtype D, bool Whole>
KVCAST_AVX2_INLINE void decode_float_group(States& s, const Table& t, std::uint32_t center,
                                           std::uint32_t lanes, Words& words, std::uint32_t* bits) {
    constexpr unsigned mantissa = mantissa_bits(D);
    constexpr unsigned sign_shift = D == Dtype::kF32 ? 31 : 15;
    words.prepare();
    const Half symbols = take_symbols<Whole>(s, t, lanes, words);
    std::uint32_t escapes = escapes_of(symbols);
    if constexpr (!Whole) escapes &= lanes;
    const bool both = Whole || lanes > 0xffff;
    const Half raw = take_raw(std::min(mantissa + 1, 16u), both, words);
    Half upper = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    if constexpr (mantissa + 1 > 16) upper = take_raw(mantissa + 1 - 16, both, words);
    const __m256i zero = _mm256_set1_epi16(kSymbolZero);
    Half high = {_mm256_sub_epi16(symbols.low, zero), _mm256_sub_epi16(symbols.high, zero)};
    if (escapes != 0) [[unlikely]]
        high = take_escapes(high, escapes, words);
    const __m256i middle = _mm256_set1_epi32(static_cast<int>(center));
    const __m256i range = _mm256_set1_epi32(static_cast<int>(exponent_mask(D)));
    alignas(32) std::uint32_t out[kLanes];
    std::uint32_t* to = Whole ? bits : out;
    KVCAST_UNROLL
    for (std::size_t i = 0; i < kVectors; ++i) {
        __m256i r = eighth<false>(raw, i);
        if constexpr (mantissa + 1 > 16)
            r = _mm256_or_si256(r, _mm256_slli_epi32(eighth<false>(upper, i), 16));
        const __m256i exponent = _mm256_and_si256(_mm256_sub_epi32(middle, eighth<true>(high, i)), range);
        const __m256i sign = _mm256_slli_epi32(_mm256_srli_epi32(r, mantissa), sign_shift);
        const __m256i fraction = _mm256_and_si256(r, _mm256_set1_epi32((1 << mantissa) - 1));
        store256(to + 8 * i,
                 _mm256_or_si256(sign, _mm256_or_si256(fraction, _mm256_slli_epi32(exponent, mantissa))));
    }
    if constexpr (!Whole)
        std::memcpy(bits, out, sizeof(std::uint32_t) * static_cast<unsigned>(std::popcount(lanes)));
}

template <Dtype D>
KVCAST_AVX2 void decode_float_strip(RansDecoder& decoder, const FloatStrip& strip, std::size_t count) {
    States s = load_states(decoder.state);
    Words words;
    Words::Tail tail;
    words.begin(decoder, tail);
    const Table t = load_table(*strip.table);
    std::size_t at = 0;
    for (; at + kLanes <= count; at += kLanes)
        decode_float_group<D, true>(s, t, strip.center, ~0u, words, strip.bits + at);
    if (at != count)
        decode_float_group<D, false>(s, t, strip.center, first_lanes(count - at), words, strip.bits + at);
    words.finish(decoder);
    store_states(decoder.state, s);
}

// ---- encoding ----

struct Coding {
    Sixteen frequency;
    Sixteen reciprocal;
    const EncodeTable* table;
};

KVCAST_AVX2_INLINE Coding load_coding(const EncodeTable& t) {
    return {sixteen(t.frequency), sixteen(t.reciprocal), &t};
}

// The high halves of 32-bit products.
KVCAST_AVX2_INLINE __m256i high_product(__m256i a, __m256i b) {
    const __m256i even = _mm256_srli_epi64(_mm256_mul_epu32(a, b), 32);
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), _mm256_srli_epi64(b, 32));
    return _mm256_blend_epi32(even, odd, 0xaa);
}

// All ones where a >= b, unsigned.
KVCAST_AVX2_INLINE __m256i at_least(__m256i a, __m256i b) {
    return _mm256_cmpeq_epi32(_mm256_max_epu32(a, b), a);
}

// Puts a symbol into each of 8 states that is set in `lanes`; words that states give away go below `next`,
// ascending with the lanes, and what is below them is overwritten.
KVCAST_AVX2_INLINE __m256i put_symbols(__m256i state, __m256i symbols, const Coding& c, std::uint32_t lanes,
                                       std::uint8_t*& next) {
    const __m256i there = lanes_of(lanes);
    const __m256i frequency = looked_up(c.frequency, symbols);
    const __m256i full =
        _mm256_and_si256(at_least(_mm256_srli_epi32(state, 32 - kProbabilityBits), frequency), there);
    const unsigned mask = sign_mask(full);
    const __m256i words =
        _mm256_and_si256(_mm256_permutevar8x32_epi32(state, permutation(kPermutations.gathered[mask])),
                         _mm256_set1_epi32(0xffff));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(next - 16),
                     _mm256_castsi256_si128(packed(words, _mm256_setzero_si256())));
    next -= 2 * std::popcount(mask);
    const __m256i x = _mm256_blendv_epi8(state, _mm256_srli_epi32(state, 16), full);
    __m256i quotient = high_product(x, looked_up(c.reciprocal, symbols));
    __m256i rank = _mm256_sub_epi32(x, _mm256_mullo_epi32(quotient, frequency));
    const __m256i short_by_one = at_least(rank, frequency);
    quotient = _mm256_sub_epi32(quotient, short_by_one);
    rank = _mm256_sub_epi32(rank, _mm256_and_si256(short_by_one, frequency));
    alignas(32) std::uint32_t symbol[8], ranks[8], slot[8];
    store256(symbol, symbols);
    store256(ranks, _mm256_and_si256(rank, _mm256_set1_epi32(kProbabilityMask)));
    KVCAST_UNROLL
    for (std::size_t i = 0; i < 8; ++i)
        slot[i] = c.table->slot[(c.table->start[symbol[i]] + ranks[i]) & kProbabilityMask];
    const __m256i after = _mm256_or_si256(_mm256_slli_epi32(quotient, kProbabilityBits), load256(slot));
    return _mm256_blendv_epi8(state, after, there);
}

struct Symbols {
    Half symbols;
    std::uint32_t escapes;
};

KVCAST_AVX2_INLINE Symbols symbols_of(const Half& high) {
    const __m256i zero = _mm256_set1_epi16(kSymbolZero), escape = _mm256_set1_epi16(kEscape);
    const Half symbols = {_mm256_min_epu16(_mm256_add_epi16(high.low, zero), escape),
                          _mm256_min_epu16(_mm256_add_epi16(high.high, zero), escape)};
    return {symbols, escapes_of(symbols)};
}

KVCAST_AVX2_INLINE void put_word(std::uint8_t*& next, std::uint32_t word) {
    const auto w = static_cast<std::uint16_t>(word);
    next -= 2;
    std::memcpy(next, &w, sizeof w);
}

KVCAST_AVX2_INLINE void put_escapes(const Half& high, std::uint32_t escapes, std::uint8_t*& next) {
    alignas(32) std::uint16_t lanes[kLanes];
    store256(lanes, high.low);
    store256(lanes + 16, high.high);
    for (; escapes != 0; escapes &= ~(1u << (31 - std::countl_zero(escapes))))
        put_word(next, lanes[31 - std::countl_zero(escapes)]);
}

KVCAST_AVX2_INLINE void put_raw(const Half& raw, unsigned planes, std::uint32_t lanes, std::uint8_t*& next) {
    for (unsigned p = planes; p-- > 0;) {
        const __m128i up = _mm_cvtsi32_si128(static_cast<int>(15 - p));
        const Half signs = {_mm256_srai_epi16(_mm256_sll_epi16(raw.low, up), 15),
                            _mm256_srai_epi16(_mm256_sll_epi16(raw.high, up), 15)};
        const std::uint32_t plane = lane_mask(signs) & lanes;
        if (lanes > 0xffff) put_word(next, plane >> 16);
        put_word(next, plane);
    }
}

KVCAST_AVX2_INLINE void put_group(States& s, const Half& symbols, const Coding& c, std::uint32_t lanes,
                                  std::uint8_t*& next) {
    s.at[3] = put_symbols(s.at[3], eighth<false>(symbols, 3), c, lanes >> 24, next);
    s.at[2] = put_symbols(s.at[2], eighth<false>(symbols, 2), c, lanes >> 16, next);
    s.at[1] = put_symbols(s.at[1], eighth<false>(symbols, 1), c, lanes >> 8, next);
    s.at[0] = put_symbols(s.at[0], eighth<false>(symbols, 0), c, lanes, next);
}

// Where a group begins, its lanes, and its values with zeros behind them.
template <typename T>
struct Group {
    std::size_t at;
    std::uint32_t lanes;
    alignas(32) T values[kLanes];

    Group(const T* from, std::size_t end) : at((end - 1) / kLanes * kLanes), lanes(first_lanes(end - at)) {
        const std::size_t bytes = (end - at) * sizeof(T);
        std::memcpy(values, from + at, bytes);
        if (bytes != sizeof values)
            std::memset(reinterpret_cast<std::uint8_t*>(values) + bytes, 0, sizeof values - bytes);
    }
};

KVCAST_AVX2 void encode_one(RansEncoder& encoder, const EncodeStrip& strip) {
    States s = load_states(encoder.state);
    const Coding c = load_coding(*strip.table);
    std::uint8_t* next = encoder.next;
    const __m256i half = _mm256_set1_epi16(static_cast<short>(strip.shift == 0 ? 0 : 1 << (strip.shift - 1)));
    const __m128i by = _mm_cvtsi32_si128(static_cast<int>(strip.shift));
    for (std::size_t end = strip.count; end > 0;) {
        const Group<std::int16_t> g(strip.values, end);
        const Half value = {_mm256_add_epi16(load256(g.values), half),
                            _mm256_add_epi16(load256(g.values + 16), half)};
        const Half high = {_mm256_sra_epi16(value.low, by), _mm256_sra_epi16(value.high, by)};
        const Symbols symbols = symbols_of(high);
        if ((symbols.escapes & g.lanes) != 0) [[unlikely]]
            put_escapes(high, symbols.escapes & g.lanes, next);
        put_raw(value, strip.shift, g.lanes, next);
        put_group(s, symbols.symbols, c, g.lanes, next);
        end = g.at;
    }
    store_states(encoder.state, s);
    encoder.next = next;
}

template <Dtype D>
KVCAST_AVX2 void encode_float_strip(RansEncoder& encoder, const EncodeFloatStrip& strip, std::size_t count) {
    constexpr unsigned mantissa = mantissa_bits(D);
    constexpr unsigned sign_shift = D == Dtype::kF32 ? 31 : 15;
    States s = load_states(encoder.state);
    const Coding c = load_coding(*strip.table);
    std::uint8_t* next = encoder.next;
    const __m256i middle = _mm256_set1_epi32(static_cast<int>(strip.center));
    const __m256i range = _mm256_set1_epi32(static_cast<int>(exponent_mask(D)));
    const __m256i words = _mm256_set1_epi32(0xffff);
    for (std::size_t end = count; end > 0;) {
        const Group<std::uint32_t> g(strip.bits, end);
        __m256i high[kVectors], low[kVectors], upper[kVectors];
        KVCAST_UNROLL
        for (std::size_t i = 0; i < kVectors; ++i) {
            const __m256i b = load256(g.values + 8 * i);
            const __m256i exponent = _mm256_and_si256(_mm256_srli_epi32(b, mantissa), range);
            high[i] = _mm256_and_si256(_mm256_sub_epi32(middle, exponent), words);
            const __m256i sign = _mm256_and_si256(_mm256_srli_epi32(b, sign_shift), _mm256_set1_epi32(1));
            const __m256i raw = _mm256_or_si256(_mm256_slli_epi32(sign, mantissa),
                                                _mm256_and_si256(b, _mm256_set1_epi32((1 << mantissa) - 1)));
            low[i] = _mm256_and_si256(raw, words);
            upper[i] = _mm256_srli_epi32(raw, 16);
        }
        const Half high16 = {packed(high[0], high[1]), packed(high[2], high[3])};
        const Symbols symbols = symbols_of(high16);
        if ((symbols.escapes & g.lanes) != 0) [[unlikely]]
            put_escapes(high16, symbols.escapes & g.lanes, next);
        if constexpr (mantissa + 1 > 16)
            put_raw({packed(upper[0], upper[1]), packed(upper[2], upper[3])}, mantissa + 1 - 16, g.lanes,
                    next);
        put_raw({packed(low[0], low[1]), packed(low[2], low[3])}, std::min(mantissa + 1, 16u), g.lanes, next);
        put_group(s, symbols.symbols, c, g.lanes, next);
        end = g.at;
    }
    store_states(encoder.state, s);
    encoder.next = next;
}

}  // namespace

void decode_strips(std::span<RansDecoder* const> decoders, std::span<const Strip> strips) {
    for (std::size_t d = 0; d < decoders.size(); ++d)
        decode_in_order(*decoders[d], strips.data() + d, strips.size() / decoders.size(), decoders.size());
}

void encode_strips(std::span<RansEncoder* const> encoders, std::span<const EncodeStrip> strips) {
    for (std::size_t i = 0; i < strips.size(); ++i) encode_one(*encoders[i % encoders.size()], strips[i]);
}

void decode_floats(std::span<RansDecoder* const> decoders, std::span<const FloatStrip> strips, Dtype dtype,
                   std::size_t count) {
    const auto decode = dtype == Dtype::kBf16  ? decode_float_strip<Dtype::kBf16>
                        : dtype == Dtype::kF16 ? decode_float_strip<Dtype::kF16>
                                               : decode_float_strip<Dtype::kF32>;
    for (std::size_t d = 0; d < decoders.size(); ++d) decode(*decoders[d], strips[d], count);
}

void encode_floats(std::span<RansEncoder* const> encoders, std::span<const EncodeFloatStrip> strips,
                   Dtype dtype, std::size_t count) {
    const auto encode = dtype == Dtype::kBf16  ? encode_float_strip<Dtype::kBf16>
                        : dtype == Dtype::kF16 ? encode_float_strip<Dtype::kF16>
                                               : encode_float_strip<Dtype::kF32>;
    for (std::size_t e = 0; e < encoders.size(); ++e) encode(*encoders[e], strips[e], count);
}

KVCAST_AVX2 void value_costs(const std::int16_t* values, std::size_t count,
                             const std::uint32_t (*costs)[kValueCosts], std::uint32_t* sums) {
    __m256i low = _mm256_setzero_si256(), high = low;
    for (std::size_t i = 0; i < count; ++i) {
        const std::uint32_t* row = costs[values[i] < 0 ? -values[i] : values[i]];
        low = _mm256_add_epi32(low, load256(row));
        high = _mm256_add_epi32(high, load256(row + 8));
    }
    store256(sums, low);
    store256(sums + 8, high);
}

KVCAST_AVX2 void table_costs(const std::int16_t* counts, const std::int16_t (*costs)[kSymbols][2],
                             std::int32_t* sums) {
    __m256i low = _mm256_setzero_si256(), high = low;
    KVCAST_UNROLL
    for (std::size_t pair = 0; pair < kSymbols / 2; ++pair) {
        std::int32_t n;
        std::memcpy(&n, counts + 2 * pair, sizeof n);
        const __m256i both = _mm256_set1_epi32(n);
        low = _mm256_add_epi32(low, _mm256_madd_epi16(load256(costs[pair]), both));
        high = _mm256_add_epi32(high, _mm256_madd_epi16(load256(costs[pair] + 8), both));
    }
    store256(sums, low);
    store256(sums + 8, high);
}

}  // namespace kvcast::kernels::avx2
