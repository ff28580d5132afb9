// 32 lanes are two vectors of states. A table is three vectors, so that every look-up is a permutation of
// registers; refill expands the next words into the lanes that are low, in ascending order.
#include <immintrin.h>

#include <algorithm>
#include <bit>

#include "kernels/avx512/slots.h"
#include "kernels/avx512/target.h"
#include "kernels/x86/lanes.h"
#include "kernels/x86/words.h"

namespace kvcast::kernels::avx512 {
namespace {

using x86::first_lanes;
using x86::Words;

struct States {
    __m512i low;   // lanes 0..15
    __m512i high;  // lanes 16..31
};

KVCAST_AVX512_INLINE States load_states(const std::uint32_t* state) {
    return {_mm512_load_si512(state), _mm512_load_si512(state + 16)};
}

KVCAST_AVX512_INLINE void store_states(std::uint32_t* state, const States& s) {
    _mm512_store_si512(state, s.low);
    _mm512_store_si512(state + 16, s.high);
}

struct Table {
    __m512i last;   // of a bucket's first entry: divider - 1
    __m512i first;  // a bucket's entries
    __m512i second;
};

KVCAST_AVX512_INLINE Table load_table(const AliasTable& t) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i low = _mm512_load_si512(t.entry), high = _mm512_load_si512(t.entry + kSymbols);
    return {_mm512_sub_epi32(_mm512_load_si512(t.divider), _mm512_set1_epi32(1)),
            _mm512_permutex2var_epi32(low, even, high),
            _mm512_permutex2var_epi32(low, _mm512_or_si512(even, _mm512_set1_epi32(1)), high)};
}

// The entry that each state's slot falls into. Sign bits rather than mask registers select: they are there
// sooner, and states wait for them.
KVCAST_AVX512_INLINE __m512i entries_of(__m512i state, const Table& t) {
    const __m512i bucket = _mm512_srli_epi32(state, kBucketBits);  // permutations use its low four bits
    const __m512i within = _mm512_and_si512(state, _mm512_set1_epi32(kBucketSlots - 1));
    const __m512i beyond =
        _mm512_srai_epi32(_mm512_sub_epi32(_mm512_permutexvar_epi32(bucket, t.last), within), 31);
    return _mm512_ternarylogic_epi32(beyond, _mm512_permutexvar_epi32(bucket, t.second),
                                     _mm512_permutexvar_epi32(bucket, t.first), 0xca);
}

KVCAST_AVX512_INLINE __m512i advanced(__m512i state, __m512i entry) {
    const __m512i mask = _mm512_set1_epi32(kProbabilityMask);
    const __m512i frequency = _mm512_and_si512(_mm512_srli_epi32(entry, 4), mask);
    const __m512i rank = _mm512_and_si512(_mm512_add_epi32(state, _mm512_srli_epi32(entry, 18)), mask);
    return _mm512_add_epi32(_mm512_mullo_epi32(frequency, _mm512_srli_epi32(state, kProbabilityBits)), rank);
}

KVCAST_AVX512_INLINE __m512i refilled(__m512i state, __mmask16 low, Words& words) {
    const __m512i next =
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(words.next)));
    words.next += 2 * std::popcount(static_cast<unsigned>(low));
    return _mm512_mask_or_epi32(state, low, _mm512_slli_epi32(state, 16),
                                _mm512_maskz_expand_epi32(low, next));
}

// Low halves of 32-bit lanes side by side.
KVCAST_AVX512_INLINE __m512i narrowed(__m512i low, __m512i high) {
    const __m512i even = _mm512_set_epi32(
        0x003e003c, 0x003a0038, 0x00360034, 0x00320030, 0x002e002c, 0x002a0028, 0x00260024, 0x00220020,
        0x001e001c, 0x001a0018, 0x00160014, 0x00120010, 0x000e000c, 0x000a0008, 0x00060004, 0x00020000);
    return _mm512_permutex2var_epi16(low, even, high);
}

// Takes a symbol out of each lane that is set in `lanes` (all of them where Whole) and refills: the 32
// symbols, 16 bits each.
template <bool Whole>
KVCAST_AVX512_INLINE __m512i take_symbols(States& s, const Table& t, std::uint32_t lanes, Words& words) {
    const __m512i low = entries_of(s.low, t), high = entries_of(s.high, t);
    __m512i a = advanced(s.low, low), b = advanced(s.high, high);
    const __m512i least = _mm512_set1_epi32(kStateLow);
    __mmask16 a_low = _mm512_cmplt_epu32_mask(a, least), b_low = _mm512_cmplt_epu32_mask(b, least);
    if constexpr (!Whole) {
        const auto a_lanes = static_cast<__mmask16>(lanes), b_lanes = static_cast<__mmask16>(lanes >> 16);
        a = _mm512_mask_mov_epi32(s.low, a_lanes, a);
        b = _mm512_mask_mov_epi32(s.high, b_lanes, b);
        a_low &= a_lanes;
        b_low &= b_lanes;
    }
    s.low = refilled(a, a_low, words);
    s.high = refilled(b, b_low, words);
    return _mm512_and_si512(narrowed(low, high), _mm512_set1_epi16(15));
}

KVCAST_AVX512_INLINE std::uint32_t load_u32(const std::uint8_t* p) {
    std::uint32_t w;
    std::memcpy(&w, p, sizeof w);
    return w;
}

// Raw bits of 32 lanes, plane by plane: the lowest `planes` bits of 16.
KVCAST_AVX512_INLINE __m512i take_raw(unsigned planes, Words& words) {
    __m512i raw = _mm512_setzero_si512();
    __m512i bit = _mm512_set1_epi16(1);
    for (unsigned p = 0; p < planes; ++p, words.next += 4) {
        raw = _mm512_mask_add_epi16(raw, load_u32(words.next), raw, bit);
        bit = _mm512_add_epi16(bit, bit);
    }
    return raw;
}

// The same where planes have one word only.
KVCAST_AVX512_INLINE __m512i take_short_raw(unsigned planes, Words& words) {
    __m512i raw = _mm512_setzero_si512();
    __m512i bit = _mm512_set1_epi16(1);
    for (unsigned p = 0; p < planes; ++p, words.next += 2) {
        raw = _mm512_mask_add_epi16(raw, load_u32(words.next) & 0xffffu, raw, bit);
        bit = _mm512_add_epi16(bit, bit);
    }
    return raw;
}

template <bool Whole>
KVCAST_AVX512_INLINE __m512i take_planes(unsigned planes, std::uint32_t lanes, Words& words) {
    return Whole || lanes > 0xffff ? take_raw(planes, words) : take_short_raw(planes, words);
}

// Puts the words of escaped lanes in place of their symbols' values.
KVCAST_AVX512_INLINE __m512i take_escapes(__m512i high, std::uint32_t escapes, Words& words) {
    alignas(64) std::uint16_t lanes[kLanes];
    _mm512_store_si512(lanes, high);
    for (; escapes != 0; escapes &= escapes - 1, words.next += 2)
        std::memcpy(&lanes[std::countr_zero(escapes)], words.next, 2);
    return _mm512_load_si512(lanes);
}

// One group of `lanes`: values of a strip.
template <bool Whole>
KVCAST_AVX512_INLINE void decode_group(States& s, const Table& t, unsigned shift, std::uint32_t lanes,
                                       Words& words, std::int16_t* values) {
    words.prepare();
    const __m512i symbols = take_symbols<Whole>(s, t, lanes, words);
    std::uint32_t escapes = _mm512_cmpeq_epi16_mask(symbols, _mm512_set1_epi16(kEscape));
    if constexpr (!Whole) escapes &= lanes;
    __m512i value = _mm512_sub_epi16(symbols, _mm512_set1_epi16(kSymbolZero));
    if (shift != 0) {
        const __m512i raw = take_planes<Whole>(shift, lanes, words);
        if (escapes != 0) [[unlikely]]
            value = take_escapes(value, escapes, words);
        const __m512i half = _mm512_set1_epi16(static_cast<std::int16_t>(1 << (shift - 1)));
        value = _mm512_sll_epi16(value, _mm_cvtsi32_si128(static_cast<int>(shift)));
        value = _mm512_sub_epi16(_mm512_add_epi16(value, raw), half);
    } else if (escapes != 0) [[unlikely]] {
        value = take_escapes(value, escapes, words);
    }
    if constexpr (Whole) {
        _mm512_storeu_si512(values, value);
    } else {
        _mm512_mask_storeu_epi16(values, lanes, value);
    }
}

KVCAST_AVX512_INLINE void decode_alone(States& s, Words& words, const Strip& strip) {
    if (strip.table == nullptr) {
        std::fill_n(strip.values, strip.count, std::int16_t{0});
        return;
    }
    const Table t = load_table(*strip.table);
    std::size_t at = 0;
    for (; at + kLanes <= strip.count; at += kLanes)
        decode_group<true>(s, t, strip.shift, ~0u, words, strip.values + at);
    if (at != strip.count)
        decode_group<false>(s, t, strip.shift, first_lanes(strip.count - at), words, strip.values + at);
}

template <std::size_t N>
KVCAST_AVX512_INLINE bool alike(const Strip* strips) {
    bool same = true;
    KVCAST_UNROLL
    for (std::size_t d = 0; d < N; ++d)
        same = same && strips[d].table != nullptr && strips[d].count == strips[0].count;
    return same;
}

// N decoders step by step: while one waits for its states, the others go on.
template <std::size_t N>
KVCAST_AVX512 void decode_abreast(RansDecoder* const* decoders, const Strip* strips, std::size_t steps,
                                  std::size_t stride) {
    States states[N];
    Words words[N];
    KVCAST_UNROLL
    for (std::size_t d = 0; d < N; ++d) {
        states[d] = load_states(decoders[d]->state);
        words[d].begin(*decoders[d]);
    }
    for (std::size_t step = 0; step < steps; ++step, strips += stride) {
        if (N == 1 || !alike<N>(strips)) {
            KVCAST_UNROLL
            for (std::size_t d = 0; d < N; ++d) decode_alone(states[d], words[d], strips[d]);
            continue;
        }
        Table tables[N];
        KVCAST_UNROLL
        for (std::size_t d = 0; d < N; ++d) tables[d] = load_table(*strips[d].table);
        const std::size_t count = strips[0].count;
        std::size_t at = 0;
        for (; at + kLanes <= count; at += kLanes) {
            KVCAST_UNROLL
            for (std::size_t d = 0; d < N; ++d)
                decode_group<true>(states[d], tables[d], strips[d].shift, ~0u, words[d],
                                   strips[d].values + at);
        }
        if (at == count) continue;
        KVCAST_UNROLL
        for (std::size_t d = 0; d < N; ++d)
            decode_group<false>(states[d], tables[d], strips[d].shift, first_lanes(count - at), words[d],
                                strips[d].values + at);
    }
    KVCAST_UNROLL
    for (std::size_t d = 0; d < N; ++d) {
        words[d].finish();
        store_states(decoders[d]->state, states[d]);
    }
}

// 32 lanes of 32 bits.
struct Wide {
    __m512i low;
    __m512i high;
};

KVCAST_AVX512_INLINE Wide widened(__m512i v) {
    return {_mm512_cvtepu16_epi32(_mm512_castsi512_si256(v)),
            _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(v, 1))};
}

// Raw bits to sign and mantissa, exponents put between them.
KVCAST_AVX512_INLINE __m512i assembled(__m512i raw, __m512i high, __m512i center, Dtype dtype) {
    const auto mantissa = static_cast<int>(mantissa_bits(dtype));
    const __m512i mask = _mm512_set1_epi32((1 << mantissa) - 1);
    const __m512i exponent = _mm512_and_si512(_mm512_sub_epi32(center, high),
                                              _mm512_set1_epi32(static_cast<int>(exponent_mask(dtype))));
    const __m128i to_sign = _mm_cvtsi32_si128(dtype == Dtype::kF32 ? 31 : 15);
    const __m512i sign = _mm512_sll_epi32(_mm512_srl_epi32(raw, _mm_cvtsi32_si128(mantissa)), to_sign);
    const __m512i magnitude =
        _mm512_or_si512(_mm512_and_si512(raw, mask), _mm512_sll_epi32(exponent, _mm_cvtsi32_si128(mantissa)));
    return _mm512_or_si512(sign, magnitude);
}

template <bool Whole>
KVCAST_AVX512_INLINE void decode_float_group(States& s, const Table& t, std::uint32_t center, Dtype dtype,
                                             std::uint32_t lanes, Words& words, std::uint32_t* bits) {
    words.prepare();
    const __m512i symbols = take_symbols<Whole>(s, t, lanes, words);
    std::uint32_t escapes = _mm512_cmpeq_epi16_mask(symbols, _mm512_set1_epi16(kEscape));
    if constexpr (!Whole) escapes &= lanes;
    const unsigned planes = mantissa_bits(dtype) + 1;
    Wide raw = widened(take_planes<Whole>(std::min(planes, 16u), lanes, words));
    if (planes > 16) {
        const Wide upper = widened(take_planes<Whole>(planes - 16, lanes, words));
        raw.low = _mm512_or_si512(raw.low, _mm512_slli_epi32(upper.low, 16));
        raw.high = _mm512_or_si512(raw.high, _mm512_slli_epi32(upper.high, 16));
    }
    __m512i high = _mm512_sub_epi16(symbols, _mm512_set1_epi16(kSymbolZero));
    if (escapes != 0) [[unlikely]]
        high = take_escapes(high, escapes, words);
    const __m512i middle = _mm512_set1_epi32(static_cast<std::int32_t>(center));
    const Wide h = {_mm512_cvtepi16_epi32(_mm512_castsi512_si256(high)),
                    _mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(high, 1))};
    const __m512i a = assembled(raw.low, h.low, middle, dtype);
    const __m512i b = assembled(raw.high, h.high, middle, dtype);
    if constexpr (Whole) {
        _mm512_storeu_si512(bits, a);
        _mm512_storeu_si512(bits + 16, b);
    } else {
        _mm512_mask_storeu_epi32(bits, static_cast<__mmask16>(lanes), a);
        _mm512_mask_storeu_epi32(bits + 16, static_cast<__mmask16>(lanes >> 16), b);
    }
}

template <std::size_t N, Dtype D>
KVCAST_AVX512 void decode_floats_abreast(RansDecoder* const* decoders, const FloatStrip* strips,
                                         std::size_t count) {
    States states[N];
    Words words[N];
    Table tables[N];
    KVCAST_UNROLL
    for (std::size_t d = 0; d < N; ++d) {
        states[d] = load_states(decoders[d]->state);
        words[d].begin(*decoders[d]);
        tables[d] = load_table(*strips[d].table);
    }
    std::size_t at = 0;
    for (; at + kLanes <= count; at += kLanes) {
        KVCAST_UNROLL
        for (std::size_t d = 0; d < N; ++d)
            decode_float_group<true>(states[d], tables[d], strips[d].center, D, ~0u, words[d],
                                     strips[d].bits + at);
    }
    KVCAST_UNROLL
    for (std::size_t d = 0; d < N; ++d) {
        if (at != count)
            decode_float_group<false>(states[d], tables[d], strips[d].center, D, first_lanes(count - at),
                                      words[d], strips[d].bits + at);
        words[d].finish();
        store_states(decoders[d]->state, states[d]);
    }
}

template <Dtype D>
void decode_floats_as(std::span<RansDecoder* const> decoders, std::span<const FloatStrip> strips,
                      std::size_t count) {
    std::size_t d = 0;
    for (; d + 4 <= decoders.size(); d += 4)
        decode_floats_abreast<4, D>(decoders.data() + d, strips.data() + d, count);
    for (; d + 2 <= decoders.size(); d += 2)
        decode_floats_abreast<2, D>(decoders.data() + d, strips.data() + d, count);
    if (d < decoders.size()) decode_floats_abreast<1, D>(decoders.data() + d, strips.data() + d, count);
}

// ---- encoding ----

// What putting symbols in takes of an EncodeTable. Slots follow ranks in at most 32 stretches, so that a
// search in registers finds them: a gather from the table of slots takes longer.
struct Coding {
    __m512i frequency;
    __m512i reciprocal;
    __m512i start;       // 16 bits each, as everything below
    __m512i first;       // first index of each stretch
    __m512i offset;      // slot - index of each stretch
    __m512i quarter[3];  // first index of stretches 8, 16 and 24 everywhere
};

KVCAST_AVX512_INLINE Coding load_coding(const EncodeTable& t) {
    Coding c;
    c.frequency = _mm512_load_si512(t.frequency);
    c.reciprocal = _mm512_load_si512(t.reciprocal);
    c.start = _mm512_castsi256_si512(_mm256_load_si256(reinterpret_cast<const __m256i*>(t.start)));
    c.first = _mm512_load_si512(t.stretch_start);
    c.offset = _mm512_load_si512(t.stretch_offset);
    KVCAST_UNROLL
    for (int i = 0; i < 3; ++i)
        c.quarter[i] = _mm512_set1_epi16(static_cast<std::int16_t>(t.stretch_start[8 * (i + 1)]));
    return c;
}

// Adds `step` to the stretches of the lanes whose index is not below `first`.
KVCAST_AVX512_INLINE __m512i stepped(__m512i stretch, __m512i index, __m512i first, std::int16_t step) {
    return _mm512_mask_add_epi16(stretch, _mm512_cmpge_epi16_mask(index, first), stretch,
                                 _mm512_set1_epi16(step));
}

// The slots of 32 indices (start of the symbol + rank), by a search through the stretches in steps of 8,
// 2, 1.
KVCAST_AVX512_INLINE __m512i slots_of(__m512i index, const Coding& c) {
    __m512i stretch = _mm512_setzero_si512();
    KVCAST_UNROLL
    for (int i = 0; i < 3; ++i) stretch = stepped(stretch, index, c.quarter[i], 8);
    const __m512i eights = stretch;
    KVCAST_UNROLL
    for (std::int16_t i = 2; i < 8; i = static_cast<std::int16_t>(i + 2)) {
        const __m512i at = _mm512_add_epi16(eights, _mm512_set1_epi16(i));
        stretch = stepped(stretch, index, _mm512_permutexvar_epi16(at, c.first), 2);
    }
    const __m512i odd = _mm512_add_epi16(stretch, _mm512_set1_epi16(1));
    stretch = stepped(stretch, index, _mm512_permutexvar_epi16(odd, c.first), 1);
    return _mm512_add_epi16(index, _mm512_permutexvar_epi16(stretch, c.offset));
}

// The high halves of 32-bit products.
KVCAST_AVX512_INLINE __m512i high_product(__m512i a, __m512i b) {
    const __m512i even = _mm512_srli_epi64(_mm512_mul_epu32(a, b), 32);
    const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), _mm512_srli_epi64(b, 32));
    return _mm512_mask_mov_epi32(even, 0xaaaa, odd);
}

// 16 states divided by their symbols' frequencies, after those that are full gave a word away: words go below
// `next`, ascending with the lanes, and what is below them is overwritten.
struct Divided {
    __m512i quotient;
    __m512i rank;
};

KVCAST_AVX512_INLINE Divided divided(__m512i state, __m512i symbols, const Coding& c, __mmask16 lanes,
                                     std::uint8_t*& next) {
    const __m512i frequency = _mm512_permutexvar_epi32(symbols, c.frequency);
    const __mmask16 full = _mm512_mask_cmpge_epu32_mask(
        lanes, _mm512_srli_epi32(state, 32 - kProbabilityBits), frequency);  // from state_limit() on
    const auto given = static_cast<unsigned>(std::popcount(static_cast<unsigned>(full)));
    const auto top = static_cast<__mmask16>(0xffff0000u >> given);
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(next - 32),
        _mm512_cvtepi32_epi16(_mm512_maskz_expand_epi32(top, _mm512_maskz_compress_epi32(full, state))));
    next -= 2 * given;
    const __m512i x = _mm512_mask_srli_epi32(state, full, state, 16);
    const __m512i quotient = high_product(x, _mm512_permutexvar_epi32(symbols, c.reciprocal));
    const __m512i rank = _mm512_sub_epi32(x, _mm512_mullo_epi32(quotient, frequency));
    const __mmask16 short_by_one = _mm512_cmpge_epu32_mask(rank, frequency);
    return {_mm512_mask_add_epi32(quotient, short_by_one, quotient, _mm512_set1_epi32(1)),
            _mm512_mask_sub_epi32(rank, short_by_one, rank, frequency)};
}

// The symbols of 32 signed high parts, and which of them escape.
struct Symbols {
    __m512i symbols;  // 16 bits each
    std::uint32_t escapes;
};

KVCAST_AVX512_INLINE Symbols symbols_of(__m512i high) {
    const __m512i shifted = _mm512_add_epi16(high, _mm512_set1_epi16(kSymbolZero));
    const __m512i symbols = _mm512_min_epu16(shifted, _mm512_set1_epi16(kEscape));
    return {symbols, _mm512_cmpeq_epi16_mask(symbols, _mm512_set1_epi16(kEscape))};
}

KVCAST_AVX512_INLINE void put_escapes(__m512i high, std::uint32_t escapes, std::uint8_t*& next) {
    alignas(64) std::uint16_t lanes[kLanes];
    _mm512_store_si512(lanes, high);
    for (; escapes != 0; escapes &= ~(1u << (31 - std::countl_zero(escapes)))) {
        next -= 2;
        std::memcpy(next, &lanes[31 - std::countl_zero(escapes)], 2);
    }
}

// The lowest planes of 16-bit raw parts, highest first.
KVCAST_AVX512_INLINE void put_raw(__m512i raw, unsigned planes, std::uint32_t lanes, std::uint8_t*& next) {
    for (unsigned p = planes; p-- > 0;) {
        const __m512i bit = _mm512_set1_epi16(static_cast<std::int16_t>(1u << p));
        const std::uint32_t plane = _mm512_mask_test_epi16_mask(lanes, raw, bit);
        if (lanes > 0xffff) {
            next -= 4;
            std::memcpy(next, &plane, 4);
        } else {
            next -= 2;
            std::memcpy(next, &plane, 2);
        }
    }
}

// Puts a symbol into each lane that is set in `lanes`.
KVCAST_AVX512_INLINE void put_group(States& s, const Symbols& symbols, const Coding& c, std::uint32_t lanes,
                                    std::uint8_t*& next) {
    const Wide wide = widened(symbols.symbols);
    const auto low_lanes = static_cast<__mmask16>(lanes), high_lanes = static_cast<__mmask16>(lanes >> 16);
    const Divided high = divided(s.high, wide.high, c, high_lanes, next);
    const Divided low = divided(s.low, wide.low, c, low_lanes, next);
    const __m512i index =
        _mm512_add_epi16(narrowed(low.rank, high.rank), _mm512_permutexvar_epi16(symbols.symbols, c.start));
    const Wide slots = widened(slots_of(index, c));
    s.low =
        _mm512_mask_or_epi32(s.low, low_lanes, _mm512_slli_epi32(low.quotient, kProbabilityBits), slots.low);
    s.high = _mm512_mask_or_epi32(s.high, high_lanes, _mm512_slli_epi32(high.quotient, kProbabilityBits),
                                  slots.high);
}

// An encoder on its way through strips; what changes with each group stays in registers.
struct Putter {
    States states;
    std::uint8_t* next;
};

KVCAST_AVX512_INLINE void encode_group(Putter& p, const Coding& c, const EncodeStrip& strip, std::size_t at,
                                       std::uint32_t lanes) {
    const unsigned shift = strip.shift;
    const __m512i half = _mm512_set1_epi16(static_cast<std::int16_t>(shift == 0 ? 0 : 1 << (shift - 1)));
    const __m512i value = _mm512_add_epi16(_mm512_maskz_loadu_epi16(lanes, strip.values + at), half);
    const __m512i high = _mm512_sra_epi16(value, _mm_cvtsi32_si128(static_cast<int>(shift)));
    const Symbols symbols = symbols_of(high);
    if ((symbols.escapes & lanes) != 0) [[unlikely]]
        put_escapes(high, symbols.escapes & lanes, p.next);
    put_raw(value, shift, lanes, p.next);
    put_group(p.states, symbols, c, lanes, p.next);
}

template <std::size_t N>
KVCAST_AVX512 void encode_abreast(RansEncoder* const* encoders, const EncodeStrip* strips, std::size_t steps,
                                  std::size_t stride) {
    Putter putters[N];
    KVCAST_UNROLL
    for (std::size_t e = 0; e < N; ++e) putters[e] = {load_states(encoders[e]->state), encoders[e]->next};
    for (std::size_t step = 0; step < steps; ++step, strips += stride) {
        Coding codings[N];
        std::size_t together = strips[0].count;
        KVCAST_UNROLL
        for (std::size_t e = 0; e < N; ++e) {
            codings[e] = load_coding(*strips[e].table);
            if (strips[e].count != together) together = 0;
        }
        if (together == 0) {
            KVCAST_UNROLL
            for (std::size_t e = 0; e < N; ++e) {
                for (std::size_t end = strips[e].count; end > 0;) {
                    const std::size_t at = (end - 1) / kLanes * kLanes;
                    encode_group(putters[e], codings[e], strips[e], at, first_lanes(end - at));
                    end = at;
                }
            }
        }
        for (std::size_t end = together; end > 0;) {
            const std::size_t at = (end - 1) / kLanes * kLanes;
            KVCAST_UNROLL
            for (std::size_t e = 0; e < N; ++e)
                encode_group(putters[e], codings[e], strips[e], at, first_lanes(end - at));
            end = at;
        }
    }
    KVCAST_UNROLL
    for (std::size_t e = 0; e < N; ++e) {
        store_states(encoders[e]->state, putters[e].states);
        encoders[e]->next = putters[e].next;
    }
}

template <Dtype D>
KVCAST_AVX512_INLINE void encode_float_group(Putter& p, const Coding& c, const EncodeFloatStrip& strip,
                                             std::size_t at, std::uint32_t lanes) {
    constexpr unsigned mantissa = mantissa_bits(D);
    constexpr unsigned sign_shift = D == Dtype::kF32 ? 31 : 15;
    const __m512i range = _mm512_set1_epi32(static_cast<int>(exponent_mask(D)));
    const __m512i middle = _mm512_set1_epi32(static_cast<std::int32_t>(strip.center));
    const __m512i fraction = _mm512_set1_epi32((1 << mantissa) - 1);
    __m512i high[2], raw[2];
    KVCAST_UNROLL
    for (std::size_t i = 0; i < 2; ++i) {
        const auto there = static_cast<__mmask16>(lanes >> (16 * i));
        const __m512i b = _mm512_maskz_loadu_epi32(there, strip.bits + at + 16 * i);
        high[i] = _mm512_sub_epi32(middle, _mm512_and_si512(_mm512_srli_epi32(b, mantissa), range));
        const __m512i sign = _mm512_and_si512(_mm512_srli_epi32(b, sign_shift), _mm512_set1_epi32(1));
        raw[i] = _mm512_or_si512(_mm512_slli_epi32(sign, mantissa), _mm512_and_si512(b, fraction));
    }
    const __m512i high16 = narrowed(high[0], high[1]);
    const Symbols symbols = symbols_of(high16);
    if ((symbols.escapes & lanes) != 0) [[unlikely]]
        put_escapes(high16, symbols.escapes & lanes, p.next);
    if constexpr (mantissa + 1 > 16)
        put_raw(narrowed(_mm512_srli_epi32(raw[0], 16), _mm512_srli_epi32(raw[1], 16)), mantissa + 1 - 16,
                lanes, p.next);
    put_raw(narrowed(raw[0], raw[1]), std::min(mantissa + 1, 16u), lanes, p.next);
    put_group(p.states, symbols, c, lanes, p.next);
}

template <std::size_t N, Dtype D>
KVCAST_AVX512 void encode_floats_abreast(RansEncoder* const* encoders, const EncodeFloatStrip* strips,
                                         std::size_t count) {
    Putter putters[N];
    Coding codings[N];
    KVCAST_UNROLL
    for (std::size_t e = 0; e < N; ++e) {
        putters[e] = {load_states(encoders[e]->state), encoders[e]->next};
        codings[e] = load_coding(*strips[e].table);
    }
    for (std::size_t end = count; end > 0;) {
        const std::size_t at = (end - 1) / kLanes * kLanes;
        KVCAST_UNROLL
        for (std::size_t e = 0; e < N; ++e)
            encode_float_group<D>(putters[e], codings[e], strips[e], at, first_lanes(end - at));
        end = at;
    }
    KVCAST_UNROLL
    for (std::size_t e = 0; e < N; ++e) {
        store_states(encoders[e]->state, putters[e].states);
        encoders[e]->next = putters[e].next;
    }
}

template <Dtype D>
void encode_floats_as(std::span<RansEncoder* const> encoders, std::span<const EncodeFloatStrip> strips,
                      std::size_t count) {
    std::size_t e = 0;
    for (; e + 2 <= encoders.size(); e += 2)
        encode_floats_abreast<2, D>(encoders.data() + e, strips.data() + e, count);
    if (e < encoders.size()) encode_floats_abreast<1, D>(encoders.data() + e, strips.data() + e, count);
}

}  // namespace

void decode_strips(std::span<RansDecoder* const> decoders, std::span<const Strip> strips) {
    const std::size_t stride = decoders.size();
    const std::size_t steps = stride == 0 ? 0 : strips.size() / stride;
    std::size_t d = 0;
    for (; d + 4 <= stride; d += 4) decode_abreast<4>(decoders.data() + d, strips.data() + d, steps, stride);
    for (; d + 2 <= stride; d += 2) decode_abreast<2>(decoders.data() + d, strips.data() + d, steps, stride);
    if (d < stride) decode_abreast<1>(decoders.data() + d, strips.data() + d, steps, stride);
}

void decode_floats(std::span<RansDecoder* const> decoders, std::span<const FloatStrip> strips, Dtype dtype,
                   std::size_t count) {
    switch (dtype) {
        case Dtype::kBf16:
            return decode_floats_as<Dtype::kBf16>(decoders, strips, count);
        case Dtype::kF16:
            return decode_floats_as<Dtype::kF16>(decoders, strips, count);
        default:
            return decode_floats_as<Dtype::kF32>(decoders, strips, count);
    }
}

void encode_strips(std::span<RansEncoder* const> encoders, std::span<const EncodeStrip> strips) {
    const std::size_t stride = encoders.size();
    const std::size_t steps = stride == 0 ? 0 : strips.size() / stride;
    std::size_t e = 0;
    for (; e + 2 <= stride; e += 2) encode_abreast<2>(encoders.data() + e, strips.data() + e, steps, stride);
    if (e < stride) encode_abreast<1>(encoders.data() + e, strips.data() + e, steps, stride);
}

void encode_floats(std::span<RansEncoder* const> encoders, std::span<const EncodeFloatStrip> strips,
                   Dtype dtype, std::size_t count) {
    switch (dtype) {
        case Dtype::kBf16:
            return encode_floats_as<Dtype::kBf16>(encoders, strips, count);
        case Dtype::kF16:
            return encode_floats_as<Dtype::kF16>(encoders, strips, count);
        default:
            return encode_floats_as<Dtype::kF32>(encoders, strips, count);
    }
}

namespace {

// Where the first of the largest of some numbers is; their count is a multiple of 16.
KVCAST_AVX512 std::uint32_t first_of_most(const std::uint32_t* numbers, std::size_t count) {
    __m512i most = _mm512_setzero_si512();
    for (std::size_t i = 0; i < count; i += 16)
        most = _mm512_max_epu32(most, _mm512_loadu_si512(numbers + i));
    const __m512i wanted = _mm512_set1_epi32(static_cast<std::int32_t>(_mm512_reduce_max_epu32(most)));
    std::size_t i = 0;
    __mmask16 there = 0;
    for (; (there = _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(numbers + i), wanted)) == 0;) i += 16;
    return static_cast<std::uint32_t>(i) + static_cast<std::uint32_t>(std::countr_zero(there));
}

}  // namespace

// Exponents as bytes, then one comparison for each that may occur. Few do: the elements are of one channel.
KVCAST_AVX512 std::uint32_t count_exponents(const std::uint32_t* bits, std::size_t count, Dtype dtype,
                                            std::uint32_t* counts) {
    constexpr std::size_t kVectors = 8;       // of 64 exponents
    constexpr std::uint32_t kMostKinds = 48;  // beyond, a histogram is faster
    const __m128i by = _mm_cvtsi32_si128(static_cast<int>(mantissa_bits(dtype)));
    const __m512i range = _mm512_set1_epi32(static_cast<int>(exponent_mask(dtype)));
    while (count != 0) {
        const std::size_t now = std::min(count, 64 * kVectors);
        alignas(64) std::uint8_t exponents[64 * kVectors];
        __m512i least = _mm512_set1_epi32(255), most = _mm512_setzero_si512();
        for (std::size_t i = 0; i < now; i += 16) {
            const auto lanes = static_cast<__mmask16>(first_lanes(std::min<std::size_t>(16, now - i)));
            const __m512i b = _mm512_maskz_loadu_epi32(lanes, bits + i);
            const __m512i e = _mm512_and_si512(_mm512_srl_epi32(b, by), range);
            least = _mm512_mask_min_epu32(least, lanes, least, e);
            most = _mm512_mask_max_epu32(most, lanes, most, e);
            _mm_store_si128(reinterpret_cast<__m128i*>(exponents + i), _mm512_cvtepi32_epi8(e));
        }
        const std::uint32_t low = _mm512_reduce_min_epu32(least), high = _mm512_reduce_max_epu32(most);
        if (high - low >= kMostKinds) {
            scalar::count_exponents(bits, now, dtype, counts);
        } else {
            const std::size_t vectors = (now + 63) / 64;
            const std::uint64_t last = now % 64 == 0 ? ~std::uint64_t{0} : (std::uint64_t{1} << now % 64) - 1;
            for (std::uint32_t e = low; e <= high; ++e) {
                const __m512i wanted = _mm512_set1_epi8(static_cast<char>(e));
                int n = 0;
                for (std::size_t v = 0; v < vectors; ++v) {
                    const std::uint64_t same =
                        _mm512_cmpeq_epi8_mask(_mm512_load_si512(exponents + 64 * v), wanted);
                    n += std::popcount(v + 1 == vectors ? same & last : same);
                }
                counts[e] += static_cast<std::uint32_t>(n);
            }
        }
        bits += now;
        count -= now;
    }
    return first_of_most(counts, exponent_mask(dtype) + 1);
}

// Zeros, which are many, are counted; the others' rows are added one by one.
KVCAST_AVX512 void value_costs(const std::int16_t* values, std::size_t count,
                               const std::uint32_t (*costs)[kValueCosts], std::uint32_t* sums) {
    __m512i sum = _mm512_setzero_si512();
    for (std::size_t i = 0; i < count; i += kLanes) {
        const std::uint32_t lanes = first_lanes(count - i);
        alignas(64) std::uint16_t magnitudes[kLanes];
        const __m512i m = _mm512_abs_epi16(_mm512_maskz_loadu_epi16(lanes, values + i));
        _mm512_store_si512(magnitudes, m);
        std::uint32_t others = _mm512_test_epi16_mask(m, m);
        const __m512i zeros = _mm512_set1_epi32(std::popcount(lanes & ~others));
        sum = _mm512_add_epi32(sum, _mm512_mullo_epi32(_mm512_loadu_si512(costs[0]), zeros));
        for (; others != 0; others &= others - 1)
            sum = _mm512_add_epi32(sum, _mm512_loadu_si512(costs[magnitudes[std::countr_zero(others)]]));
    }
    _mm512_storeu_si512(sums, sum);
}

KVCAST_AVX512 void table_costs(const std::int16_t* counts, const std::int16_t (*costs)[kSymbols][2],
                               std::int32_t* sums) {
    // One load for all counts: they may just have been stored one by one.
    const __m512i all = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(counts)));
    __m512i sum = _mm512_setzero_si512();
    KVCAST_UNROLL
    for (int pair = 0; pair < static_cast<int>(kSymbols / 2); ++pair) {
        const __m512i n = _mm512_permutexvar_epi32(_mm512_set1_epi32(pair), all);
        sum = _mm512_dpwssd_epi32(sum, _mm512_loadu_si512(costs[pair]), n);
    }
    _mm512_storeu_si512(sums, sum);
}

}  // namespace kvcast::kernels::avx512
