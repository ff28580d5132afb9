// 32 states of 32 bits are two vectors of 16-bit halves twice, high and low: see the AVX-512 backend. What is
// looked up are bytes, of all 32 lanes at once. Decoding, the next words are spread over the lanes that are
// low by a table of shuffles; encoding, those of lanes that are full are gathered by another one.
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <utility>

#include "kernels/avx2/elements.h"
#include "kernels/avx2/slots.h"
#include "kernels/avx2/target.h"
#include "kernels/avx2/vectors.h"
#include "kernels/scalar/elements.h"
#include "kernels/x86/elements.h"
#include "kernels/x86/groups.h"
#include "kernels/x86/lanes.h"
#include "kernels/x86/sender.h"
#include "kernels/x86/words.h"

namespace kvcast::kernels::avx2 {
namespace {

using x86::ElementOf;
using x86::first_lanes;
using x86::for_groups;
using x86::Sender;
using x86::strips_each;
using x86::with_dtype;
using x86::Words;

constexpr std::size_t kMostAbreast = 2;  // decoders

constexpr std::size_t kVectors = 4;  // of 8 lanes

// For each set of 8 lanes: spread[m] shuffles the next words to the lanes of m, in order, and zeros
// elsewhere; gathered[m] shuffles the words of the lanes of m, in order, to the upper end.
struct Shuffles {
    std::uint8_t spread[256][16];
    std::uint8_t gathered[256][16];
};

constexpr Shuffles shuffles() {
    Shuffles s = {};
    for (unsigned m = 0; m < 256; ++m) {
        unsigned below = 0, at = 16 - 2 * static_cast<unsigned>(std::popcount(m));
        for (unsigned i = 0; i < 8; ++i) {
            const bool there = (m >> i & 1u) != 0;
            for (unsigned byte = 0; byte < 2; ++byte) {
                s.spread[m][2 * i + byte] = static_cast<std::uint8_t>(there ? 2 * below + byte : 0x80);
                if (there) s.gathered[m][at++] = static_cast<std::uint8_t>(2 * i + byte);
            }
            if (there) ++below;
        }
    }
    return s;
}

alignas(64) constexpr Shuffles kShuffles = shuffles();

// 32 lanes of 16 bits.
struct Half {
    __m256i low;
    __m256i high;
};

// Lanes of 32 bits, each within unsigned 16.
KVCAST_AVX2_INLINE __m256i packed(__m256i a, __m256i b) {
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8);
}

// The halves of 32 states. Vector 0 has lanes 0..7 and 16..23, vector 1 lanes 8..15 and 24..31: packed to
// bytes they are in order.
struct HalfStates {
    __m256i high[2];
    __m256i low[2];
};

KVCAST_AVX2_INLINE HalfStates load_halves(const std::uint32_t* state) {
    const __m256i low = _mm256_set1_epi32(0xffff);
    HalfStates s;
    KVCAST_UNROLL
    for (std::size_t v = 0; v < 2; ++v) {
        const __m256i a = load256(state + 8 * v), b = load256(state + 16 + 8 * v);
        s.low[v] = packed(_mm256_and_si256(a, low), _mm256_and_si256(b, low));
        s.high[v] = packed(_mm256_srli_epi32(a, 16), _mm256_srli_epi32(b, 16));
    }
    return s;
}

KVCAST_AVX2_INLINE void store_halves(std::uint32_t* state, const HalfStates& s) {
    KVCAST_UNROLL
    for (std::size_t v = 0; v < 2; ++v) {
        const __m256i low = _mm256_permute4x64_epi64(s.low[v], 0xd8);
        const __m256i high = _mm256_permute4x64_epi64(s.high[v], 0xd8);
        store256(state + 8 * v, _mm256_unpacklo_epi16(low, high));
        store256(state + 16 + 8 * v, _mm256_unpackhi_epi16(low, high));
    }
}

KVCAST_AVX2_INLINE __m256i looked_up_bytes(const std::uint8_t* table, __m256i index) {
    const __m128i t = _mm_load_si128(reinterpret_cast<const __m128i*>(table));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(t), index);
}

// The next words at the lanes of a set, zeros elsewhere.
KVCAST_AVX2_INLINE __m256i spread_words(const std::uint8_t* lower, std::uint32_t lower_lanes,
                                        const std::uint8_t* upper, std::uint32_t upper_lanes) {
    const auto* spread = kShuffles.spread;
    const __m256i words =
        _mm256_loadu2_m128i(reinterpret_cast<const __m128i*>(upper), reinterpret_cast<const __m128i*>(lower));
    const __m256i places = _mm256_loadu2_m128i(reinterpret_cast<const __m128i*>(spread[upper_lanes & 255u]),
                                               reinterpret_cast<const __m128i*>(spread[lower_lanes & 255u]));
    return _mm256_shuffle_epi8(words, places);
}

// Full lanes of a set, in the order of HalfStates.
KVCAST_AVX2_INLINE __m256i half_lanes(std::uint32_t lower, std::uint32_t upper) {
    const __m256i each = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i bits = _mm256_set_m128i(_mm_set1_epi16(static_cast<short>(upper & 255u)),
                                          _mm_set1_epi16(static_cast<short>(lower & 255u)));
    return _mm256_cmpeq_epi16(_mm256_and_si256(bits, each), each);
}

// Takes a symbol out of each lane that is set in `lanes` (all of them where Whole) and refills: bytes, in
// order.
template <bool Whole>
KVCAST_AVX2_INLINE __m256i take_symbols(HalfStates& s, const ByteTable& t, std::uint32_t lanes,
                                        Words& words) {
    const __m256i bucket = _mm256_packus_epi16(_mm256_srli_epi16(s.low[0], kBucketBits),
                                               _mm256_srli_epi16(s.low[1], kBucketBits));
    const __m256i last[2] = {looked_up_bytes(t.last[0], bucket), looked_up_bytes(t.last[1], bucket)};
    const __m256i within = _mm256_set1_epi16(kBucketSlots - 1);
    const __m256i beyond = _mm256_packs_epi16(
        _mm256_cmpgt_epi16(_mm256_and_si256(s.low[0], within), _mm256_unpacklo_epi8(last[0], last[1])),
        _mm256_cmpgt_epi16(_mm256_and_si256(s.low[1], within), _mm256_unpackhi_epi8(last[0], last[1])));
    // A shuffle gives zero where the index is negative.
    const __m256i first = _mm256_or_si256(bucket, beyond);
    const __m256i second = _mm256_or_si256(bucket, _mm256_xor_si256(beyond, _mm256_set1_epi8(-1)));
    const __m256i own = _mm256_andnot_si256(beyond, _mm256_and_si256(bucket, _mm256_set1_epi8(15)));
    const __m256i symbol = _mm256_or_si256(own, looked_up_bytes(t.second, second));
    const __m256i frequency[2] = {looked_up_bytes(t.frequency[0], symbol),
                                  looked_up_bytes(t.frequency[1], symbol)};
    __m256i rank[2];
    KVCAST_UNROLL
    for (std::size_t byte = 0; byte < 2; ++byte)
        rank[byte] = _mm256_or_si256(looked_up_bytes(t.rank[0][byte], first),
                                     looked_up_bytes(t.rank[1][byte], second));
    const __m256i mask = _mm256_set1_epi16(kProbabilityMask);
    __m256i low[2], high[2], refill[2];
    KVCAST_UNROLL
    for (std::size_t v = 0; v < 2; ++v) {
        const __m256i f = v == 0 ? _mm256_unpacklo_epi8(frequency[0], frequency[1])
                                 : _mm256_unpackhi_epi8(frequency[0], frequency[1]);
        const __m256i r =
            v == 0 ? _mm256_unpacklo_epi8(rank[0], rank[1]) : _mm256_unpackhi_epi8(rank[0], rank[1]);
        const __m256i rest = _mm256_add_epi16(_mm256_mulhi_epu16(f, _mm256_andnot_si256(mask, s.low[v])),
                                              _mm256_add_epi16(_mm256_and_si256(s.low[v], mask), r));
        low[v] = _mm256_add_epi16(_mm256_mullo_epi16(f, s.high[v]), rest);
        const __m256i no_carry = _mm256_cmpeq_epi16(_mm256_max_epu16(low[v], rest), low[v]);
        high[v] = _mm256_add_epi16(_mm256_mulhi_epu16(f, s.high[v]),
                                   _mm256_add_epi16(no_carry, _mm256_set1_epi16(1)));
        refill[v] = _mm256_cmpeq_epi16(high[v], _mm256_setzero_si256());
        if constexpr (!Whole) {
            const __m256i there = half_lanes(lanes >> (8 * v), lanes >> (8 * v + 16));
            low[v] = _mm256_blendv_epi8(s.low[v], low[v], there);
            high[v] = _mm256_blendv_epi8(s.high[v], high[v], there);
            refill[v] = _mm256_and_si256(refill[v], there);
        }
    }
    const auto few =
        static_cast<std::uint32_t>(_mm256_movemask_epi8(_mm256_packs_epi16(refill[0], refill[1])));
    const auto behind = [&](std::uint32_t some) { return words.next + 2 * std::popcount(some); };
    const __m256i next[2] = {spread_words(words.next, few, behind(few & 0xffffu), few >> 16),
                             spread_words(behind(few & 0xffu), few >> 8, behind(few & 0xffffffu), few >> 24)};
    words.next = behind(few);
    KVCAST_UNROLL
    for (std::size_t v = 0; v < 2; ++v) {
        // Where a word comes, the high half is zero.
        s.high[v] = _mm256_or_si256(high[v], _mm256_and_si256(low[v], refill[v]));
        s.low[v] = _mm256_or_si256(_mm256_andnot_si256(refill[v], low[v]), next[v]);
    }
    return symbol;
}

KVCAST_AVX2_INLINE std::uint32_t escapes_in(__m256i symbols) {
    return static_cast<std::uint32_t>(
        _mm256_movemask_epi8(_mm256_cmpeq_epi8(symbols, _mm256_set1_epi8(kEscape))));
}

KVCAST_AVX2_INLINE Half values_in(__m256i symbols) {
    const __m256i value = _mm256_sub_epi8(symbols, _mm256_set1_epi8(kSymbolZero));
    return {_mm256_cvtepi8_epi16(_mm256_castsi256_si128(value)),
            _mm256_cvtepi8_epi16(_mm256_extracti128_si256(value, 1))};
}

// The bits of `Where` change places with those `By` above them.
template <int By, long long Where>
KVCAST_AVX2_INLINE __m256i swapped(__m256i x) {
    const __m256i t =
        _mm256_and_si256(_mm256_xor_si256(x, _mm256_srli_epi64(x, By)), _mm256_set1_epi64x(Where));
    return _mm256_xor_si256(x, _mm256_xor_si256(t, _mm256_slli_epi64(t, By)));
}

// In each quadword, bit c of byte r changes places with bit r of byte c.
KVCAST_AVX2_INLINE __m256i transposed_bits(__m256i x) {
    x = swapped<7, 0x00aa00aa00aa00aa>(x);
    x = swapped<14, 0x0000cccc0000cccc>(x);
    return swapped<28, 0x00000000f0f0f0f0>(x);
}

// In each half, byte c of word r of 32 bits changes places with byte r of word c.
KVCAST_AVX2_INLINE __m256i transposed_bytes(__m256i x) {
    return _mm256_shuffle_epi8(x, _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,  //
                                                   0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
}

// Eight planes of 32 bits as bytes of 32 lanes, one bit of each plane, and back.
KVCAST_AVX2_INLINE __m256i lanes_of_planes(__m256i planes) {
    const __m256i interleaved = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    return transposed_bits(_mm256_permutevar8x32_epi32(transposed_bytes(planes), interleaved));
}

KVCAST_AVX2_INLINE __m256i planes_of_lanes(__m256i lanes) {
    const __m256i apart = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    return transposed_bytes(_mm256_permutevar8x32_epi32(transposed_bits(lanes), apart));
}

// Eight planes from `from` on; planes of 16 lanes or fewer have one word each.
KVCAST_AVX2_INLINE __m256i load_planes(const std::uint8_t* from, bool both) {
    return both ? load256(from)
                : _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

// Raw bits, up to 16 planes.
KVCAST_AVX2_INLINE Half take_raw(unsigned planes, bool both, Words& words) {
    const unsigned bytes = both ? 4 : 2;
    const __m256i low = lanes_of_planes(load_planes(words.next, both));
    Half raw = {_mm256_cvtepu8_epi16(_mm256_castsi256_si128(low)),
                _mm256_cvtepu8_epi16(_mm256_extracti128_si256(low, 1))};
    if (planes > 8) {
        const __m256i high = lanes_of_planes(load_planes(words.next + 8 * bytes, both));
        raw.low = _mm256_or_si256(raw.low,
                                  _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm256_castsi256_si128(high)), 8));
        raw.high = _mm256_or_si256(
            raw.high, _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm256_extracti128_si256(high, 1)), 8));
    }
    words.next += planes * bytes;
    const __m256i mask = _mm256_set1_epi16(static_cast<short>((1u << planes) - 1));
    return {_mm256_and_si256(raw.low, mask), _mm256_and_si256(raw.high, mask)};
}

// ---- what values become ----

// 16 states as elements.
template <Dtype D>
KVCAST_AVX2_INLINE __m256i elements_in_order(__m256i states, const Strip& strip) {
    return elements16<D>(low_states(states), high_states(states),
                         _mm256_set1_ps(kernels::value_of(1, strip.meaning->scale)));
}

KVCAST_AVX2_INLINE __m256i meant_by(__m256i states, const Strip& strip) {
    const auto dtype = strip.meaning->dtype;
    if (!dtype) return states;
    return *dtype == Dtype::kF16 ? elements_in_order<Dtype::kF16>(states, strip)
                                 : elements_in_order<Dtype::kBf16>(states, strip);
}

KVCAST_AVX2_INLINE __m256i states_of(__m256i low, __m256i high, const Strip& strip) {
    const __m128i shift = _mm_cvtsi32_si128(static_cast<int>(strip.meaning->shift));
    const __m256i mean = _mm256_set1_epi32(strip.mean);
    return _mm256_packs_epi32(_mm256_add_epi32(mean, _mm256_sll_epi32(low, shift)),
                              _mm256_add_epi32(mean, _mm256_sll_epi32(high, shift)));
}

// Values that are there to what they become.
KVCAST_AVX2 void become(const Strip& strip) {
    std::size_t i = 0;
    for (; i + 16 <= strip.count; i += 16) {
        const __m256i v = load256(strip.values + i);
        store256(strip.values + i, meant_by(states_of(low_states(v), high_states(v), strip), strip));
    }
    for (; i < strip.count; ++i) strip.values[i] = scalar::meant(strip, strip.values[i]);
}

// What the symbols of a strip become, where it has no raw bits.
class Numbers {
  public:
    KVCAST_AVX2_INLINE explicit Numbers(const Strip& strip)
        : meant_(strip.meaning != nullptr && strip.shift == 0) {
        if (!meant_) return;
        const __m256i values = states_of(_mm256_setr_epi32(-7, -6, -5, -4, -3, -2, -1, 0),
                                         _mm256_setr_epi32(1, 2, 3, 4, 5, 6, 7, 8), strip);
        const __m256i numbers = meant_by(_mm256_permute4x64_epi64(values, 0xd8), strip);
        const __m256i bytes = _mm256_shuffle_epi8(
            numbers, _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15,  //
                                      0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
        _mm256_store_si256(reinterpret_cast<__m256i*>(bytes_), _mm256_permute4x64_epi64(bytes, 0xd8));
    }

    bool meant() const { return meant_; }

    // What is meant() by symbols.
    KVCAST_AVX2_INLINE Half of(__m256i symbols) const {
        const __m256i low = looked_up_bytes(bytes_[0], symbols), high = looked_up_bytes(bytes_[1], symbols);
        const __m256i a = _mm256_unpacklo_epi8(low, high), b = _mm256_unpackhi_epi8(low, high);
        return {_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31)};
    }

  private:
    alignas(32) std::uint8_t bytes_[2][16];  // [byte of a number][symbol]
    bool meant_;
};

// ---- decoding ----

template <typename Meant>
KVCAST_AVX2_INLINE Half take_escapes(const Half& numbers, std::uint32_t escapes, Words& words,
                                     Meant&& meant) {
    alignas(32) std::int16_t lanes[kLanes];
    store256(lanes, numbers.low);
    store256(lanes + 16, numbers.high);
    x86::take_escapes(lanes, escapes, words, meant);
    return {load256(lanes), load256(lanes + 16)};
}

KVCAST_AVX2_INLINE Half take_escapes(const Half& numbers, std::uint32_t escapes, Words& words) {
    return take_escapes(numbers, escapes, words, [](std::int16_t v) { return v; });
}

KVCAST_AVX2_INLINE __m256i value_of(__m256i high, __m256i raw, unsigned shift) {
    const __m256i half = _mm256_set1_epi16(static_cast<short>(shift == 0 ? 0 : 1 << (shift - 1)));
    const __m256i shifted = _mm256_sll_epi16(high, _mm_cvtsi32_si128(static_cast<int>(shift)));
    return _mm256_sub_epi16(_mm256_add_epi16(shifted, raw), half);
}

// One group of `lanes` of a strip.
template <bool Whole>
KVCAST_AVX2_INLINE void decode_group(HalfStates& s, const Strip& strip, const Numbers& numbers,
                                     std::uint32_t lanes, Words& words, std::size_t at) {
    words.prepare();
    const __m256i symbols = take_symbols<Whole>(s, strip.table->bytes, lanes, words);
    std::uint32_t escapes = escapes_in(symbols);
    if constexpr (!Whole) escapes &= lanes;
    Half value;
    if (numbers.meant()) {
        value = numbers.of(symbols);
        if (escapes != 0) [[unlikely]]
            value =
                take_escapes(value, escapes, words, [&](std::int16_t v) { return scalar::meant(strip, v); });
    } else {
        value = values_in(symbols);
        Half raw = {_mm256_setzero_si256(), _mm256_setzero_si256()};
        if (strip.shift != 0) raw = take_raw(strip.shift, Whole || lanes > 0xffff, words);
        if (escapes != 0) [[unlikely]]
            value = take_escapes(value, escapes, words);
        value = {value_of(value.low, raw.low, strip.shift), value_of(value.high, raw.high, strip.shift)};
    }
    std::int16_t* const to = strip.values + at;
    if constexpr (Whole) {
        store256(to, value.low);
        store256(to + 16, value.high);
    } else {
        alignas(32) std::int16_t out[kLanes];
        store256(out, value.low);
        store256(out + 16, value.high);
        std::memcpy(to, out, sizeof(std::int16_t) * static_cast<unsigned>(std::popcount(lanes)));
    }
}

// Up to so many lines.
KVCAST_AVX2_INLINE void send_lines(Sender& sender, std::size_t lines) {
    KVCAST_UNROLL
    for (std::size_t i = 0; i < lines; ++i) {
        if (!sender.any()) return;
        const auto* from = reinterpret_cast<const __m256i*>(sender.from());
        auto* to = reinterpret_cast<__m256i*>(sender.to());
        _mm256_stream_si256(to, _mm256_load_si256(from));
        _mm256_stream_si256(to + 1, _mm256_load_si256(from + 1));
        sender.left();
    }
}

// What is left of a strip from a whole group on.
KVCAST_AVX2_INLINE void decode_alone(HalfStates& s, Words& words, const Strip& strip, const Numbers& numbers,
                                     std::size_t at, Sender& sender) {
    for (; at + kLanes <= strip.count; at += kLanes) {
        decode_group<true>(s, strip, numbers, ~0u, words, at);
        send_lines(sender, 1);
    }
    if (at != strip.count) decode_group<false>(s, strip, numbers, first_lanes(strip.count - at), words, at);
    if (strip.meaning != nullptr && !numbers.meant()) become(strip);
}

// One strip of each decoder: as long as all have whole groups, group by group, so that while one waits for
// its states, the others go on.
template <std::size_t N, std::size_t... D>
KVCAST_AVX2_INLINE void decode_step(std::index_sequence<D...>, HalfStates (&states)[N], const Strip* strips,
                                    Words (&words)[N], Sender& sender) {
    const Numbers numbers[N] = {Numbers(strips[D])...};
    std::size_t whole = N == 1 ? 0 : strips[0].count / kLanes * kLanes;
    KVCAST_UNROLL
    for (std::size_t d = 0; d < N; ++d) {
        if (strips[d].table == nullptr || strips[d].count != strips[0].count) whole = 0;
    }
    for (std::size_t at = 0; at != whole; at += kLanes) {
        KVCAST_UNROLL
        for (std::size_t d = 0; d < N; ++d)
            decode_group<true>(states[d], strips[d], numbers[d], ~0u, words[d], at);
        send_lines(sender, N);
    }
    KVCAST_UNROLL
    for (std::size_t d = 0; d < N; ++d) {
        if (strips[d].table == nullptr)
            std::fill_n(strips[d].values, strips[d].count, scalar::meant(strips[d], 0));
        else
            decode_alone(states[d], words[d], strips[d], numbers[d], whole, sender);
    }
}

// ---- floats ----

// 8 of 32 lanes of 16 bits, as 32.
template <bool Signed>
KVCAST_AVX2_INLINE __m256i eighth(const Half& v, std::size_t i) {
    const __m256i half = i < 2 ? v.low : v.high;
    const __m128i quarter = i % 2 == 0 ? _mm256_castsi256_si128(half) : _mm256_extracti128_si256(half, 1);
    return Signed ? _mm256_cvtepi16_epi32(quarter) : _mm256_cvtepu16_epi32(quarter);
}

// Raw bits to sign and mantissa, exponents put between them: 16 elements of 16 bits, and 8 of 32.
template <Dtype D>
KVCAST_AVX2_INLINE __m256i assembled16(__m256i raw, __m256i high, std::uint32_t center) {
    constexpr int mantissa = static_cast<int>(mantissa_bits(D));
    const __m256i exponent =
        _mm256_and_si256(_mm256_sub_epi16(_mm256_set1_epi16(static_cast<short>(center)), high),
                         _mm256_set1_epi16(static_cast<short>(exponent_mask(D))));
    const __m256i sign = _mm256_slli_epi16(_mm256_srli_epi16(raw, mantissa), 15);
    const __m256i fraction = _mm256_and_si256(raw, _mm256_set1_epi16((1 << mantissa) - 1));
    return _mm256_or_si256(sign, _mm256_or_si256(fraction, _mm256_slli_epi16(exponent, mantissa)));
}

KVCAST_AVX2_INLINE __m256i assembled32(__m256i raw, __m256i high, std::uint32_t center) {
    constexpr int mantissa = static_cast<int>(mantissa_bits(Dtype::kF32));
    const __m256i exponent =
        _mm256_and_si256(_mm256_sub_epi32(_mm256_set1_epi32(static_cast<int>(center)), high),
                         _mm256_set1_epi32(static_cast<int>(exponent_mask(Dtype::kF32))));
    const __m256i sign = _mm256_slli_epi32(_mm256_srli_epi32(raw, mantissa), 31);
    const __m256i fraction = _mm256_and_si256(raw, _mm256_set1_epi32((1 << mantissa) - 1));
    return _mm256_or_si256(sign, _mm256_or_si256(fraction, _mm256_slli_epi32(exponent, mantissa)));
}

template <Dtype D, bool Whole>
KVCAST_AVX2_INLINE void decode_float_group(HalfStates& s, const ByteTable& t, std::uint32_t center,
                                           std::uint32_t lanes, Words& words, ElementOf<D>* elements) {
    constexpr unsigned planes = mantissa_bits(D) + 1;
    words.prepare();
    const __m256i symbols = take_symbols<Whole>(s, t, lanes, words);
    const std::uint32_t escapes = Whole ? escapes_in(symbols) : escapes_in(symbols) & lanes;
    Half high = values_in(symbols);
    const bool both = Whole || lanes > 0xffff;
    const Half raw = take_raw(std::min(planes, 16u), both, words);
    Half upper = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    if constexpr (planes > 16) upper = take_raw(planes - 16, both, words);
    if (escapes != 0) [[unlikely]]
        high = take_escapes(high, escapes, words);
    alignas(32) ElementOf<D> out[kLanes];
    ElementOf<D>* to = Whole ? elements : out;
    if constexpr (D == Dtype::kF32) {
        KVCAST_UNROLL
        for (std::size_t i = 0; i < kVectors; ++i) {
            const __m256i r =
                _mm256_or_si256(eighth<false>(raw, i), _mm256_slli_epi32(eighth<false>(upper, i), 16));
            store256(to + 8 * i, assembled32(r, eighth<true>(high, i), center));
        }
    } else {
        store256(to, assembled16<D>(raw.low, high.low, center));
        store256(to + 16, assembled16<D>(raw.high, high.high, center));
    }
    if constexpr (!Whole)
        std::memcpy(elements, out, sizeof(ElementOf<D>) * static_cast<unsigned>(std::popcount(lanes)));
}

template <std::size_t N, Dtype D>
KVCAST_AVX2_INLINE void decode_float_step(HalfStates (&states)[N], const FloatStrip* strips,
                                          std::size_t count, Words (&words)[N], Sender& sender) {
    std::size_t at = 0;
    for (; at + kLanes <= count; at += kLanes) {
        KVCAST_UNROLL
        for (std::size_t d = 0; d < N; ++d)
            decode_float_group<D, true>(states[d], strips[d].table->bytes, strips[d].center, ~0u, words[d],
                                        static_cast<ElementOf<D>*>(strips[d].elements) + at);
        send_lines(sender, N);
    }
    if (at == count) return;
    KVCAST_UNROLL
    for (std::size_t d = 0; d < N; ++d)
        decode_float_group<D, false>(states[d], strips[d].table->bytes, strips[d].center,
                                     first_lanes(count - at), words[d],
                                     static_cast<ElementOf<D>*>(strips[d].elements) + at);
}

// N decoders, each strip of theirs given to `step`.
template <std::size_t N, typename Strip, typename Step>
KVCAST_AVX2_INLINE void decode_abreast(RansDecoder* const* decoders, const Strip* strips, std::size_t steps,
                                       std::size_t stride, std::span<Outgoing> outgoing, Step&& step) {
    Sender sender(outgoing);
    HalfStates states[N];
    Words words[N];
    Words::Tail tails[N];
    KVCAST_UNROLL
    for (std::size_t d = 0; d < N; ++d) {
        states[d] = load_halves(decoders[d]->state);
        words[d].begin(*decoders[d], tails[d]);
    }
    for (std::size_t i = 0; i < steps; ++i, strips += stride) step(states, strips, words, sender);
    KVCAST_UNROLL
    for (std::size_t d = 0; d < N; ++d) {
        words[d].finish(*decoders[d]);
        store_halves(decoders[d]->state, states[d]);
    }
    sender.finish();
}

template <std::size_t N>
KVCAST_AVX2 void decode_strips_abreast(RansDecoder* const* decoders, const Strip* strips, std::size_t steps,
                                       std::size_t stride, std::span<Outgoing> outgoing) {
    decode_abreast<N>(decoders, strips, steps, stride, outgoing,
                      [](auto& states, const Strip* some, auto& words, Sender& sender) KVCAST_AVX2_LAMBDA {
                          decode_step(std::make_index_sequence<N>(), states, some, words, sender);
                      });
}

template <std::size_t N, Dtype D>
KVCAST_AVX2 void decode_floats_abreast(RansDecoder* const* decoders, const FloatStrip* strips,
                                       std::size_t steps, std::size_t stride, std::size_t count,
                                       std::span<Outgoing> outgoing) {
    decode_abreast<N>(
        decoders, strips, steps, stride, outgoing,
        [&](auto& states, const FloatStrip* some, auto& words, Sender& sender)
            KVCAST_AVX2_LAMBDA { decode_float_step<N, D>(states, some, count, words, sender); });
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

// All ones where a >= b, unsigned.
KVCAST_AVX2_INLINE __m256i at_least(__m256i a, __m256i b) {
    return _mm256_cmpeq_epi16(_mm256_max_epu16(a, b), a);
}

// Takes `less` off where that leaves nothing negative; where it did.
KVCAST_AVX2_INLINE __m256i reduce(__m256i& x, __m256i less) {
    const __m256i enough = at_least(x, less);
    x = _mm256_sub_epi16(x, _mm256_and_si256(enough, less));
    return enough;
}

// Lanes of 16 bits in the order of HalfStates.
struct Pair {
    __m256i at[2];
};

KVCAST_AVX2_INLINE Pair unpacked(__m256i low_bytes, __m256i high_bytes) {
    return {{_mm256_unpacklo_epi8(low_bytes, high_bytes), _mm256_unpackhi_epi8(low_bytes, high_bytes)}};
}

KVCAST_AVX2_INLINE Pair looked_up(const std::uint8_t (&table)[2][kSymbols], __m256i symbols) {
    return unpacked(looked_up_bytes(table[0], symbols), looked_up_bytes(table[1], symbols));
}

// Indices of 32 bytes, for the shuffles of either half of a table: a negative one gives zero.
struct Cells {
    __m256i lower;
    __m256i upper;

    KVCAST_AVX2_INLINE explicit Cells(__m256i index)
        : lower(_mm256_add_epi8(index, _mm256_set1_epi8(0x70))),
          upper(_mm256_sub_epi8(index, _mm256_set1_epi8(0x10))) {}

    KVCAST_AVX2_INLINE Pair look_up(const std::uint8_t (&table)[2][EncodeBytes::kCells]) const {
        return unpacked(bytes(table[0]), bytes(table[1]));
    }

  private:
    KVCAST_AVX2_INLINE __m256i bytes(const std::uint8_t* table) const {
        return _mm256_or_si256(looked_up_bytes(table, lower), looked_up_bytes(table + 16, upper));
    }
};

// An encoder on its way through strips.
struct Putter {
    HalfStates states;
    std::uint8_t* next;

    // The words of lanes of a set go below `next`, ascending with the lanes; what is below them is
    // overwritten.
    KVCAST_AVX2_INLINE void give(std::uint32_t lanes) {
        const auto gathered = [&](std::size_t v) KVCAST_AVX2_LAMBDA {
            const auto shuffle_of = [&](unsigned shift) {
                return reinterpret_cast<const __m128i*>(kShuffles.gathered[lanes >> shift & 255u]);
            };
            const unsigned first = 8 * static_cast<unsigned>(v);
            return _mm256_shuffle_epi8(states.low[v],
                                       _mm256_loadu2_m128i(shuffle_of(first + 16), shuffle_of(first)));
        };
        const auto put = [&](unsigned shift, __m128i words) KVCAST_AVX2_LAMBDA {
            _mm_storeu_si128(reinterpret_cast<__m128i*>(next - 16), words);
            next -= 2 * std::popcount(lanes >> shift & 255u);
        };
        const __m256i words[2] = {gathered(0), gathered(1)};
        put(24, _mm256_extracti128_si256(words[1], 1));
        put(16, _mm256_extracti128_si256(words[0], 1));
        put(8, _mm256_castsi256_si128(words[1]));
        put(0, _mm256_castsi256_si128(words[0]));
    }
};

// The quotient (high * 2^16 + low) / (divisor / scale) for high < divisor / scale. Products by `scale` are
// shifts.
KVCAST_AVX2_INLINE __m256i quotient(__m256i high, __m256i low, __m256i divisor, __m256i scale,
                                    __m256i reciprocal) {
    high = _mm256_add_epi16(_mm256_mullo_epi16(high, scale), _mm256_mulhi_epu16(low, scale));
    low = _mm256_mullo_epi16(low, scale);
    const __m256i q0 = _mm256_add_epi16(_mm256_mullo_epi16(reciprocal, high), low);
    const __m256i no_carry = at_least(q0, low);
    // One less than it is at first.
    __m256i q = _mm256_add_epi16(_mm256_add_epi16(_mm256_mulhi_epu16(reciprocal, high), _mm256_set1_epi16(1)),
                                 _mm256_add_epi16(high, no_carry));
    __m256i rest = _mm256_sub_epi16(low, _mm256_add_epi16(_mm256_mullo_epi16(q, divisor), divisor));
    const __m256i fits = at_least(q0, rest);
    q = _mm256_sub_epi16(q, fits);
    rest = _mm256_add_epi16(rest, _mm256_andnot_si256(fits, divisor));
    return _mm256_sub_epi16(q, at_least(rest, divisor));
}

// Puts a symbol into each lane that is set in `lanes` (all of them where Whole); `symbols` are bytes, in
// order. States that are full give a word away first.
template <bool Whole>
KVCAST_AVX2_INLINE void put_symbols(Putter& p, __m256i symbols, const EncodeBytes& t, std::uint32_t lanes) {
    const HalfStates& s = p.states;
    const Pair frequency = looked_up(t.frequency, symbols);
    __m256i there[2], full[2], high[2], low[2], two[2], one[2];
    KVCAST_UNROLL
    for (std::size_t v = 0; v < 2; ++v) {
        full[v] = at_least(s.high[v], frequency.at[v]);
        if constexpr (!Whole) {
            there[v] = half_lanes(lanes >> (8 * v), lanes >> (8 * v + 16));
            full[v] = _mm256_and_si256(full[v], there[v]);
        }
        low[v] = _mm256_blendv_epi8(s.low[v], s.high[v], full[v]);
        high[v] = _mm256_andnot_si256(full[v], s.high[v]);
    }
    p.give(static_cast<std::uint32_t>(_mm256_movemask_epi8(_mm256_packs_epi16(full[0], full[1]))));
    const Pair scale = looked_up(t.scale, symbols), reciprocal = looked_up(t.reciprocal, symbols);
    const Pair first = looked_up(t.first, symbols);
    KVCAST_UNROLL
    for (std::size_t v = 0; v < 2; ++v) {
        const __m256i f = frequency.at[v];
        high[v] =
            quotient(high[v], low[v], _mm256_mullo_epi16(f, scale.at[v]), scale.at[v], reciprocal.at[v]);
        low[v] = _mm256_sub_epi16(low[v], _mm256_mullo_epi16(high[v], f));
        // Four frequencies leave the two lowest bits of the quotient, and the rank.
        two[v] = reduce(low[v], _mm256_srli_epi16(f, 1));
        one[v] = reduce(low[v], _mm256_srli_epi16(f, 2));
        low[v] = _mm256_add_epi16(low[v], first.at[v]);
    }
    // From indices to slots.
    const Cells cells(_mm256_packus_epi16(_mm256_srli_epi16(low[0], EncodeHalves::kCellBits),
                                          _mm256_srli_epi16(low[1], EncodeHalves::kCellBits)));
    Pair offset = cells.look_up(t.offset[0]);
    KVCAST_UNROLL
    for (std::size_t n = 0; n < EncodeBytes::kBounds; ++n) {
        const Pair bound = cells.look_up(t.bound[n]), more = cells.look_up(t.offset[n + 1]);
        KVCAST_UNROLL
        for (std::size_t v = 0; v < 2; ++v) {
            const __m256i beyond = at_least(low[v], bound.at[v]);
            offset.at[v] = _mm256_add_epi16(offset.at[v], _mm256_and_si256(beyond, more.at[v]));
        }
    }
    KVCAST_UNROLL
    for (std::size_t v = 0; v < 2; ++v) {
        const __m256i bits = _mm256_or_si256(_mm256_slli_epi16(two[v], 15),
                                             _mm256_and_si256(one[v], _mm256_set1_epi16(0x4000)));
        low[v] = _mm256_or_si256(_mm256_add_epi16(low[v], offset.at[v]), bits);
        p.states.high[v] = Whole ? high[v] : _mm256_blendv_epi8(s.high[v], high[v], there[v]);
        p.states.low[v] = Whole ? low[v] : _mm256_blendv_epi8(s.low[v], low[v], there[v]);
    }
}

// The symbols of 32 signed high parts, and which of them escape.
struct Symbols {
    __m256i symbols;  // bytes, in order
    std::uint32_t escapes;
};

KVCAST_AVX2_INLINE Symbols symbols_of(const Half& high) {
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(high.low, high.high), 0xd8);
    const __m256i symbols =
        _mm256_min_epu8(_mm256_add_epi8(bytes, _mm256_set1_epi8(kSymbolZero)), _mm256_set1_epi8(kEscape));
    return {symbols, escapes_in(symbols)};
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

// Eight planes of 32 lanes, given in 16 bits each.
KVCAST_AVX2_INLINE __m256i planes_of(__m256i lower_lanes, __m256i upper_lanes) {
    return planes_of_lanes(_mm256_permute4x64_epi64(_mm256_packus_epi16(lower_lanes, upper_lanes), 0xd8));
}

// The lowest planes of 16-bit raw parts: words of 16 lanes, those of a plane's lower lanes first.
KVCAST_AVX2_INLINE void put_raw(const Half& raw, unsigned planes, std::uint32_t lanes, std::uint8_t*& next) {
    if (planes == 0) return;
    const __m256i low_bytes = _mm256_set1_epi16(0xff);
    const __m256i lower =
        planes_of(_mm256_and_si256(raw.low, low_bytes), _mm256_and_si256(raw.high, low_bytes));
    const __m256i upper = planes_of(_mm256_srli_epi16(raw.low, 8), _mm256_srli_epi16(raw.high, 8));
    if (lanes == ~0u) [[likely]] {
        next -= 4 * planes;
        const __m256i count = _mm256_set1_epi32(static_cast<int>(planes));
        const __m256i each = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        auto* const words = reinterpret_cast<int*>(next);
        _mm256_maskstore_epi32(words, _mm256_cmpgt_epi32(count, each), lower);
        if (planes > 8) {
            const __m256i others = _mm256_add_epi32(each, _mm256_set1_epi32(8));
            _mm256_maskstore_epi32(words + 8, _mm256_cmpgt_epi32(count, others), upper);
        }
        return;
    }
    alignas(32) std::uint32_t plane[16];
    store256(plane, lower);
    store256(plane + 8, upper);
    for (unsigned p = planes; p-- > 0;) {
        const std::uint32_t bits = plane[p] & lanes;
        if (lanes > 0xffff) put_word(next, bits >> 16);
        put_word(next, bits);
    }
}

// Where a group begins, its lanes, and its values, with zeros behind them where there are fewer than 32.
template <typename T>
class Group {
  public:
    Group(const T* from, std::size_t end)
        : at_((end - 1) / kLanes * kLanes), lanes_(first_lanes(end - at_)), values_(from + at_) {
        if (end - at_ == kLanes) return;
        std::memset(copied_, 0, sizeof copied_);
        std::memcpy(copied_, values_, (end - at_) * sizeof(T));
        values_ = copied_;
    }
    Group(const Group&) = delete;
    Group& operator=(const Group&) = delete;

    std::size_t at() const { return at_; }
    std::uint32_t lanes() const { return lanes_; }
    const T* values() const { return values_; }

  private:
    std::size_t at_;
    std::uint32_t lanes_;
    const T* values_;
    alignas(32) T copied_[kLanes];
};

KVCAST_AVX2_INLINE void put_group(Putter& p, const Symbols& symbols, const EncodeTable& table,
                                  std::uint32_t lanes) {
    if (lanes == ~0u) [[likely]] {
        put_symbols<true>(p, symbols.symbols, table.bytes, lanes);
    } else {
        put_symbols<false>(p, symbols.symbols, table.bytes, lanes);
    }
}

// The values in front of `end`, up to 32 of them. Returns where they begin.
KVCAST_AVX2_INLINE std::size_t encode_group(Putter& p, const EncodeStrip& strip, std::size_t end) {
    const __m256i half = _mm256_set1_epi16(static_cast<short>(strip.shift == 0 ? 0 : 1 << (strip.shift - 1)));
    const __m128i by = _mm_cvtsi32_si128(static_cast<int>(strip.shift));
    const Group<std::int16_t> g(strip.values, end);
    const Half value = {_mm256_add_epi16(load256(g.values()), half),
                        _mm256_add_epi16(load256(g.values() + 16), half)};
    const Half high = {_mm256_sra_epi16(value.low, by), _mm256_sra_epi16(value.high, by)};
    const Symbols symbols = symbols_of(high);
    if ((symbols.escapes & g.lanes()) != 0) [[unlikely]]
        put_escapes(high, symbols.escapes & g.lanes(), p.next);
    put_raw(value, strip.shift, g.lanes(), p.next);
    put_group(p, symbols, *strip.table, g.lanes());
    return g.at();
}

// Elements apart: how far their exponents are below the center, and their raw bits, sign first.
struct Parts {
    Half high;
    Half low;    // the lowest 16 raw bits
    Half upper;  // and those above
};

template <Dtype D>
KVCAST_AVX2_INLINE __m256i high16(__m256i elements, std::uint32_t center) {
    const __m256i exponent = _mm256_and_si256(_mm256_srli_epi16(elements, mantissa_bits(D)),
                                              _mm256_set1_epi16(static_cast<short>(exponent_mask(D))));
    return _mm256_sub_epi16(_mm256_set1_epi16(static_cast<short>(center)), exponent);
}

template <Dtype D>
KVCAST_AVX2_INLINE __m256i raw16(__m256i elements) {
    constexpr int mantissa = static_cast<int>(mantissa_bits(D));
    return _mm256_or_si256(_mm256_slli_epi16(_mm256_srli_epi16(elements, 15), mantissa),
                           _mm256_and_si256(elements, _mm256_set1_epi16((1 << mantissa) - 1)));
}

template <Dtype D>
KVCAST_AVX2_INLINE Parts parts_of(const std::uint16_t* elements, std::uint32_t center) {
    const __m256i a = load256(elements), b = load256(elements + 16);
    return {
        {high16<D>(a, center), high16<D>(b, center)}, {raw16<D>(a), raw16<D>(b)}, {a, b}};  // no bits above
}

template <Dtype D>
KVCAST_AVX2_INLINE Parts parts_of(const std::uint32_t* elements, std::uint32_t center) {
    constexpr int mantissa = static_cast<int>(mantissa_bits(D));
    const __m256i middle = _mm256_set1_epi32(static_cast<int>(center));
    const __m256i range = _mm256_set1_epi32(static_cast<int>(exponent_mask(D)));
    const __m256i words = _mm256_set1_epi32(0xffff);
    __m256i high[kVectors], low[kVectors], upper[kVectors];
    KVCAST_UNROLL
    for (std::size_t i = 0; i < kVectors; ++i) {
        const __m256i e = load256(elements + 8 * i);
        const __m256i exponent = _mm256_and_si256(_mm256_srli_epi32(e, mantissa), range);
        high[i] = _mm256_and_si256(_mm256_sub_epi32(middle, exponent), words);
        const __m256i raw = _mm256_or_si256(_mm256_slli_epi32(_mm256_srli_epi32(e, 31), mantissa),
                                            _mm256_and_si256(e, _mm256_set1_epi32((1 << mantissa) - 1)));
        low[i] = _mm256_and_si256(raw, words);
        upper[i] = _mm256_srli_epi32(raw, 16);
    }
    return {{packed(high[0], high[1]), packed(high[2], high[3])},
            {packed(low[0], low[1]), packed(low[2], low[3])},
            {packed(upper[0], upper[1]), packed(upper[2], upper[3])}};
}

template <Dtype D>
KVCAST_AVX2_INLINE std::size_t encode_float_group(Putter& p, const EncodeFloatStrip& strip, std::size_t end) {
    constexpr unsigned planes = mantissa_bits(D) + 1;
    const Group<ElementOf<D>> g(static_cast<const ElementOf<D>*>(strip.elements), end);
    const Parts parts = parts_of<D>(g.values(), strip.center);
    const Symbols symbols = symbols_of(parts.high);
    if ((symbols.escapes & g.lanes()) != 0) [[unlikely]]
        put_escapes(parts.high, symbols.escapes & g.lanes(), p.next);
    if constexpr (planes > 16) put_raw(parts.upper, planes - 16, g.lanes(), p.next);
    put_raw(parts.low, std::min(planes, 16u), g.lanes(), p.next);
    put_group(p, symbols, *strip.table, g.lanes());
    return g.at();
}

// Each encoder's strips, one of `stride` each, given to `put` group by group. One encoder's groups fill the
// ports; side by side, two of them were no faster.
template <typename Strip, typename CountOf, typename Put>
KVCAST_AVX2_INLINE void encode_each(std::span<RansEncoder* const> encoders, std::span<const Strip> strips,
                                    CountOf&& count_of, Put&& put) {
    const std::size_t stride = encoders.size();
    for (std::size_t e = 0; e < stride; ++e) {
        Putter p = {load_halves(encoders[e]->state), encoders[e]->next};
        for (std::size_t i = e; i < strips.size(); i += stride) {
            for (std::size_t end = count_of(strips[i]); end != 0;) end = put(p, strips[i], end);
        }
        store_halves(encoders[e]->state, p.states);
        encoders[e]->next = p.next;
    }
}

template <Dtype D>
KVCAST_AVX2 void encode_floats_as(std::span<RansEncoder* const> encoders,
                                  std::span<const EncodeFloatStrip> strips, std::size_t count) {
    encode_each(
        encoders, strips, [=](const EncodeFloatStrip&) { return count; },
        [](Putter& p, const EncodeFloatStrip& s, std::size_t end)
            KVCAST_AVX2_LAMBDA { return encode_float_group<D>(p, s, end); });
}

}  // namespace

void decode_strips(std::span<RansDecoder* const> decoders, std::span<const Strip> strips,
                   std::span<Outgoing> outgoing) {
    const std::size_t stride = decoders.size(), steps = strips_each(strips.size(), stride);
    for_groups<kMostAbreast>(stride, [&](auto n, std::size_t d) {
        decode_strips_abreast<n.value>(decoders.data() + d, strips.data() + d, steps, stride, outgoing);
    });
}

KVCAST_AVX2 void encode_strips(std::span<RansEncoder* const> encoders, std::span<const EncodeStrip> strips) {
    encode_each(
        encoders, strips, [](const EncodeStrip& s) { return s.count; },
        [](Putter& p, const EncodeStrip& s, std::size_t end)
            KVCAST_AVX2_LAMBDA { return encode_group(p, s, end); });
}

void decode_floats(std::span<RansDecoder* const> decoders, std::span<const FloatStrip> strips, Dtype dtype,
                   std::size_t count, std::span<Outgoing> outgoing) {
    with_dtype(dtype, [&](auto d) { decode_floats_as<d.value>(decoders, strips, count, outgoing); });
}

void encode_floats(std::span<RansEncoder* const> encoders, std::span<const EncodeFloatStrip> strips,
                   Dtype dtype, std::size_t count) {
    with_dtype(dtype, [&](auto d) { encode_floats_as<d.value>(encoders, strips, count); });
}

KVCAST_AVX2 bool value_costs(const std::int16_t* values, const std::uint16_t* places, std::size_t count,
                             const std::int32_t* costs, std::int32_t* sums) {
    __m256i low = load256(sums), high = load256(sums + 8);
    bool all = true;
    for (std::size_t i = 0; i < count; ++i) {
        if (values[i] == 0) continue;
        if (values[i] < -kValueCostMost || values[i] > kValueCostMost) {
            all = false;
            continue;
        }
        const std::int32_t* row = costs + values[i] * kValueCostStride + places[i];
        low = _mm256_add_epi32(low, load256(row));
        high = _mm256_add_epi32(high, load256(row + 8));
    }
    store256(sums, low);
    store256(sums + 8, high);
    return all;
}

namespace {

// How often exponents occur, with zeros beyond those that there are.
struct ExponentCounts {
    static constexpr std::size_t kSide = kSymbols;

    std::uint32_t at[kSide + 256 + kSide] = {};
    std::uint32_t mode = 0;  // the most frequent one, the lowest of several
};

template <Dtype D>
KVCAST_AVX2_INLINE __m256i exponents_of(const std::uint16_t* e) {
    const __m256i range = _mm256_set1_epi16(static_cast<short>(exponent_mask(D)));
    return _mm256_packus_epi16(_mm256_and_si256(_mm256_srli_epi16(load256(e), mantissa_bits(D)), range),
                               _mm256_and_si256(_mm256_srli_epi16(load256(e + 16), mantissa_bits(D)), range));
}

template <Dtype D>
KVCAST_AVX2_INLINE __m256i exponents_of(const std::uint32_t* e) {
    const __m256i range = _mm256_set1_epi32(static_cast<int>(exponent_mask(D)));
    __m256i v[kVectors];
    KVCAST_UNROLL
    for (std::size_t i = 0; i < kVectors; ++i)
        v[i] = _mm256_and_si256(_mm256_srli_epi32(load256(e + 8 * i), mantissa_bits(D)), range);
    return _mm256_packus_epi16(_mm256_packus_epi32(v[0], v[1]), _mm256_packus_epi32(v[2], v[3]));
}

KVCAST_AVX2_INLINE std::uint8_t largest_byte(__m256i v) {
    alignas(32) std::uint8_t bytes[32];
    store256(bytes, v);
    return *std::max_element(bytes, bytes + 32);
}

// Adds how often the exponents from `e` on, four of them but none behind `last`, occur in `steps` times 32
// bytes, at most 1024.
KVCAST_AVX2_INLINE void add_counts(const std::uint8_t* exponents, std::size_t steps, std::uint32_t e,
                                   std::uint32_t last, std::uint32_t* counts) {
    __m256i wanted[4], n[4];
    KVCAST_UNROLL
    for (std::uint32_t k = 0; k < 4; ++k) {
        wanted[k] = _mm256_set1_epi8(static_cast<char>(e + k));
        n[k] = _mm256_setzero_si256();
    }
    for (std::size_t i = 0; i < steps; ++i) {
        const __m256i some = load256(exponents + 32 * i);
        KVCAST_UNROLL
        for (std::size_t k = 0; k < 4; ++k) n[k] = _mm256_sub_epi8(n[k], _mm256_cmpeq_epi8(some, wanted[k]));
    }
    // Sums of 16 bits, one in each quarter of all quadwords.
    KVCAST_UNROLL
    for (std::size_t k = 0; k < 4; ++k) n[k] = _mm256_sad_epu8(n[k], _mm256_setzero_si256());
    const __m256i sums =
        _mm256_or_si256(_mm256_or_si256(n[0], _mm256_slli_epi64(n[1], 16)),
                        _mm256_or_si256(_mm256_slli_epi64(n[2], 32), _mm256_slli_epi64(n[3], 48)));
    const __m128i two = _mm_add_epi16(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    const __m128i found = _mm_cvtepu16_epi32(_mm_add_epi16(two, _mm_unpackhi_epi64(two, two)));
    const __m128i there =
        _mm_cmpgt_epi32(_mm_set1_epi32(static_cast<int>(last - e + 1)), _mm_setr_epi32(0, 1, 2, 3));
    auto* const at = reinterpret_cast<__m128i*>(counts);
    _mm_storeu_si128(at, _mm_add_epi32(_mm_loadu_si128(at), _mm_and_si128(found, there)));
}

// Exponents as bytes, in any order, then one comparison for each that may occur. Few do: the elements are of
// one channel.
template <Dtype D>
KVCAST_AVX2 ExponentCounts count_exponents(const void* from, std::size_t count) {
    constexpr std::size_t kStep = 32, kMostSteps = 32;
    ExponentCounts counts;
    std::uint32_t* of = counts.at + ExponentCounts::kSide;
    std::uint32_t least = exponent_mask(D), most = 0;
    const auto* elements = static_cast<const ElementOf<D>*>(from);
    for (std::size_t begin = 0; begin < count;) {
        alignas(32) std::uint8_t exponents[kStep * kMostSteps];
        __m256i high = _mm256_setzero_si256(), low = high;  // low: complements
        std::size_t steps = 0;
        for (; steps < kMostSteps && begin + kStep <= count; ++steps, begin += kStep) {
            const __m256i e = exponents_of<D>(elements + begin);
            high = _mm256_max_epu8(high, e);
            low = _mm256_max_epu8(low, _mm256_xor_si256(e, _mm256_set1_epi8(-1)));
            store256(exponents + kStep * steps, e);
        }
        if (steps == 0) {
            for (; begin < count; ++begin) {
                ElementOf<D> bits;
                std::memcpy(&bits, elements + begin, sizeof bits);
                const std::uint32_t e = bits >> mantissa_bits(D) & exponent_mask(D);
                ++of[e];
                least = std::min(least, e);
                most = std::max(most, e);
            }
            break;
        }
        const std::uint32_t first = 255u - largest_byte(low), last = largest_byte(high);
        least = std::min(least, first);
        most = std::max(most, last);
        for (std::uint32_t e = first; e <= last; e += 4) add_counts(exponents, steps, e, last, of + e);
    }
    if (count != 0)
        counts.mode = static_cast<std::uint32_t>(std::max_element(of + least, of + most + 1) - of);
    return counts;
}

// The least cost of 16 tables with its table behind: sums are below 2^27.
KVCAST_AVX2_INLINE std::uint32_t least_cost(const std::int16_t (&of_symbols)[kSymbols],
                                            const ExponentCosts& costs) {
    const __m256i all = load256(of_symbols);
    __m256i low = _mm256_setzero_si256(), high = low;
    KVCAST_UNROLL
    for (int pair = 0; pair < static_cast<int>(kSymbols / 2); ++pair) {
        const __m256i both = _mm256_permutevar8x32_epi32(all, _mm256_set1_epi32(pair));
        low = _mm256_add_epi32(low, _mm256_madd_epi16(load256(costs[pair]), both));
        high = _mm256_add_epi32(high, _mm256_madd_epi16(load256(costs[pair] + 8), both));
    }
    const __m256i tables = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    low = _mm256_or_si256(_mm256_slli_epi32(low, 4), tables);
    high = _mm256_or_si256(_mm256_slli_epi32(high, 4), _mm256_add_epi32(tables, _mm256_set1_epi32(8)));
    const __m256i eight = _mm256_min_epu32(low, high);
    __m128i four = _mm_min_epu32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    four = _mm_min_epu32(four, _mm_shuffle_epi32(four, _MM_SHUFFLE(1, 0, 3, 2)));
    four = _mm_min_epu32(four, _mm_shuffle_epi32(four, _MM_SHUFFLE(2, 3, 0, 1)));
    return static_cast<std::uint32_t>(_mm_cvtsi128_si32(four));
}

KVCAST_AVX2 std::uint32_t choose_for_row(const void* elements, std::size_t count, Dtype dtype,
                                         const ExponentCosts& costs) {
    const auto count_as = dtype == Dtype::kBf16  ? count_exponents<Dtype::kBf16>
                          : dtype == Dtype::kF16 ? count_exponents<Dtype::kF16>
                                                 : count_exponents<Dtype::kF32>;
    const ExponentCounts counts = count_as(elements, count);
    std::uint32_t best = 0, least = ~0u;
    const std::uint32_t first = std::max(counts.mode, 1u) - 1;
    for (std::uint32_t center = first; center <= std::min(counts.mode + 1, exponent_mask(dtype)); ++center) {
        alignas(32) std::int16_t of_symbols[kSymbols];
        const std::uint32_t* highest = counts.at + ExponentCounts::kSide + center + kSymbolZero;
        for (std::size_t s = 0; s < kEscape; ++s) of_symbols[s] = static_cast<std::int16_t>(*(highest - s));
        of_symbols[kEscape] = static_cast<std::int16_t>(count);
        const std::uint32_t key = least_cost(of_symbols, costs);
        if (center != first && key / kSymbols >= least / kSymbols) continue;
        least = key;
        best = center * kSymbols + key % kSymbols;
    }
    return best;
}

}  // namespace

void choose_exponents(const ElementRows& rows, const ExponentCosts& costs, std::uint32_t* chosen) {
    if (rows.count > 32767) return scalar::choose_exponents(rows, costs, chosen);
    for (std::size_t i = 0; i < rows.rows; ++i)
        chosen[i] = choose_for_row(rows.row(i), rows.count, rows.dtype, costs);
}

KVCAST_AVX2 void send(Outgoing& rows) {
    Sender sender({&rows, 1});
    while (sender.any()) send_lines(sender, 1);
    sender.finish();
    _mm_sfence();
}

}  // namespace kvcast::kernels::avx2
