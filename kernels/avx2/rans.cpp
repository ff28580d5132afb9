// Decoding, 32 states of 32 bits are two vectors of 16-bit halves twice, high and low: see the AVX-512
// backend. What is looked up are bytes, of all 32 lanes at once. Refill spreads the next words over the lanes
// that are low by a table of shuffles. Encoding, the states are four vectors.
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
using x86::Words;

constexpr std::size_t kMostAbreast = 2;  // decoders

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

// For each set of 8 lanes: spread[m] shuffles the next words to the lanes of m, in order, and zeros
// elsewhere; gathered[m] permutes the lanes of m, in order, to the upper end.
struct Permutations {
    std::uint8_t spread[256][16];
    std::uint8_t gathered[256][8];
};

constexpr Permutations permutations() {
    Permutations p = {};
    for (unsigned m = 0; m < 256; ++m) {
        unsigned below = 0, at = 8 - static_cast<unsigned>(std::popcount(m));
        for (unsigned i = 0; i < 8; ++i) {
            const bool there = (m >> i & 1u) != 0;
            for (unsigned byte = 0; byte < 2; ++byte)
                p.spread[m][2 * i + byte] = static_cast<std::uint8_t>(there ? 2 * below + byte : 0x80);
            if (!there) continue;
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
    const auto* spread = kPermutations.spread;
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

// One bit per lane of 16 bits that is all ones.
KVCAST_AVX2_INLINE std::uint32_t lane_mask(const Half& v) {
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(v.low, v.high), 0xd8);
    return static_cast<std::uint32_t>(_mm256_movemask_epi8(bytes));
}

KVCAST_AVX2_INLINE std::uint32_t escapes_of(const Half& symbols) {
    const __m256i escape = _mm256_set1_epi16(kEscape);
    return lane_mask({_mm256_cmpeq_epi16(symbols.low, escape), _mm256_cmpeq_epi16(symbols.high, escape)});
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

struct Coding {
    Sixteen frequency;
    Sixteen reciprocal;
    Sixteen start;
    const EncodeTable* table;
};

KVCAST_AVX2_INLINE Coding load_coding(const EncodeTable& t) {
    const auto* start = reinterpret_cast<const __m128i*>(t.start);
    return {sixteen(t.frequency),
            sixteen(t.reciprocal),
            {_mm256_cvtepu16_epi32(_mm_load_si128(start)), _mm256_cvtepu16_epi32(_mm_load_si128(start + 1))},
            &t};
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
    // A gather reads a word more than the slot.
    const __m256i index = _mm256_and_si256(_mm256_add_epi32(rank, looked_up(c.start, symbols)),
                                           _mm256_set1_epi32(kProbabilityMask));
    const __m256i slot =
        _mm256_and_si256(_mm256_i32gather_epi32(reinterpret_cast<const int*>(c.table->slot), index, 2),
                         _mm256_set1_epi32(0xffff));
    const __m256i after = _mm256_or_si256(_mm256_slli_epi32(quotient, kProbabilityBits), slot);
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

// The lowest planes of 16-bit raw parts.
KVCAST_AVX2_INLINE void put_raw(const Half& raw, unsigned planes, std::uint32_t lanes, std::uint8_t*& next) {
    if (planes == 0) return;
    const __m256i low_bytes = _mm256_set1_epi16(0xff);
    alignas(32) std::uint32_t plane[16];
    const auto put = [&](std::size_t at, __m256i a, __m256i b) KVCAST_AVX2_LAMBDA {
        const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(a, b), 0xd8);
        store256(plane + at, planes_of_lanes(bytes));
    };
    put(0, _mm256_and_si256(raw.low, low_bytes), _mm256_and_si256(raw.high, low_bytes));
    if (planes > 8) put(8, _mm256_srli_epi16(raw.low, 8), _mm256_srli_epi16(raw.high, 8));
    for (unsigned p = planes; p-- > 0;) {
        const std::uint32_t bits = plane[p] & lanes;
        if (lanes > 0xffff) put_word(next, bits >> 16);
        put_word(next, bits);
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
KVCAST_AVX2 void encode_float_strip(RansEncoder& encoder, const EncodeFloatStrip& strip, std::size_t count) {
    constexpr unsigned planes = mantissa_bits(D) + 1;
    States s = load_states(encoder.state);
    const Coding c = load_coding(*strip.table);
    std::uint8_t* next = encoder.next;
    for (std::size_t end = count; end > 0;) {
        const Group<ElementOf<D>> g(static_cast<const ElementOf<D>*>(strip.elements), end);
        const Parts parts = parts_of<D>(g.values, strip.center);
        const Symbols symbols = symbols_of(parts.high);
        if ((symbols.escapes & g.lanes) != 0) [[unlikely]]
            put_escapes(parts.high, symbols.escapes & g.lanes, next);
        if constexpr (planes > 16) put_raw(parts.upper, planes - 16, g.lanes, next);
        put_raw(parts.low, std::min(planes, 16u), g.lanes, next);
        put_group(s, symbols.symbols, c, g.lanes, next);
        end = g.at;
    }
    store_states(encoder.state, s);
    encoder.next = next;
}

}  // namespace

void decode_strips(std::span<RansDecoder* const> decoders, std::span<const Strip> strips,
                   std::span<Outgoing> outgoing) {
    const std::size_t stride = decoders.size(), steps = strips_each(strips.size(), stride);
    for_groups<kMostAbreast>(stride, [&](auto n, std::size_t d) {
        decode_strips_abreast<n.value>(decoders.data() + d, strips.data() + d, steps, stride, outgoing);
    });
}

void encode_strips(std::span<RansEncoder* const> encoders, std::span<const EncodeStrip> strips) {
    for (std::size_t i = 0; i < strips.size(); ++i) encode_one(*encoders[i % encoders.size()], strips[i]);
}

void decode_floats(std::span<RansDecoder* const> decoders, std::span<const FloatStrip> strips, Dtype dtype,
                   std::size_t count, std::span<Outgoing> outgoing) {
    switch (dtype) {
        case Dtype::kBf16:
            return decode_floats_as<Dtype::kBf16>(decoders, strips, count, outgoing);
        case Dtype::kF16:
            return decode_floats_as<Dtype::kF16>(decoders, strips, count, outgoing);
        default:
            return decode_floats_as<Dtype::kF32>(decoders, strips, count, outgoing);
    }
}

void encode_floats(std::span<RansEncoder* const> encoders, std::span<const EncodeFloatStrip> strips,
                   Dtype dtype, std::size_t count) {
    const auto encode = dtype == Dtype::kBf16  ? encode_float_strip<Dtype::kBf16>
                        : dtype == Dtype::kF16 ? encode_float_strip<Dtype::kF16>
                                               : encode_float_strip<Dtype::kF32>;
    for (std::size_t i = 0; i < strips.size(); ++i) encode(*encoders[i % encoders.size()], strips[i], count);
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
        for (std::uint32_t e = first; e <= last; ++e) {
            const __m256i wanted = _mm256_set1_epi8(static_cast<char>(e));
            __m256i n = _mm256_setzero_si256();
            for (std::size_t i = 0; i < steps; ++i)
                n = _mm256_sub_epi8(n, _mm256_cmpeq_epi8(load256(exponents + kStep * i), wanted));
            alignas(32) std::uint64_t sums[4];
            store256(sums, _mm256_sad_epu8(n, _mm256_setzero_si256()));
            of[e] += static_cast<std::uint32_t>(sums[0] + sums[1] + sums[2] + sums[3]);
        }
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
