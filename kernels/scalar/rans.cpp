#include <algorithm>
#include <cstring>
#include <limits>

#include "kernels/scalar/elements.h"
#include "kernels/scalar/slots.h"

namespace kvcast::kernels::scalar {
namespace {

std::uint32_t load_word(const std::uint8_t* p) {
    std::uint16_t w;
    std::memcpy(&w, p, 2);
    return w;
}

void store_word(std::uint8_t* p, std::uint32_t word) {
    const auto w = static_cast<std::uint16_t>(word);
    std::memcpy(p, &w, 2);
}

std::uint32_t take_word(RansDecoder& d) {
    if (d.end - d.next < 2) {
        d.overrun = 1;
        return 0;
    }
    const std::uint32_t w = load_word(d.next);
    d.next += 2;
    return w;
}

void put_word(RansEncoder& e, std::uint32_t word) {
    e.next -= 2;
    store_word(e.next, word);
}

// Takes one symbol out of each of the first `lanes` states.
void step(RansDecoder& d, const AliasTable& table, unsigned lanes, std::uint8_t* symbols) {
    for (unsigned i = 0; i < lanes; ++i) {
        const std::uint32_t slot = d.state[i] & kProbabilityMask;
        const std::uint32_t bucket = slot >> kBucketBits;
        const std::uint32_t second = (slot & (kBucketSlots - 1)) >= table.divider[bucket];
        const std::uint32_t entry = table.entry[2 * bucket + second];
        symbols[i] = static_cast<std::uint8_t>(entry_symbol(entry));
        d.state[i] = state_after(d.state[i], entry);
    }
}

// Refill in ascending lane order. Where 32 words are surely there, one select per lane and no branch.
void refill(RansDecoder& d, unsigned lanes) {
    if (d.end - d.next >= 2 * static_cast<std::ptrdiff_t>(kLanes)) {
        const std::uint8_t* next = d.next;
        for (unsigned i = 0; i < lanes; ++i) {
            const std::uint32_t x = d.state[i];
            const bool low = x < kStateLow;
            d.state[i] = low ? x << 16 | load_word(next) : x;
            next += low ? 2 : 0;
        }
        d.next = next;
        return;
    }
    for (unsigned i = 0; i < lanes; ++i) {
        if (d.state[i] < kStateLow) d.state[i] = d.state[i] << 16 | take_word(d);
    }
}

// Adds raw bit planes, lowest first: bit i of a plane belongs to lane i.
void take_raw(RansDecoder& d, unsigned planes, unsigned lanes, std::uint32_t* raw) {
    std::fill_n(raw, lanes, 0u);
    for (unsigned plane = 0; plane < planes; ++plane) {
        for (unsigned i = 0; i < lanes; i += 16) {
            const std::uint32_t word = take_word(d);
            const unsigned stop = std::min(lanes, i + 16);
            for (unsigned j = i; j < stop; ++j) raw[j] |= (word >> (j - i) & 1u) << plane;
        }
    }
}

void put_raw(RansEncoder& e, unsigned planes, unsigned lanes, const std::uint32_t* raw) {
    for (unsigned plane = planes; plane-- > 0;) {
        for (unsigned first = (lanes - 1) / 16 * 16 + 16; first > 0; first -= 16) {
            std::uint32_t word = 0;
            const unsigned begin = first - 16;
            const unsigned stop = std::min(lanes, first);
            for (unsigned j = begin; j < stop; ++j) word |= (raw[j] >> plane & 1u) << (j - begin);
            put_word(e, word);
        }
    }
}

// One group: fills `high` with the signed symbol values (escapes included) and `raw` with the low bits.
void decode_group(RansDecoder& d, const AliasTable& table, unsigned planes, unsigned lanes,
                  std::int32_t* high, std::uint32_t* raw) {
    std::uint8_t symbols[kLanes];
    step(d, table, lanes, symbols);
    refill(d, lanes);
    if (planes != 0) take_raw(d, planes, lanes, raw);
    unsigned escapes = 0;
    for (unsigned i = 0; i < lanes; ++i) {
        high[i] = static_cast<std::int32_t>(symbols[i]) - kSymbolZero;
        escapes += symbols[i] == kEscape;
    }
    if (escapes == 0) return;
    for (unsigned i = 0; i < lanes; ++i) {
        if (symbols[i] == kEscape) high[i] = static_cast<std::int16_t>(take_word(d));
    }
}

std::uint32_t symbol_of(std::int32_t high) {
    const bool inside = high >= -kSymbolZero && high <= kSymbolZero;
    return inside ? static_cast<std::uint32_t>(high + kSymbolZero) : kEscape;
}

// decode_group backwards: what is read last is written first.
void encode_group(RansEncoder& e, const EncodeTable& table, unsigned planes, unsigned lanes,
                  const std::int32_t* high, const std::uint32_t* raw) {
    for (unsigned i = lanes; i-- > 0;) {
        if (symbol_of(high[i]) == kEscape) put_word(e, static_cast<std::uint32_t>(high[i]) & 0xffffu);
    }
    if (planes != 0) put_raw(e, planes, lanes, raw);
    for (unsigned i = lanes; i-- > 0;) {
        const std::uint32_t symbol = symbol_of(high[i]);
        const std::uint32_t frequency = table.frequency[symbol];
        std::uint32_t x = e.state[i];
        if (x >= state_limit(frequency)) {
            put_word(e, x & 0xffffu);
            x >>= 16;
        }
        const std::uint32_t quotient = x / frequency;
        const std::uint32_t rank = x - quotient * frequency;
        e.state[i] = quotient << kProbabilityBits | table.slot[table.start[symbol] + rank];
    }
}

void decode_strip(RansDecoder& decoder, const Strip& strip) {
    if (strip.table == nullptr) {
        std::fill_n(strip.values, strip.count, meant(strip, 0));
        return;
    }
    std::int32_t high[kLanes];
    std::uint32_t raw[kLanes] = {};
    const unsigned shift = strip.shift;
    const std::int32_t half = shift == 0 ? 0 : 1 << (shift - 1);
    for (std::size_t at = 0; at < strip.count; at += kLanes) {
        const auto lanes = static_cast<unsigned>(std::min<std::size_t>(kLanes, strip.count - at));
        decode_group(decoder, strip.table->alias, shift, lanes, high, raw);
        for (unsigned i = 0; i < lanes; ++i) {
            const std::int32_t value = high[i] * (1 << shift) + static_cast<std::int32_t>(raw[i]) - half;
            strip.values[at + i] = meant(strip, static_cast<std::int16_t>(value));
        }
    }
}

void decode_float_strip(RansDecoder& decoder, const FloatStrip& strip, Dtype dtype, std::size_t count) {
    const unsigned mantissa = mantissa_bits(dtype);
    const std::uint32_t range = exponent_mask(dtype);
    const std::uint32_t mantissa_mask = (1u << mantissa) - 1;
    const unsigned sign_shift = dtype == Dtype::kF32 ? 31 : 15;
    std::int32_t high[kLanes];
    std::uint32_t raw[kLanes];
    for (std::size_t at = 0; at < count; at += kLanes) {
        const auto lanes = static_cast<unsigned>(std::min<std::size_t>(kLanes, count - at));
        decode_group(decoder, strip.table->alias, mantissa + 1, lanes, high, raw);
        for (unsigned i = 0; i < lanes; ++i) {
            const std::uint32_t exponent = (strip.center - static_cast<std::uint32_t>(high[i])) & range;
            put_element(strip.elements, dtype, at + i,
                        raw[i] >> mantissa << sign_shift | exponent << mantissa | (raw[i] & mantissa_mask));
        }
    }
}

void encode_strip(RansEncoder& encoder, const EncodeStrip& strip) {
    std::int32_t high[kLanes];
    std::uint32_t raw[kLanes];
    const unsigned shift = strip.shift;
    const std::int32_t half = shift == 0 ? 0 : 1 << (shift - 1);
    const auto mask = (1u << shift) - 1;
    for (std::size_t end = strip.count; end > 0;) {
        const std::size_t at = (end - 1) / kLanes * kLanes;
        const auto lanes = static_cast<unsigned>(end - at);
        for (unsigned i = 0; i < lanes; ++i) {
            const std::int32_t shifted = strip.values[at + i] + half;
            high[i] = shifted >> shift;
            raw[i] = static_cast<std::uint32_t>(shifted) & mask;
        }
        encode_group(encoder, *strip.table, shift, lanes, high, raw);
        end = at;
    }
}

void encode_float_strip(RansEncoder& encoder, const EncodeFloatStrip& strip, Dtype dtype, std::size_t count) {
    const unsigned mantissa = mantissa_bits(dtype);
    const std::uint32_t range = exponent_mask(dtype);
    const std::uint32_t mantissa_mask = (1u << mantissa) - 1;
    const unsigned sign_shift = dtype == Dtype::kF32 ? 31 : 15;
    std::int32_t high[kLanes];
    std::uint32_t raw[kLanes];
    for (std::size_t end = count; end > 0;) {
        const std::size_t at = (end - 1) / kLanes * kLanes;
        const auto lanes = static_cast<unsigned>(end - at);
        for (unsigned i = 0; i < lanes; ++i) {
            const std::uint32_t b = element_at(strip.elements, dtype, at + i);
            high[i] =
                static_cast<std::int32_t>(strip.center) - static_cast<std::int32_t>(b >> mantissa & range);
            raw[i] = (b >> sign_shift & 1u) << mantissa | (b & mantissa_mask);
        }
        encode_group(encoder, *strip.table, mantissa + 1, lanes, high, raw);
        end = at;
    }
}

}  // namespace

void decode_strips(std::span<RansDecoder* const> decoders, std::span<const Strip> strips,
                   std::span<Outgoing> outgoing) {
    for (Outgoing& rows : outgoing) send(rows);
    for (std::size_t i = 0; i < strips.size(); ++i) decode_strip(*decoders[i % decoders.size()], strips[i]);
}

void decode_floats(std::span<RansDecoder* const> decoders, std::span<const FloatStrip> strips, Dtype dtype,
                   std::size_t count, std::span<Outgoing> outgoing) {
    for (Outgoing& rows : outgoing) send(rows);
    for (std::size_t i = 0; i < strips.size(); ++i)
        decode_float_strip(*decoders[i % decoders.size()], strips[i], dtype, count);
}

void encode_strips(std::span<RansEncoder* const> encoders, std::span<const EncodeStrip> strips) {
    for (std::size_t i = 0; i < strips.size(); ++i) encode_strip(*encoders[i % encoders.size()], strips[i]);
}

void encode_floats(std::span<RansEncoder* const> encoders, std::span<const EncodeFloatStrip> strips,
                   Dtype dtype, std::size_t count) {
    for (std::size_t i = 0; i < strips.size(); ++i)
        encode_float_strip(*encoders[i % encoders.size()], strips[i], dtype, count);
}

bool value_costs(const std::int16_t* values, const std::uint16_t* places, std::size_t count,
                 const std::int32_t* costs, std::int32_t* sums) {
    bool all = true;
    for (std::size_t i = 0; i < count; ++i) {
        const bool known = values[i] >= -kValueCostMost && values[i] <= kValueCostMost;
        all = all && known;
        const std::int32_t* row = costs + (known ? values[i] : 0) * kValueCostStride + places[i];
        for (std::size_t c = 0; c < kValueCosts; ++c) sums[c] += row[c];
    }
    return all;
}

namespace {

// Four histograms: neighbours often have the same exponent, and one counter would wait for itself.
std::uint32_t choose_for_row(const void* elements, std::size_t count, Dtype dtype,
                             const ExponentCosts& costs) {
    constexpr std::uint32_t kSide = kSymbols;  // zeros beyond the exponents that there are
    const unsigned mantissa = mantissa_bits(dtype);
    const std::uint32_t range = exponent_mask(dtype);
    std::uint32_t counts[4][kSide + 256 + kSide] = {};
    for (std::size_t i = 0; i < count; ++i)
        ++counts[i % 4][kSide + (element_at(elements, dtype, i) >> mantissa & range)];
    for (std::size_t e = kSide; e <= kSide + range; ++e)
        counts[0][e] += counts[1][e] + counts[2][e] + counts[3][e];
    const std::uint32_t* first = counts[0] + kSide;
    const auto mode = static_cast<std::uint32_t>(std::max_element(first, first + range + 1) - first);
    std::uint32_t best = 0;
    std::int64_t least = std::numeric_limits<std::int64_t>::max();
    for (std::uint32_t center = std::max(mode, 1u) - 1; center <= std::min(mode + 1, range); ++center) {
        std::int64_t of_symbol[kSymbols] = {};
        for (std::uint32_t s = 0; s < kEscape; ++s)
            of_symbol[s] = counts[0][kSide + center + kSymbolZero - s];
        of_symbol[kEscape] = static_cast<std::int64_t>(count);
        for (std::uint32_t t = 0; t < kSymbols; ++t) {
            std::int64_t sum = 0;
            for (std::size_t s = 0; s < kSymbols; ++s) sum += of_symbol[s] * costs[s / 2][t][s % 2];
            if (sum >= least) continue;
            least = sum;
            best = center * kSymbols + t;
        }
    }
    return best;
}

}  // namespace

void choose_exponents(const ElementRows& rows, const ExponentCosts& costs, std::uint32_t* chosen) {
    for (std::size_t i = 0; i < rows.rows; ++i)
        chosen[i] = choose_for_row(rows.row(i), rows.count, rows.dtype, costs);
}

}  // namespace kvcast::kernels::scalar
