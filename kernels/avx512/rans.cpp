// 32 states of 32 bits are two vectors of 16-bit halves, so that a step works on all lanes at once: a product
// of a frequency and a state's upper bits is two products of halves, a state below 2^16 is a high half of
// zero, and refill moves low halves up and expands the next words, in ascending order, into the places. A
// table is four vectors: every look-up is a permutation of registers.
#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include "kernels/avx512/elements.h"
#include "kernels/avx512/slots.h"
#include "kernels/avx512/target.h"
#include "kernels/scalar/elements.h"
#include "kernels/x86/elements.h"
#include "kernels/x86/groups.h"
#include "kernels/x86/lanes.h"
#include "kernels/x86/sender.h"
#include "kernels/x86/words.h"

namespace kvcast::kernels::avx512 {
namespace {

using x86::ElementOf;
using x86::first_lanes;
using x86::for_groups;
using x86::Sender;
using x86::strips_each;
using x86::with_dtype;
using x86::Words;

constexpr std::size_t kMostAbreast = 4;  // decoders

struct States {
    __m512i high;  // the halves of lanes 0..31
    __m512i low;
};

// Every other half of 32 lanes of 32 bits, from the first or second one on.
KVCAST_AVX512_INLINE __m512i halves(__m512i a, __m512i b, std::int16_t from) {
    const __m512i even = _mm512_set_epi32(
        0x003e003c, 0x003a0038, 0x00360034, 0x00320030, 0x002e002c, 0x002a0028, 0x00260024, 0x00220020,
        0x001e001c, 0x001a0018, 0x00160014, 0x00120010, 0x000e000c, 0x000a0008, 0x00060004, 0x00020000);
    return _mm512_permutex2var_epi16(a, _mm512_add_epi16(even, _mm512_set1_epi16(from)), b);
}

// 32 lanes of 32 bits from halves.
struct Wide {
    __m512i first;  // lanes 0..15
    __m512i last;
};

KVCAST_AVX512_INLINE Wide joined(__m512i low, __m512i high) {
    const __m512i lanes = _mm512_set_epi32(
        0x002f000f, 0x002e000e, 0x002d000d, 0x002c000c, 0x002b000b, 0x002a000a, 0x00290009, 0x00280008,
        0x00270007, 0x00260006, 0x00250005, 0x00240004, 0x00230003, 0x00220002, 0x00210001, 0x00200000);
    return {_mm512_permutex2var_epi16(low, lanes, high),
            _mm512_permutex2var_epi16(low, _mm512_add_epi16(lanes, _mm512_set1_epi16(16)), high)};
}

KVCAST_AVX512_INLINE States load_states(const std::uint32_t* state) {
    const __m512i a = _mm512_load_si512(state), b = _mm512_load_si512(state + 16);
    return {halves(a, b, 1), halves(a, b, 0)};
}

KVCAST_AVX512_INLINE void store_states(std::uint32_t* state, const States& s) {
    const Wide wide = joined(s.low, s.high);
    _mm512_store_si512(state, wide.first);
    _mm512_store_si512(state + 16, wide.last);
}

// Up to so many lines.
KVCAST_AVX512_INLINE void send_lines(Sender& sender, std::size_t lines) {
    KVCAST_UNROLL
    for (std::size_t i = 0; i < lines; ++i) {
        if (!sender.any()) return;
        _mm512_stream_si512(reinterpret_cast<__m512i*>(sender.to()), _mm512_load_si512(sender.from()));
        sender.left();
    }
}

KVCAST_AVX512_INLINE __m512i looked_up(const void* numbers, __m512i index) {
    return _mm512_permutexvar_epi16(index, _mm512_load_si512(numbers));
}

// Takes a symbol out of each lane that is set in `lanes` (all of them where Whole) and refills: the number of
// 16 bits that each entry stands for.
template <bool Whole>
KVCAST_AVX512_INLINE __m512i take_symbols(States& s, const HalfTable& t, const void* numbers,
                                          std::uint32_t lanes, Words& words) {
    const __m512i carry = looked_up(t.carry, _mm512_srli_epi16(s.low, kBucketBits));
    const __m512i entry = _mm512_srli_epi16(_mm512_add_epi16(s.low, carry), kBucketBits);
    const __m512i frequency = looked_up(t.frequency, entry);
    const __m512i slot = _mm512_and_si512(s.low, _mm512_set1_epi16(kProbabilityMask));
    const __m512i above = _mm512_andnot_si512(_mm512_set1_epi16(kProbabilityMask), s.low);
    // frequency * (state >> 14) + rank: the product with the two lowest bits and the rank fit 16 bits
    // together.
    const __m512i rest = _mm512_add_epi16(_mm512_mulhi_epu16(frequency, above),
                                          _mm512_add_epi16(slot, looked_up(t.rank, entry)));
    __m512i low = _mm512_add_epi16(_mm512_mullo_epi16(frequency, s.high), rest);
    __m512i high = _mm512_mulhi_epu16(frequency, s.high);
    high = _mm512_mask_add_epi16(high, _mm512_cmplt_epu16_mask(low, rest), high, _mm512_set1_epi16(1));
    __mmask32 refill = _mm512_testn_epi16_mask(high, high);
    if constexpr (!Whole) {
        low = _mm512_mask_mov_epi16(s.low, lanes, low);
        high = _mm512_mask_mov_epi16(s.high, lanes, high);
        refill &= lanes;
    }
    s.high = _mm512_mask_mov_epi16(high, refill, low);
    s.low = _mm512_mask_expand_epi16(low, refill, _mm512_loadu_si512(words.next));
    words.next += 2 * std::popcount(static_cast<std::uint32_t>(refill));
    return looked_up(numbers, entry);
}

KVCAST_AVX512_INLINE std::uint32_t escapes_in(__m512i numbers) {
    return _mm512_cmpeq_epi16_mask(numbers, _mm512_set1_epi16(kEscapeMark));
}

// Row r of eight bits to column 7 - r, in each quadword.
KVCAST_AVX512_INLINE __m512i transposed(__m512i bits) {
    return _mm512_gf2p8affine_epi64_epi8(_mm512_set1_epi64(static_cast<long long>(0x8040201008040201)), bits,
                                         0);
}

// Where byte g of plane p, 0..3 and 0..15, comes to lie as a row: in quadword g of the upper or lower four.
alignas(64) constexpr auto kPlaneRows = [] {
    struct {
        std::uint8_t of_two[64];  // planes of 32 lanes
        std::uint8_t of_one[64];  // of 16
    } rows = {};
    for (unsigned i = 0; i < 64; ++i) {
        const unsigned plane = i / 32 * 8 + 7 - i % 8, g = i / 8 % 4;
        rows.of_two[i] = static_cast<std::uint8_t>(4 * plane + g);
        rows.of_one[i] = static_cast<std::uint8_t>(g < 2 ? 2 * plane + g : 0);
    }
    return rows;
}();

// The same for bytes 0 and 1 of 32 lanes, and where planes come from what is transposed.
alignas(64) constexpr auto kLaneRows = [] {
    struct {
        std::uint8_t lanes[64];
        std::uint8_t of_two[64];
        std::uint8_t of_one[64];
        std::uint8_t words[64];   // lanes from what is transposed
        std::uint8_t octets[64];  // its first bytes, twice
    } rows = {};
    for (unsigned i = 0; i < 64; ++i) {
        rows.lanes[i] = static_cast<std::uint8_t>(2 * (i / 8 % 4 * 8 + 7 - i % 8) + i / 32);
        rows.of_two[i] = static_cast<std::uint8_t>(i / 32 * 32 + i % 4 * 8 + i / 4 % 8);
        rows.of_one[i] = static_cast<std::uint8_t>(i / 16 % 2 * 32 + i % 2 * 8 + i / 2 % 8);
        rows.words[i] = static_cast<std::uint8_t>(i % 2 * 32 + i / 2);
        rows.octets[i] = static_cast<std::uint8_t>(i / 2);
    }
    return rows;
}();

// Raw bits of 32 lanes, plane by plane: the lowest `planes` bits of 16. Planes have one word only where there
// are 16 lanes or fewer.
template <bool Whole>
KVCAST_AVX512_INLINE __m512i take_planes(unsigned planes, std::uint32_t lanes, Words& words) {
    const bool two = Whole || lanes > 0xffff;
    const __m512i rows = _mm512_permutexvar_epi8(
        _mm512_load_si512(two ? kPlaneRows.of_two : kPlaneRows.of_one), _mm512_loadu_si512(words.next));
    words.next += (two ? 4 : 2) * planes;
    const __m512i bits = _mm512_permutexvar_epi8(_mm512_load_si512(kLaneRows.words), transposed(rows));
    return _mm512_and_si512(bits, _mm512_set1_epi16(static_cast<std::int16_t>((1u << planes) - 1)));
}

// ---- what values become ----

// Whether what a strip's symbols become can be looked up: no raw bits, and no symbol but the escape becomes
// kEscapeMark.
KVCAST_AVX512_INLINE bool can_look_up(const Strip& strip) {
    if (strip.meaning == nullptr || strip.shift != 0) return false;
    return strip.meaning->dtype || strip.mean + (kSymbolZero << strip.meaning->shift) < kEscapeMark;
}

template <Dtype D>
KVCAST_AVX512_INLINE __m512i elements_of(__m512i states, const Strip& strip) {
    const __m512 values = values_of(states, _mm512_set1_ps(value_of(1, strip.meaning->scale)));
    return D == Dtype::kF16 ? rounded_f16(values) : _mm512_srli_epi32(rounded_bf16(values), 16);
}

// What the symbols of a strip become, by entries of its table.
KVCAST_AVX512_INLINE __m512i meant_entries(const Strip& strip) {
    const __m512i values = _mm512_setr_epi32(-7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7, 8);
    const Meaning& m = *strip.meaning;
    const __m512i sums =
        _mm512_add_epi32(_mm512_set1_epi32(strip.mean),
                         _mm512_sll_epi32(values, _mm_cvtsi32_si128(static_cast<int>(m.shift))));
    const __m512i states =
        _mm512_max_epi32(_mm512_min_epi32(sums, _mm512_set1_epi32(32767)), _mm512_set1_epi32(-32768));
    const __m512i meant = !m.dtype                  ? states
                          : *m.dtype == Dtype::kF16 ? elements_of<Dtype::kF16>(states, strip)
                                                    : elements_of<Dtype::kBf16>(states, strip);
    const __m512i marked = _mm512_mask_mov_epi32(meant, 1u << kEscape, _mm512_set1_epi32(kEscapeMark));
    return _mm512_permutexvar_epi16(_mm512_load_si512(strip.table->halves.symbol), marked);
}

template <typename Elements>
KVCAST_AVX512_INLINE void become(const Strip& strip, Elements&& elements) {
    const __m512i mean = _mm512_set1_epi32(strip.mean), zero = _mm512_setzero_si512();
    const __m512i factor = _mm512_set1_epi32(1 << strip.meaning->shift);
    for (std::size_t i = 0; i < strip.count; i += kLanes) {
        const std::uint32_t lanes = first_lanes(strip.count - i);
        const __m512i v = _mm512_maskz_loadu_epi16(lanes, strip.values + i);
        const __m512i states =
            _mm512_packs_epi32(_mm512_dpwssd_epi32(mean, _mm512_unpacklo_epi16(v, zero), factor),
                               _mm512_dpwssd_epi32(mean, _mm512_unpackhi_epi16(v, zero), factor));
        _mm512_mask_storeu_epi16(strip.values + i, lanes, elements(states));
    }
}

template <Dtype D>
KVCAST_AVX512 void become_elements(const Strip& strip) {
    const __m512 scale = _mm512_set1_ps(value_of(1, strip.meaning->scale));
    become(strip, [&](__m512i states) KVCAST_AVX512_LAMBDA {
        return elements16<D>(low_states(states), high_states(states), scale);
    });
}

KVCAST_AVX512 void become_states(const Strip& strip) {
    become(strip, [&](__m512i states) KVCAST_AVX512_LAMBDA { return states; });
}

// Values that are there to what they become.
void become(const Strip& strip) {
    const auto dtype = strip.meaning->dtype;
    if (!dtype) return become_states(strip);
    *dtype == Dtype::kF16 ? become_elements<Dtype::kF16>(strip) : become_elements<Dtype::kBf16>(strip);
}

// What the symbols of a strip are looked up as.
class Numbers {
  public:
    KVCAST_AVX512_INLINE explicit Numbers(const Strip& strip) : meant_(can_look_up(strip)) {
        numbers_ = strip.table->halves.value;
        if (!meant_) return;
        _mm512_store_si512(own_, meant_entries(strip));
        numbers_ = own_;
    }
    Numbers(const Numbers&) = delete;

    const void* numbers() const { return numbers_; }
    // Whether they are what values become.
    bool meant() const { return meant_; }

  private:
    alignas(64) std::int16_t own_[2 * kSymbols];
    const std::int16_t* numbers_;
    bool meant_;
};

// ---- decoding ----

template <typename Meant>
KVCAST_AVX512_INLINE __m512i take_escapes(__m512i numbers, std::uint32_t escapes, Words& words,
                                          Meant&& meant) {
    alignas(64) std::int16_t lanes[kLanes];
    _mm512_store_si512(lanes, numbers);
    x86::take_escapes(lanes, escapes, words, meant);
    return _mm512_load_si512(lanes);
}

KVCAST_AVX512_INLINE __m512i take_escapes(__m512i numbers, std::uint32_t escapes, Words& words) {
    return take_escapes(numbers, escapes, words, [](std::int16_t v) { return v; });
}

// One group of `lanes` of a strip.
template <bool Whole>
KVCAST_AVX512_INLINE void decode_group(States& s, const Strip& strip, const Numbers& numbers,
                                       std::uint32_t lanes, Words& words, std::size_t at) {
    words.prepare();
    __m512i value = take_symbols<Whole>(s, strip.table->halves, numbers.numbers(), lanes, words);
    std::uint32_t escapes = escapes_in(value);
    if constexpr (!Whole) escapes &= lanes;
    if (const unsigned shift = strip.shift; shift != 0) {
        const __m512i raw = take_planes<Whole>(shift, lanes, words);
        if (escapes != 0) [[unlikely]]
            value = take_escapes(value, escapes, words);
        const __m512i half = _mm512_set1_epi16(static_cast<std::int16_t>(1 << (shift - 1)));
        value = _mm512_sll_epi16(value, _mm_cvtsi32_si128(static_cast<int>(shift)));
        value = _mm512_sub_epi16(_mm512_add_epi16(value, raw), half);
    } else if (escapes != 0) [[unlikely]] {
        value = take_escapes(value, escapes, words,
                             [&](std::int16_t v) { return numbers.meant() ? scalar::meant(strip, v) : v; });
    }
    if constexpr (Whole) {
        _mm512_storeu_si512(strip.values + at, value);
    } else {
        _mm512_mask_storeu_epi16(strip.values + at, lanes, value);
    }
}

KVCAST_AVX512_INLINE void finish_strip(const Strip& strip, const Numbers& numbers) {
    if (strip.meaning != nullptr && !numbers.meant()) become(strip);
}

KVCAST_AVX512_INLINE void decode_alone(States& s, Words& words, const Strip& strip, Sender& sender) {
    if (strip.table == nullptr) {
        std::fill_n(strip.values, strip.count, scalar::meant(strip, 0));
        return;
    }
    const Numbers numbers(strip);
    std::size_t at = 0;
    for (; at + kLanes <= strip.count; at += kLanes) {
        decode_group<true>(s, strip, numbers, ~0u, words, at);
        send_lines(sender, 1);
    }
    if (at != strip.count) decode_group<false>(s, strip, numbers, first_lanes(strip.count - at), words, at);
    finish_strip(strip, numbers);
}

template <std::size_t N>
KVCAST_AVX512_INLINE bool alike(const Strip* strips) {
    bool same = true;
    KVCAST_UNROLL
    for (std::size_t d = 0; d < N; ++d)
        same = same && strips[d].table != nullptr && strips[d].count == strips[0].count;
    return same;
}

// Strips of as many values each, group by group: while one decoder waits for its states, the others go on.
template <std::size_t N, std::size_t... D>
KVCAST_AVX512_INLINE void decode_alike(std::index_sequence<D...>, States (&states)[N], const Strip* strips,
                                       Words (&words)[N], Sender& sender) {
    const Numbers numbers[N] = {Numbers(strips[D])...};
    const std::size_t count = strips[0].count;
    std::size_t at = 0;
    for (; at + kLanes <= count; at += kLanes) {
        KVCAST_UNROLL
        for (std::size_t d = 0; d < N; ++d)
            decode_group<true>(states[d], strips[d], numbers[d], ~0u, words[d], at);
        send_lines(sender, N);
    }
    KVCAST_UNROLL
    for (std::size_t d = 0; d < N; ++d) {
        if (at != count)
            decode_group<false>(states[d], strips[d], numbers[d], first_lanes(count - at), words[d], at);
        finish_strip(strips[d], numbers[d]);
    }
}

// One strip of each decoder.
template <std::size_t N>
KVCAST_AVX512_INLINE void decode_step(States (&states)[N], const Strip* strips, Words (&words)[N],
                                      Sender& sender) {
    if (N != 1 && alike<N>(strips))
        return decode_alike(std::make_index_sequence<N>(), states, strips, words, sender);
    KVCAST_UNROLL
    for (std::size_t d = 0; d < N; ++d) decode_alone(states[d], words[d], strips[d], sender);
}

// N decoders, each strip of theirs given to `step`.
template <std::size_t N, typename Strip, typename Step>
KVCAST_AVX512_INLINE void decode_abreast(RansDecoder* const* decoders, const Strip* strips, std::size_t steps,
                                         std::size_t stride, std::span<Outgoing> outgoing, Step&& step) {
    Sender sender(outgoing);
    States states[N];
    Words words[N];
    Words::Tail tails[N];
    KVCAST_UNROLL
    for (std::size_t d = 0; d < N; ++d) {
        states[d] = load_states(decoders[d]->state);
        words[d].begin(*decoders[d], tails[d]);
    }
    for (std::size_t i = 0; i < steps; ++i, strips += stride) step(states, strips, words, sender);
    KVCAST_UNROLL
    for (std::size_t d = 0; d < N; ++d) {
        words[d].finish(*decoders[d]);
        store_states(decoders[d]->state, states[d]);
    }
    sender.finish();
}

template <std::size_t N>
KVCAST_AVX512 void decode_strips_abreast(RansDecoder* const* decoders, const Strip* strips, std::size_t steps,
                                         std::size_t stride, std::span<Outgoing> outgoing) {
    decode_abreast<N>(decoders, strips, steps, stride, outgoing,
                      [](auto& states, const Strip* some, auto& words, Sender& sender)
                          KVCAST_AVX512_LAMBDA { decode_step(states, some, words, sender); });
}

KVCAST_AVX512_INLINE Wide widened_signed(__m512i v) {
    return {_mm512_cvtepi16_epi32(_mm512_castsi512_si256(v)),
            _mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(v, 1))};
}

// What the symbols of a strip of elements of 16 bits are looked up as: exponents, in their place.
template <Dtype D>
class ExponentNumbers {
  public:
    KVCAST_AVX512_INLINE explicit ExponentNumbers(const FloatStrip& strip) : center_(strip.center) {
        const __m512i values = _mm512_load_si512(strip.table->halves.value);
        const __m512i centers = _mm512_set1_epi16(static_cast<std::int16_t>(center_));
        const __m512i exponents = _mm512_and_si512(_mm512_sub_epi16(centers, values),
                                                   _mm512_set1_epi16(static_cast<std::int16_t>(kMask)));
        const __m512i placed = _mm512_slli_epi16(exponents, kMantissa);
        _mm512_store_si512(numbers_, _mm512_mask_mov_epi16(placed, escapes_in(values), values));
    }

    const void* numbers() const { return numbers_; }
    std::int16_t of(std::int16_t value) const {
        return static_cast<std::int16_t>(((center_ - static_cast<std::uint32_t>(value)) & kMask)
                                         << kMantissa);
    }

  private:
    static constexpr unsigned kMantissa = mantissa_bits(D);
    static constexpr std::uint32_t kMask = exponent_mask(D);

    alignas(64) std::int16_t numbers_[2 * kSymbols];
    std::uint32_t center_;
};

// Symbols as they are, for elements of 32 bits.
template <>
class ExponentNumbers<Dtype::kF32> {
  public:
    explicit ExponentNumbers(const FloatStrip& strip) : numbers_(strip.table->halves.value) {}
    const void* numbers() const { return numbers_; }
    static std::int16_t of(std::int16_t value) { return value; }

  private:
    const std::int16_t* numbers_;
};

// Eight raw bits of 32 lanes, in both bytes of each.
KVCAST_AVX512_INLINE __m512i take_octets(std::uint32_t lanes, Words& words) {
    const bool two = lanes > 0xffff;
    const __m512i rows = _mm512_permutexvar_epi8(
        _mm512_load_si512(two ? kPlaneRows.of_two : kPlaneRows.of_one), _mm512_loadu_si512(words.next));
    words.next += two ? 32 : 16;
    return _mm512_permutexvar_epi8(_mm512_load_si512(kLaneRows.octets), transposed(rows));
}

KVCAST_AVX512_INLINE __m512i assembled32(__m512i raw, __m512i high, std::uint32_t center) {
    constexpr int mantissa = static_cast<int>(mantissa_bits(Dtype::kF32));
    const __m512i exponent = _mm512_sub_epi32(_mm512_set1_epi32(static_cast<int>(center)), high);
    const __m512i magnitude = _mm512_ternarylogic_epi32(_mm512_set1_epi32((1 << mantissa) - 1), raw,
                                                        _mm512_slli_epi32(exponent, mantissa), 0xca);
    return _mm512_ternarylogic_epi32(_mm512_set1_epi32(0x7fffffff), magnitude,
                                     _mm512_slli_epi32(raw, 31 - mantissa), 0xca);
}

// `high`: what symbols were looked up as.
KVCAST_AVX512_INLINE __m512i taken_exponents(__m512i high, const auto& exponents, std::uint32_t lanes,
                                             Words& words) {
    const std::uint32_t escapes = escapes_in(high) & lanes;
    if (escapes == 0) [[likely]]
        return high;
    return take_escapes(high, escapes, words, [&](std::int16_t v) { return exponents.of(v); });
}

// Raw bits, sign and mantissa in their places.
template <Dtype D, bool Whole>
KVCAST_AVX512_INLINE __m512i take_raw16(std::uint32_t lanes, Words& words) {
    if constexpr (D == Dtype::kBf16) return take_octets(lanes, words);
    constexpr int mantissa = static_cast<int>(mantissa_bits(Dtype::kF16));
    const __m512i bits = take_planes<Whole>(mantissa + 1, lanes, words);
    return _mm512_ternarylogic_epi32(_mm512_set1_epi16((1 << mantissa) - 1), bits,
                                     _mm512_slli_epi16(bits, 15 - mantissa), 0xca);
}

template <Dtype D, bool Whole>
KVCAST_AVX512_INLINE void decode_float_group(States& s, const FloatStrip& strip,
                                             const ExponentNumbers<D>& exponents, std::uint32_t lanes,
                                             Words& words, std::size_t at) {
    auto* const elements = static_cast<ElementOf<D>*>(strip.elements) + at;
    words.prepare();
    const __m512i high = take_symbols<Whole>(s, strip.table->halves, exponents.numbers(), lanes, words);
    if constexpr (D == Dtype::kF32) {
        const __m512i lower = take_planes<Whole>(16, lanes, words);
        const __m512i upper = take_planes<Whole>(mantissa_bits(D) + 1 - 16, lanes, words);
        const Wide r = joined(lower, upper),
                   h = widened_signed(taken_exponents(high, exponents, lanes, words));
        _mm512_mask_storeu_epi32(elements, static_cast<__mmask16>(lanes),
                                 assembled32(r.first, h.first, strip.center));
        _mm512_mask_storeu_epi32(elements + 16, static_cast<__mmask16>(lanes >> 16),
                                 assembled32(r.last, h.last, strip.center));
    } else {
        constexpr auto outside = static_cast<std::int16_t>(0x8000 | ((1 << mantissa_bits(D)) - 1));
        const __m512i raw = take_raw16<D, Whole>(lanes, words);
        const __m512i element = _mm512_ternarylogic_epi32(
            _mm512_set1_epi16(outside), raw, taken_exponents(high, exponents, lanes, words), 0xca);
        if constexpr (Whole) {
            _mm512_storeu_si512(elements, element);
        } else {
            _mm512_mask_storeu_epi16(elements, lanes, element);
        }
    }
}

template <Dtype D, std::size_t N, std::size_t... I>
KVCAST_AVX512_INLINE void decode_float_step(std::index_sequence<I...>, States (&states)[N],
                                            const FloatStrip* strips, std::size_t count, Words (&words)[N],
                                            Sender& sender) {
    const ExponentNumbers<D> exponents[N] = {ExponentNumbers<D>(strips[I])...};
    std::size_t at = 0;
    for (; at + kLanes <= count; at += kLanes) {
        KVCAST_UNROLL
        for (std::size_t d = 0; d < N; ++d)
            decode_float_group<D, true>(states[d], strips[d], exponents[d], ~0u, words[d], at);
        send_lines(sender, N);
    }
    if (at == count) return;
    KVCAST_UNROLL
    for (std::size_t d = 0; d < N; ++d)
        decode_float_group<D, false>(states[d], strips[d], exponents[d], first_lanes(count - at), words[d],
                                     at);
}

template <std::size_t N, Dtype D>
KVCAST_AVX512 void decode_floats_abreast(RansDecoder* const* decoders, const FloatStrip* strips,
                                         std::size_t steps, std::size_t stride, std::size_t count,
                                         std::span<Outgoing> outgoing) {
    decode_abreast<N>(
        decoders, strips, steps, stride, outgoing,
        [&](auto& states, const FloatStrip* some, auto& words, Sender& sender) KVCAST_AVX512_LAMBDA {
            decode_float_step<D>(std::make_index_sequence<N>(), states, some, count, words, sender);
        });
}

template <Dtype D>
void decode_floats_as(std::span<RansDecoder* const> decoders, std::span<const FloatStrip> strips,
                      std::size_t count, std::span<Outgoing> outgoing) {
    const std::size_t stride = decoders.size(), steps = strips_each(strips.size(), stride);
    for_groups<kMostAbreast>(stride, [&](auto n, std::size_t d) {
        decode_floats_abreast<n.value, D>(decoders.data() + d, strips.data() + d, steps, stride, count,
                                          outgoing);
    });
}

// ---- encoding ----

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

// The lowest planes of 16-bit raw parts.
template <bool Whole>
KVCAST_AVX512_INLINE void put_raw(__m512i raw, unsigned planes, std::uint32_t lanes, std::uint8_t*& next) {
    const bool two = Whole || lanes > 0xffff;
    const __m512i there = Whole ? raw : _mm512_maskz_mov_epi16(lanes, raw);
    const __m512i rows = transposed(_mm512_permutexvar_epi8(_mm512_load_si512(kLaneRows.lanes), there));
    const __m512i bytes =
        _mm512_permutexvar_epi8(_mm512_load_si512(two ? kLaneRows.of_two : kLaneRows.of_one), rows);
    const unsigned count = (two ? 4 : 2) * planes;
    next -= count;
    _mm512_mask_storeu_epi8(next, _bzhi_u64(~std::uint64_t{0}, count), bytes);
}

// Every step of the loops below is one of several encoders', side by side: what waits for the step before it
// has the other encoders' work in between.
template <std::size_t N>
using Each = __m512i[N];

#define KVCAST_EACH \
    KVCAST_UNROLL   \
    for (std::size_t e = 0; e < N; ++e)

// (high * 2^16 + low) / divisor for high < divisor, divisor * 2^shift having its highest bit set. Leaves the
// quotient in `high`, the remainder in `low`.
template <std::size_t N>
KVCAST_AVX512_INLINE void divide(Each<N>& high, Each<N>& low, const Each<N>& divisor, const Each<N>& shift,
                                 const Each<N>& reciprocal) {
    const __m512i one = _mm512_set1_epi16(1);
    Each<N> d, q, q0;
    KVCAST_EACH high[e] = _mm512_shldv_epi16(high[e], low[e], shift[e]);
    KVCAST_EACH low[e] = _mm512_sllv_epi16(low[e], shift[e]);
    KVCAST_EACH q0[e] = _mm512_add_epi16(_mm512_mullo_epi16(reciprocal[e], high[e]), low[e]);
    KVCAST_EACH q[e] = _mm512_mulhi_epu16(reciprocal[e], high[e]);
    KVCAST_EACH q[e] = _mm512_add_epi16(q[e], _mm512_add_epi16(high[e], one));
    KVCAST_EACH q[e] = _mm512_mask_add_epi16(q[e], _mm512_cmplt_epu16_mask(q0[e], low[e]), q[e], one);
    KVCAST_EACH d[e] = _mm512_sllv_epi16(divisor[e], shift[e]);
    KVCAST_EACH low[e] = _mm512_sub_epi16(low[e], _mm512_mullo_epi16(q[e], d[e]));
    KVCAST_EACH {
        const __mmask32 over = _mm512_cmpgt_epu16_mask(low[e], q0[e]);
        q[e] = _mm512_mask_sub_epi16(q[e], over, q[e], one);
        low[e] = _mm512_mask_add_epi16(low[e], over, low[e], d[e]);
    }
    KVCAST_EACH {
        const __mmask32 under = _mm512_cmpge_epu16_mask(low[e], d[e]);
        high[e] = _mm512_mask_add_epi16(q[e], under, q[e], one);
        low[e] = _mm512_mask_sub_epi16(low[e], under, low[e], d[e]);
    }
    KVCAST_EACH low[e] = _mm512_srlv_epi16(low[e], shift[e]);
}

// From indices to slots.
template <std::size_t N>
KVCAST_AVX512_INLINE void find_slots(Each<N>& index, const EncodeHalves* const (&tables)[N]) {
    Each<N> cell, offset;
    KVCAST_EACH cell[e] = _mm512_srli_epi16(index[e], EncodeHalves::kCellBits);
    KVCAST_EACH offset[e] = looked_up(tables[e]->offset[0], cell[e]);
    KVCAST_UNROLL
    for (std::size_t n = 0; n < EncodeHalves::kBounds; ++n) {
        KVCAST_EACH {
            const __mmask32 beyond =
                _mm512_cmpge_epu16_mask(index[e], looked_up(tables[e]->bound[n], cell[e]));
            offset[e] = _mm512_mask_permutexvar_epi16(offset[e], beyond, cell[e],
                                                      _mm512_load_si512(tables[e]->offset[n + 1]));
        }
    }
    KVCAST_EACH index[e] = _mm512_add_epi16(index[e], offset[e]);
}

// An encoder on its way through strips; what changes with each group stays in registers.
struct Putter {
    States states;
    std::uint8_t* next;
};

// Puts a symbol into each lane that is set in `lanes`. States that are full give a word away first: words go
// below `next`, ascending with the lanes.
template <std::size_t N, bool Whole>
KVCAST_AVX512_INLINE void put_groups(Putter (&p)[N], const Each<N>& symbols,
                                     const EncodeHalves* const (&t)[N], std::uint32_t lanes) {
    Each<N> frequency, shift, reciprocal, low, high;
    __mmask32 full[N], two[N], one[N];
    KVCAST_EACH frequency[e] = looked_up(t[e]->frequency, symbols[e]);
    KVCAST_EACH {
        full[e] = _mm512_cmpge_epu16_mask(p[e].states.high, frequency[e]);
        if constexpr (!Whole) full[e] &= lanes;
    }
    KVCAST_EACH low[e] = _mm512_mask_mov_epi16(p[e].states.low, full[e], p[e].states.high);
    KVCAST_EACH high[e] = _mm512_mask_mov_epi16(p[e].states.high, full[e], _mm512_setzero_si512());
    KVCAST_EACH {
        const auto given = static_cast<unsigned>(std::popcount(static_cast<std::uint32_t>(full[e])));
        p[e].next -= 2 * given;
        _mm512_mask_storeu_epi16(p[e].next, _bzhi_u32(~0u, given),
                                 _mm512_maskz_compress_epi16(full[e], p[e].states.low));
    }
    KVCAST_EACH shift[e] = looked_up(t[e]->shift, symbols[e]);
    KVCAST_EACH reciprocal[e] = looked_up(t[e]->reciprocal, symbols[e]);
    divide<N>(high, low, frequency, shift, reciprocal);
    // Four frequencies leave the two lowest bits of the quotient, and the rank.
    KVCAST_EACH {
        const __m512i twice = _mm512_srli_epi16(frequency[e], 1);
        two[e] = _mm512_cmpge_epu16_mask(low[e], twice);
        low[e] = _mm512_mask_sub_epi16(low[e], two[e], low[e], twice);
    }
    KVCAST_EACH {
        const __m512i once = _mm512_srli_epi16(frequency[e], 2);
        one[e] = _mm512_cmpge_epu16_mask(low[e], once);
        low[e] = _mm512_mask_sub_epi16(low[e], one[e], low[e], once);
    }
    KVCAST_EACH low[e] = _mm512_add_epi16(low[e], looked_up(t[e]->first, symbols[e]));
    find_slots<N>(low, t);
    KVCAST_EACH {
        const __m512i bit15 = _mm512_set1_epi16(static_cast<std::int16_t>(0x8000));
        low[e] = _mm512_mask_add_epi16(low[e], two[e], low[e], bit15);
        low[e] = _mm512_mask_add_epi16(low[e], one[e], low[e], _mm512_set1_epi16(0x4000));
        if constexpr (Whole) {
            p[e].states = {high[e], low[e]};
        } else {
            p[e].states.high = _mm512_mask_mov_epi16(p[e].states.high, lanes, high[e]);
            p[e].states.low = _mm512_mask_mov_epi16(p[e].states.low, lanes, low[e]);
        }
    }
}

// A number in both halves of 32 bits, so that it is broadcast while it is loaded.
struct Twice {
    std::uint32_t halves;

    static constexpr Twice of(unsigned n) { return {n << 16 | n}; }
    KVCAST_AVX512_INLINE __m512i lanes() const { return _mm512_set1_epi32(static_cast<int>(halves)); }
};

// What is added to values before they are shifted, and the shift.
constexpr auto kRoundings = [] {
    struct {
        Twice half[kMostShift + 1];
        Twice shift[kMostShift + 1];
    } out = {};
    for (unsigned shift = 0; shift <= kMostShift; ++shift) {
        out.half[shift] = Twice::of(shift == 0 ? 0 : 1u << (shift - 1));
        out.shift[shift] = Twice::of(shift);
    }
    return out;
}();

// `lanes` values of strips from `at` on; all 32 where Whole.
template <std::size_t N, bool Whole>
KVCAST_AVX512_INLINE void encode_groups(Putter (&p)[N], const EncodeStrip* strips, std::size_t at,
                                        std::uint32_t lanes) {
    Each<N> symbols;
    const EncodeHalves* tables[N];
    KVCAST_EACH {
        const EncodeStrip& strip = strips[e];
        const __m512i loaded = Whole ? _mm512_loadu_si512(strip.values + at)
                                     : _mm512_maskz_loadu_epi16(lanes, strip.values + at);
        const __m512i value = _mm512_add_epi16(loaded, kRoundings.half[strip.shift].lanes());
        const __m512i high = _mm512_srav_epi16(value, kRoundings.shift[strip.shift].lanes());
        Symbols s = symbols_of(high);
        if constexpr (!Whole) s.escapes &= lanes;
        if (s.escapes != 0) [[unlikely]]
            put_escapes(high, s.escapes, p[e].next);
        if (strip.shift != 0) put_raw<Whole>(value, strip.shift, lanes, p[e].next);
        symbols[e] = s.symbols;
        tables[e] = &strip.table->halves;
    }
    put_groups<N, Whole>(p, symbols, tables, lanes);
}

// The last values of strips of one length first.
template <std::size_t N>
KVCAST_AVX512_INLINE void encode_all(Putter (&p)[N], const EncodeStrip* strips) {
    std::size_t at = strips[0].count / kLanes * kLanes;
    if (at != strips[0].count) encode_groups<N, false>(p, strips, at, first_lanes(strips[0].count - at));
    while (at != 0) {
        at -= kLanes;
        encode_groups<N, true>(p, strips, at, ~0u);
    }
}

KVCAST_AVX512_INLINE void encode_alone(Putter& putter, const EncodeStrip& strip) {
    Putter one[1] = {putter};
    encode_all<1>(one, &strip);
    putter = one[0];
}

template <std::size_t N>
KVCAST_AVX512 void encode_abreast(RansEncoder* const* encoders, const EncodeStrip* strips, std::size_t steps,
                                  std::size_t stride) {
    Putter putters[N];
    KVCAST_EACH putters[e] = {load_states(encoders[e]->state), encoders[e]->next};
    for (std::size_t step = 0; step < steps; ++step, strips += stride) {
        bool together = true;
        KVCAST_EACH together = together && strips[e].count == strips[0].count;
        if (together) {
            encode_all<N>(putters, strips);
        } else {
            KVCAST_EACH encode_alone(putters[e], strips[e]);
        }
    }
    KVCAST_EACH {
        store_states(encoders[e]->state, putters[e].states);
        encoders[e]->next = putters[e].next;
    }
}

template <std::size_t N, Dtype D, bool Whole>
KVCAST_AVX512_INLINE void encode_float_groups(Putter (&p)[N], const EncodeFloatStrip* strips, std::size_t at,
                                              std::uint32_t lanes) {
    constexpr unsigned mantissa = mantissa_bits(D);
    // The exponents stand in the upper halves of 32 bits as they do in 16, of bf16.
    constexpr unsigned exponent_at = D == Dtype::kF32 ? mantissa - 16 : mantissa;
    const __m512i range = _mm512_set1_epi16(static_cast<std::int16_t>(exponent_mask(D)));
    Each<N> symbols;
    const EncodeHalves* tables[N];
    KVCAST_EACH {
        const EncodeFloatStrip& strip = strips[e];
        const __m512i middle = _mm512_set1_epi16(static_cast<std::int16_t>(strip.center));
        const auto* from = static_cast<const ElementOf<D>*>(strip.elements) + at;
        __m512i upper, lower = _mm512_setzero_si512();
        if constexpr (D == Dtype::kF32) {
            const Wide b = {_mm512_maskz_loadu_epi32(static_cast<__mmask16>(lanes), from),
                            _mm512_maskz_loadu_epi32(static_cast<__mmask16>(lanes >> 16), from + 16)};
            upper = halves(b.first, b.last, 1);
            lower = halves(b.first, b.last, 0);
        } else {
            upper = Whole ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16(lanes, from);
        }
        const __m512i exponent = _mm512_and_si512(_mm512_srli_epi16(upper, exponent_at), range);
        const __m512i high = _mm512_sub_epi16(middle, exponent);
        Symbols s = symbols_of(high);
        if constexpr (!Whole) s.escapes &= lanes;
        if (s.escapes != 0) [[unlikely]]
            put_escapes(high, s.escapes, p[e].next);
        const __m512i raw = _mm512_ternarylogic_epi32(_mm512_set1_epi16((1 << exponent_at) - 1), upper,
                                                      _mm512_srli_epi16(upper, 15 - exponent_at), 0xca);
        put_raw<Whole>(raw, exponent_at + 1, lanes, p[e].next);
        if constexpr (D == Dtype::kF32) put_raw<Whole>(lower, 16, lanes, p[e].next);
        symbols[e] = s.symbols;
        tables[e] = &strip.table->halves;
    }
    put_groups<N, Whole>(p, symbols, tables, lanes);
}

template <std::size_t N, Dtype D>
KVCAST_AVX512 void encode_floats_abreast(RansEncoder* const* encoders, const EncodeFloatStrip* strips,
                                         std::size_t steps, std::size_t stride, std::size_t count) {
    Putter putters[N];
    KVCAST_EACH putters[e] = {load_states(encoders[e]->state), encoders[e]->next};
    for (std::size_t step = 0; step < steps; ++step, strips += stride) {
        std::size_t at = count / kLanes * kLanes;
        if (at != count) encode_float_groups<N, D, false>(putters, strips, at, first_lanes(count - at));
        while (at != 0) {
            at -= kLanes;
            encode_float_groups<N, D, true>(putters, strips, at, ~0u);
        }
    }
    KVCAST_EACH {
        store_states(encoders[e]->state, putters[e].states);
        encoders[e]->next = putters[e].next;
    }
}

template <Dtype D>
void encode_floats_as(std::span<RansEncoder* const> encoders, std::span<const EncodeFloatStrip> strips,
                      std::size_t count) {
    const std::size_t stride = encoders.size(), steps = strips_each(strips.size(), stride);
    for_groups<4>(stride, [&](auto n, std::size_t e) {
        encode_floats_abreast<n.value, D>(encoders.data() + e, strips.data() + e, steps, stride, count);
    });
}

}  // namespace

void decode_strips(std::span<RansDecoder* const> decoders, std::span<const Strip> strips,
                   std::span<Outgoing> outgoing) {
    const std::size_t stride = decoders.size(), steps = strips_each(strips.size(), stride);
    for_groups<kMostAbreast>(stride, [&](auto n, std::size_t d) {
        decode_strips_abreast<n.value>(decoders.data() + d, strips.data() + d, steps, stride, outgoing);
    });
}

void decode_floats(std::span<RansDecoder* const> decoders, std::span<const FloatStrip> strips, Dtype dtype,
                   std::size_t count, std::span<Outgoing> outgoing) {
    with_dtype(dtype, [&](auto d) { decode_floats_as<d.value>(decoders, strips, count, outgoing); });
}

void encode_strips(std::span<RansEncoder* const> encoders, std::span<const EncodeStrip> strips) {
    const std::size_t stride = encoders.size(), steps = strips_each(strips.size(), stride);
    for_groups<4>(stride, [&](auto n, std::size_t e) {
        encode_abreast<n.value>(encoders.data() + e, strips.data() + e, steps, stride);
    });
}

void encode_floats(std::span<RansEncoder* const> encoders, std::span<const EncodeFloatStrip> strips,
                   Dtype dtype, std::size_t count) {
    with_dtype(dtype, [&](auto d) { encode_floats_as<d.value>(encoders, strips, count); });
}

KVCAST_AVX512 bool value_costs(const std::int16_t* values, const std::uint16_t* places, std::size_t count,
                               const std::int32_t* costs, std::int32_t* sums) {
    __m512i sum = _mm512_loadu_si512(sums);
    std::uint32_t unknown = 0;
    for (std::size_t i = 0; i < count; i += kLanes) {
        const __m512i v = _mm512_maskz_loadu_epi16(first_lanes(count - i), values + i);
        const std::uint32_t far =
            _mm512_cmpgt_epu16_mask(_mm512_abs_epi16(v), _mm512_set1_epi16(kValueCostMost));
        unknown |= far;
        for (std::uint32_t left = _mm512_test_epi16_mask(v, v) & ~far; left != 0; left &= left - 1) {
            const std::size_t at = i + std::countr_zero(left);
            sum =
                _mm512_add_epi32(sum, _mm512_loadu_si512(costs + values[at] * kValueCostStride + places[at]));
        }
    }
    _mm512_storeu_si512(sums, sum);
    return unknown == 0;
}

namespace {

// The exponents of elements of one type, 64 at a time; Whole: they come in as many.
template <Dtype D, bool Whole>
class Exponents {
  public:
    static constexpr std::size_t kStep = 64;

    Exponents() = default;
    KVCAST_AVX512_INLINE Exponents(const void* elements, std::size_t count)
        : elements_(static_cast<const ElementOf<D>*>(elements)), count_(count) {}

    std::uint32_t first() const { return bits_of_first() >> mantissa_bits(D) & exponent_mask(D); }

    // How often step() repeats the first one.
    std::size_t repeated() const { return (kStep - count_ % kStep) % kStep; }

    KVCAST_AVX512_INLINE std::uint32_t most() const {
        __m512i most = _mm512_setzero_si512();
        for (std::size_t i = 0; i < count_; i += kStep) {
            KVCAST_UNROLL
            for (std::size_t v = 0; v < kVectors; ++v) most = largest(most, vector(i, v));
        }
        if constexpr (D == Dtype::kF32) return _mm512_reduce_max_epu32(most) >> mantissa_bits(D);
        const __m512i high = _mm512_srli_epi32(most, 16),
                      low = _mm512_and_si512(most, _mm512_set1_epi32(0xffff));
        return _mm512_reduce_max_epu32(_mm512_max_epu32(high, low)) >> mantissa_bits(D);
    }

    // The exponents from `at` on, in any order, a byte each. Where there are fewer than 64, the first of all
    // stands for the others.
    KVCAST_AVX512_INLINE __m512i step(std::size_t at) const {
        __m512i e[kVectors];
        KVCAST_UNROLL
        for (std::size_t v = 0; v < kVectors; ++v) e[v] = exponents(vector(at, v));
        if constexpr (D == Dtype::kF32)
            return _mm512_packus_epi16(_mm512_packus_epi32(e[0], e[1]), _mm512_packus_epi32(e[2], e[3]));
        return _mm512_packus_epi16(e[0], e[1]);
    }

  private:
    static constexpr std::size_t kVectors = sizeof(ElementOf<D>);
    static constexpr std::size_t kLanesOfVector = kStep / kVectors;
    static constexpr std::uint32_t kMagnitude =
        exponent_mask(D) << mantissa_bits(D) | ((1u << mantissa_bits(D)) - 1);

    ElementOf<D> bits_of_first() const {
        ElementOf<D> bits;
        std::memcpy(&bits, elements_, sizeof bits);
        return bits;
    }

    KVCAST_AVX512_INLINE __m512i vector(std::size_t at, std::size_t v) const {
        const std::size_t begin = at + v * kLanesOfVector;
        if (Whole || begin + kLanesOfVector <= count_) [[likely]]
            return _mm512_loadu_si512(elements_ + begin);
        const std::size_t lanes = begin < count_ ? count_ - begin : 0;
        if constexpr (D == Dtype::kF32) {
            return _mm512_mask_loadu_epi32(
                _mm512_set1_epi32(static_cast<int>(bits_of_first())),
                static_cast<__mmask16>(first_lanes(std::min<std::size_t>(lanes, 16))), elements_ + begin);
        } else {
            return _mm512_mask_loadu_epi16(_mm512_set1_epi16(static_cast<std::int16_t>(bits_of_first())),
                                           first_lanes(lanes), elements_ + begin);
        }
    }

    KVCAST_AVX512_INLINE static __m512i largest(__m512i a, __m512i b) {
        if constexpr (D == Dtype::kF32)
            return _mm512_max_epu32(a, _mm512_and_si512(b, _mm512_set1_epi32(static_cast<int>(kMagnitude))));
        return _mm512_max_epu16(
            a, _mm512_and_si512(b, _mm512_set1_epi16(static_cast<std::int16_t>(kMagnitude))));
    }

    KVCAST_AVX512_INLINE static __m512i exponents(__m512i v) {
        if constexpr (D == Dtype::kF32)
            return _mm512_and_si512(_mm512_srli_epi32(v, mantissa_bits(D)),
                                    _mm512_set1_epi32(static_cast<int>(exponent_mask(D))));
        return _mm512_and_si512(_mm512_srli_epi16(v, mantissa_bits(D)),
                                _mm512_set1_epi16(static_cast<std::int16_t>(exponent_mask(D))));
    }

    const ElementOf<D>* elements_ = nullptr;
    std::size_t count_ = 0;
};

// How often each of 16 exponents occurs, 16 bits each, and whether there are some below them.
struct Sixteen {
    __m256i counts;
    bool below;
};

// Counts exponents of N rows from `low` on, of which no more than `above` exponents are higher than these 16.
// A byte that has the bit of its exponent is set in one of two vectors; eight of them, transposed, are eight
// bytes of as many bits as there are of an exponent.
template <std::size_t N, typename Exponents>
KVCAST_AVX512_INLINE void count_sixteen(const Exponents (&rows)[N], std::size_t count,
                                        const std::uint32_t (&low)[N], std::uint32_t above,
                                        Sixteen (&sixteen)[N]) {
    constexpr std::size_t kMostSteps = 31;  // whose counts of up to eight fit a byte
    const __m512i lower =
        _mm512_broadcast_i32x4(_mm_setr_epi8(1, 2, 4, 8, 16, 32, 64, -128, 0, 0, 0, 0, 0, 0, 0, 0));
    const __m512i higher = _mm512_bslli_epi128(lower, 8);
    Each<N> base, below, words;
    KVCAST_EACH {
        base[e] = _mm512_set1_epi8(static_cast<char>(low[e]));
        below[e] = words[e] = _mm512_setzero_si512();
    }
    for (std::size_t begin = 0; begin < count;) {
        const std::size_t end = std::min(count, begin + kMostSteps * Exponents::kStep);
        Each<N> first, second;
        KVCAST_EACH first[e] = second[e] = _mm512_setzero_si512();
        for (; begin < end; begin += Exponents::kStep) {
            KVCAST_EACH {
                const __m512i at = _mm512_sub_epi8(rows[e].step(begin), base[e]);
                const __m512i index = _mm512_adds_epu8(at, _mm512_set1_epi8(0x70));  // bit 7: none of these
                below[e] = _mm512_max_epu8(below[e], at);
                first[e] = _mm512_add_epi8(first[e],
                                           _mm512_popcnt_epi8(transposed(_mm512_shuffle_epi8(lower, index))));
                second[e] = _mm512_add_epi8(
                    second[e], _mm512_popcnt_epi8(transposed(_mm512_shuffle_epi8(higher, index))));
            }
        }
        KVCAST_EACH {
            const __m512i a = _mm512_unpacklo_epi64(first[e], second[e]);
            const __m512i b = _mm512_unpackhi_epi64(first[e], second[e]);
            words[e] = _mm512_add_epi16(
                words[e], _mm512_add_epi16(_mm512_cvtepu8_epi16(_mm512_castsi512_si256(a)),
                                           _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(a, 1))));
            words[e] = _mm512_add_epi16(
                words[e], _mm512_add_epi16(_mm512_cvtepu8_epi16(_mm512_castsi512_si256(b)),
                                           _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(b, 1))));
        }
    }
    KVCAST_EACH {
        sixteen[e].counts =
            _mm256_add_epi16(_mm512_castsi512_si256(words[e]), _mm512_extracti64x4_epi64(words[e], 1));
        sixteen[e].below =
            _mm512_cmpgt_epu8_mask(below[e], _mm512_set1_epi8(static_cast<char>(15 + above))) != 0;
    }
}

// Where the first of the largest of 32 unsigned numbers is, and how large it is.
struct Largest {
    std::uint32_t at;
    std::uint32_t number;
};

KVCAST_AVX512_INLINE Largest largest_of(__m512i numbers) {
    const __m256i sixteen =
        _mm256_max_epu16(_mm512_castsi512_si256(numbers), _mm512_extracti64x4_epi64(numbers, 1));
    const __m128i eight =
        _mm_max_epu16(_mm256_castsi256_si128(sixteen), _mm256_extracti128_si256(sixteen, 1));
    const __m128i most =
        _mm_xor_si128(_mm_minpos_epu16(_mm_xor_si128(eight, _mm_set1_epi16(-1))), _mm_set1_epi16(-1));
    const std::uint32_t there = _mm512_cmpeq_epi16_mask(numbers, _mm512_broadcastw_epi16(most));
    return {static_cast<std::uint32_t>(std::countr_zero(there)),
            static_cast<std::uint32_t>(_mm_extract_epi16(most, 0))};
}

// The costs of 16 tables.
KVCAST_AVX512_INLINE __m512i costs_of(const __m256i& of_symbols, const ExponentCosts& costs) {
    alignas(32) std::int32_t pairs[kSymbols / 2];
    _mm256_store_si256(reinterpret_cast<__m256i*>(pairs), of_symbols);
    asm("" : "+m"(pairs));  // or the compiler takes them out of the register, which takes longer
    __m512i even = _mm512_setzero_si512(), odd = even;
    KVCAST_UNROLL
    for (std::size_t p = 0; p < kSymbols / 2; p += 2) {
        even = _mm512_dpwssd_epi32(even, _mm512_loadu_si512(costs[p]), _mm512_set1_epi32(pairs[p]));
        odd = _mm512_dpwssd_epi32(odd, _mm512_loadu_si512(costs[p + 1]), _mm512_set1_epi32(pairs[p + 1]));
    }
    return _mm512_add_epi32(even, odd);
}

// As the slot, for N rows whose exponents are all, or nearly so, among 32; else false.
template <std::size_t N, Dtype D, bool Whole>
KVCAST_AVX512 bool choose_of_few(const ElementRows& from, std::size_t at, const ExponentCosts& costs,
                                 std::uint32_t* chosen) {
    using Rows = Exponents<D, Whole>;
    const std::size_t count = from.count;
    Rows rows[N];
    std::uint32_t low[N], middle[N];
    KVCAST_EACH {
        rows[e] = Rows(from.row(at + e), count);
        low[e] = rows[e].most() - 31;  // may be below zero
        middle[e] = low[e] + 16;
    }
    Sixteen upper[N], lower[N];
    count_sixteen<N>(rows, count, middle, 0, upper);
    bool below = false;
    KVCAST_EACH {
        lower[e] = {_mm256_setzero_si256(), false};
        below = below || upper[e].below;
    }
    if (below) [[unlikely]]
        count_sixteen<N>(rows, count, low, 16, lower);
    Each<N> counts, least, sums[3];  // of centers below, at and above the most frequent one
    Largest mode[N];
    KVCAST_EACH {
        counts[e] = _mm512_inserti64x4(_mm512_castsi256_si512(lower[e].counts), upper[e].counts, 1);
        // The first one was repeated; where it is below, it was not counted.
        if (const std::uint32_t first = rows[e].first() - low[e]; !Whole && first < 32)
            counts[e] =
                _mm512_mask_sub_epi16(counts[e], 1u << first, counts[e],
                                      _mm512_set1_epi16(static_cast<std::int16_t>(rows[e].repeated())));
        mode[e] = largest_of(counts[e]);
    }
    KVCAST_EACH {
        if (!lower[e].below) [[likely]]
            continue;
        const __m512i pairs = _mm512_madd_epi16(counts[e], _mm512_set1_epi16(1));
        const std::size_t others = count - static_cast<std::size_t>(_mm512_reduce_add_epi32(pairs));
        if (others >= mode[e].number || mode[e].at < kSymbolZero + 1) return false;
    }
    const __m512i falling = _mm512_zextsi256_si512(
        _mm256_setr_epi16(0, -1, -2, -3, -4, -5, -6, -7, -8, -9, -10, -11, -12, -13, -14, -15));
    const __m256i total = _mm256_set1_epi16(static_cast<std::int16_t>(count));
    KVCAST_UNROLL
    for (std::uint32_t i = 0; i < 3; ++i) {
        KVCAST_EACH {
            const __m512i index = _mm512_add_epi16(
                falling, _mm512_set1_epi16(static_cast<std::int16_t>(mode[e].at + kSymbolZero - 1 + i)));
            const __mmask32 there = _mm512_cmplt_epu16_mask(index, _mm512_set1_epi16(32));
            const __m256i symbols =
                _mm512_castsi512_si256(_mm512_maskz_permutexvar_epi16(there, index, counts[e]));
            sums[i][e] = costs_of(_mm256_mask_mov_epi16(symbols, 1u << kEscape, total), costs);
        }
    }
    KVCAST_EACH {
        const std::uint32_t center = low[e] + mode[e].at;
        const __m512i none = _mm512_set1_epi32(-1);
        if (center == 0) sums[0][e] = none;
        if (center == exponent_mask(D)) sums[2][e] = none;
        least[e] = _mm512_set1_epi32(static_cast<int>(
            _mm512_reduce_min_epu32(_mm512_min_epu32(sums[0][e], _mm512_min_epu32(sums[1][e], sums[2][e])))));
    }
    KVCAST_EACH {
        std::uint64_t cheapest = 0;
        KVCAST_UNROLL
        for (unsigned i = 0; i < 3; ++i)
            cheapest |= std::uint64_t{_mm512_cmpeq_epi32_mask(sums[i][e], least[e])} << (kSymbols * i);
        chosen[at + e] =
            (low[e] + mode[e].at - 1) * kSymbols + static_cast<std::uint32_t>(std::countr_zero(cheapest));
    }
    return true;
}

// Two rows side by side: what has to be known of one before the next step has the other's work in between.
template <Dtype D, bool Whole>
void choose_as(const ElementRows& rows, const ExponentCosts& costs, std::uint32_t* chosen) {
    for (std::size_t i = 0; i < rows.rows;) {
        if (i + 2 <= rows.rows && choose_of_few<2, D, Whole>(rows, i, costs, chosen)) {
            i += 2;
            continue;
        }
        if (!choose_of_few<1, D, Whole>(rows, i, costs, chosen))
            scalar::choose_exponents({rows.row(i), 0, 1, rows.count, D}, costs, chosen + i);
        ++i;
    }
}

template <Dtype D>
void choose_as(const ElementRows& rows, const ExponentCosts& costs, std::uint32_t* chosen) {
    rows.count % Exponents<D, true>::kStep == 0 ? choose_as<D, true>(rows, costs, chosen)
                                                : choose_as<D, false>(rows, costs, chosen);
}

}  // namespace

void choose_exponents(const ElementRows& rows, const ExponentCosts& costs, std::uint32_t* chosen) {
    constexpr std::size_t kMost = 32767 - 64;  // elements of a row, whose counts fit 16 bits
    if (rows.count == 0 || rows.count > kMost) return scalar::choose_exponents(rows, costs, chosen);
    switch (rows.dtype) {
        case Dtype::kBf16:
            return choose_as<Dtype::kBf16>(rows, costs, chosen);
        case Dtype::kF16:
            return choose_as<Dtype::kF16>(rows, costs, chosen);
        default:
            return choose_as<Dtype::kF32>(rows, costs, chosen);
    }
}

KVCAST_AVX512 void send(Outgoing& rows) {
    Sender sender({&rows, 1});
    while (sender.any()) send_lines(sender, 1);
    sender.finish();
    _mm_sfence();
}

}  // namespace kvcast::kernels::avx512
