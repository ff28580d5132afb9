// The arithmetic that every backend must agree on, once, for host and device.
//
// Everything here is exact integer arithmetic or IEEE-754 arithmetic whose result does not depend on
// contraction (products that are exact, one rounding). codec/FORMAT.md states the same in prose: sections 5
// (rANS), 6 (RoPE) and 7 (reconstruction). No function fails; every input is defined.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define KVCAST_HD __host__ __device__
#else
#define KVCAST_HD
#endif

namespace kvcast::kernels {

// ---- rANS: 32 lanes, u32 states, 16-bit words (Duda, arXiv 1311.2540; interleaving: Giesen, arXiv
// 1402.3392) ----

inline constexpr unsigned kLanes = 32;
inline constexpr unsigned kProbabilityBits = 14;
inline constexpr std::uint32_t kProbabilityTotal = 1u << kProbabilityBits;
inline constexpr std::uint32_t kProbabilityMask = kProbabilityTotal - 1;
inline constexpr std::uint32_t kStateLow = 1u << 16;  // a state is in [kStateLow, 2^32)
inline constexpr unsigned kSymbols = 16;
inline constexpr unsigned kEscape = 15;
inline constexpr int kSymbolZero = 7;  // symbol s stands for the value s - 7
inline constexpr unsigned kBucketBits = kProbabilityBits - 4;
inline constexpr std::uint32_t kBucketSlots = 1u << kBucketBits;

// One entry of an alias table: symbol, what to add to a slot to get its rank among the symbol's slots, and
// frequency, from the highest bits down.
KVCAST_HD constexpr std::uint32_t pack_entry(std::uint32_t symbol, std::uint32_t frequency,
                                             std::uint32_t adjust) {
    return symbol << 28 | (adjust & kProbabilityMask) << kProbabilityBits | frequency;
}
KVCAST_HD constexpr std::uint32_t entry_symbol(std::uint32_t entry) {
    return entry >> 28;
}
KVCAST_HD constexpr std::uint32_t entry_frequency(std::uint32_t entry) {
    return entry & kProbabilityMask;
}
KVCAST_HD constexpr std::uint32_t entry_adjust(std::uint32_t entry) {
    return entry >> kProbabilityBits & kProbabilityMask;
}

// The state after a symbol is taken out of it, before refill.
KVCAST_HD constexpr std::uint32_t state_after(std::uint32_t state, std::uint32_t entry) {
    return entry_frequency(entry) * (state >> kProbabilityBits) +
           ((state + entry_adjust(entry)) & kProbabilityMask);
}

// A state this large, or larger, gives a word away before a symbol of that frequency is put into it.
KVCAST_HD constexpr std::uint32_t state_limit(std::uint32_t frequency) {
    return frequency << (32 - kProbabilityBits);
}

// ---- spread classes: what a strip's class says (FORMAT.md, sections 5.3 and 11.2)

inline constexpr unsigned kClasses = 32;            // 0: every value is zero and nothing is coded
inline constexpr unsigned kFirstExponentTable = 9;  // of the format's tables; those before it are of classes

struct ClassCoding {
    unsigned table;
    unsigned shift;
};

// Table and raw bits of class 1..31.
KVCAST_HD constexpr ClassCoding class_coding(unsigned spread_class) {
    if (spread_class <= 9) return {spread_class - 1, 0};
    return {7 + (spread_class & 1u), (spread_class - 8) / 2};
}

// klt: the class of a strip of coefficients is the coefficient's class at gain 0, plus the strip's gain.
KVCAST_HD constexpr unsigned klt_class(std::int8_t base, std::int16_t gain) {
    const int sum = base + gain;
    return static_cast<unsigned>(sum < 0 ? 0 : sum > 31 ? 31 : sum);
}

// ---- RoPE in integers
// ------------------------------------------------------------------------------------------

inline constexpr unsigned kTrigBits = 14;  // cosines and sines are in units of 2^-14

struct SinCos {
    std::int16_t cos;
    std::int16_t sin;
};

// Taylor coefficients in Q30, by the power of an angle in eighths of a turn.
inline constexpr std::int32_t kSine1 = 843314857, kSine3 = -86699834, kSine5 = 2674041, kSine7 = -39273;
inline constexpr std::int32_t kCosine0 = 1 << 30, kCosine2 = -331168970, kCosine4 = 17023473,
                              kCosine6 = -350031, kCosine8 = 3856;

// Cosine and sine of a phase in units of 2^-64 turn: quarter-turn reduction, Taylor polynomials in Q30 over
// an eighth of a turn (truncation below 2^-17), one rounding to 2^-14.
KVCAST_HD constexpr SinCos sin_cos(std::uint64_t phase) {
    const auto turn = static_cast<std::uint32_t>(phase >> 32);
    const std::uint32_t quarter = (turn + (1u << 29)) >> 30;
    const std::int64_t v = std::int64_t{static_cast<std::int32_t>(turn - (quarter << 30))} * 2;
    const std::int64_t v2 = v * v >> 30;
    std::int64_t s = kSine5 + (kSine7 * v2 >> 30);
    s = kSine3 + (s * v2 >> 30);
    s = kSine1 + (s * v2 >> 30);
    s = s * v >> 30;
    std::int64_t c = kCosine6 + (kCosine8 * v2 >> 30);
    c = kCosine4 + (c * v2 >> 30);
    c = kCosine2 + (c * v2 >> 30);
    c = kCosine0 + (c * v2 >> 30);
    const auto sine = static_cast<std::int16_t>((s + (1 << 15)) >> 16);
    const auto cosine = static_cast<std::int16_t>((c + (1 << 15)) >> 16);
    switch (quarter & 3) {
        case 0:
            return {cosine, sine};
        case 1:
            return {static_cast<std::int16_t>(-sine), cosine};
        case 2:
            return {static_cast<std::int16_t>(-cosine), static_cast<std::int16_t>(-sine)};
        default:
            return {sine, static_cast<std::int16_t>(-cosine)};
    }
}

struct Rotated {
    std::int32_t a;
    std::int32_t b;
};

// One pair of int16 states turned by an angle, rounded half up; |result| <= 46342.
KVCAST_HD constexpr Rotated rotate(std::int32_t a, std::int32_t b, SinCos t) {
    constexpr std::int32_t half = 1 << (kTrigBits - 1);
    return {(a * t.cos - (b * t.sin - half)) >> kTrigBits, (a * t.sin + (b * t.cos + half)) >> kTrigBits};
}

// ---- states and values
// -----------------------------------------------------------------------------------------

KVCAST_HD constexpr std::int16_t saturate16(std::int32_t v) {
    return static_cast<std::int16_t>(v < -32768 ? -32768 : v > 32767 ? 32767 : v);
}

// delta: what the tokens of a channel are predicted from; means are in quarter steps.
inline constexpr unsigned kMeanFraction = 2;
inline constexpr std::int32_t kMeanLimit = 16000;
KVCAST_HD constexpr std::int16_t mean_state(std::int16_t mean, unsigned guard_bits) {
    return saturate16(mean * (1 << (guard_bits - kMeanFraction)));
}

// delta: the state of a quantised value.
KVCAST_HD constexpr std::int16_t state_of(std::int16_t prediction, std::int16_t q, unsigned shift) {
    return saturate16(prediction + q * (1 << shift));
}

// klt: a coefficient times its level's multiplier, as the transform takes it.
KVCAST_HD constexpr std::int16_t scaled_coefficient(std::int16_t q, unsigned multiplier) {
    return saturate16(std::int32_t{q} * static_cast<std::int32_t>(multiplier));
}

// klt: features have 8 bits, and count so many times in products.
inline constexpr unsigned kFeatureWeight = 256;

// klt: what other units are predicted from, the distance of a state from its unit's bias. Saturating that
// distance to 16 bits first, as vectors of them do, changes nothing. A factor counts in 2^-15.
inline constexpr std::int16_t kLeastFeatureFactor = 128;
KVCAST_HD constexpr std::int32_t rounded_distance(std::int16_t state, std::int16_t bias,
                                                  std::int16_t factor) {
    return ((state - bias) * factor + (1 << 14)) >> 15;
}
KVCAST_HD constexpr std::int16_t state_feature(std::int16_t state, std::int16_t bias, std::int16_t factor) {
    const std::int32_t rounded = rounded_distance(state, bias, factor);
    return static_cast<std::int16_t>(rounded < -128 ? -128 : rounded > 127 ? 127 : rounded);
}

// klt: one projection's contribution to a state.
KVCAST_HD constexpr std::int32_t shifted_sum(std::int32_t sum, unsigned shift) {
    return (sum + (1 << (shift - 1))) >> shift;
}

// The scale of a plane: a state s stands for s * mantissa * 2^exponent. With mantissa < 2^8, exponent in
// [kMinExponent, kMaxExponent] and |s| <= 46342 the value is exact in binary32, so that the only rounding of
// a decoder is the one to the output type.
inline constexpr int kMinExponent = -126;
inline constexpr int kMaxExponent = 103;

struct Scale {
    std::int32_t mantissa;
    std::int32_t exponent;

    friend bool operator==(const Scale&, const Scale&) = default;
};

KVCAST_HD constexpr float power_of_two(int exponent) {  // exponent in -126..127
    return std::bit_cast<float>(static_cast<std::uint32_t>(exponent + 127) << 23);
}
KVCAST_HD constexpr float value_of(std::int32_t state, Scale scale) {
    return static_cast<float>(state * scale.mantissa) * power_of_two(scale.exponent);
}
KVCAST_HD constexpr float unit_of(Scale scale) {
    return value_of(1, scale);
}

// Nearest integer, ties to even, for |x| < 2^22: the addition rounds at the unit.
KVCAST_HD constexpr float round_even(float x) {
    constexpr float shifter = 12582912.0f;  // 1.5 * 2^23
    return (x + shifter) - shifter;
}

// Block floating point: values whose magnitudes are at most `largest` share the exponent s, and are kept as
// the integers nearest to value * 2^s, the greatest of them between 2^13 and 2^14. Below 1 they have fewer
// bits. `largest` is not negative, and is below 2^63.
KVCAST_HD constexpr int shared_exponent(float largest) {
    const int exponent = static_cast<int>(std::bit_cast<std::uint32_t>(largest) >> 23) - 127;
    return 13 - (exponent < 0 ? 0 : exponent);
}

// ---- element types
// ---------------------------------------------------------------------------------------------

enum class Dtype : std::uint8_t { kBf16 = 0, kF16 = 1, kF32 = 2 };

KVCAST_HD constexpr std::size_t dtype_bytes(Dtype d) {
    return d == Dtype::kF32 ? 4 : 2;
}
KVCAST_HD constexpr unsigned mantissa_bits(Dtype d) {
    return d == Dtype::kBf16 ? 7 : d == Dtype::kF16 ? 10 : 23;
}
KVCAST_HD constexpr std::uint32_t exponent_mask(Dtype d) {
    return d == Dtype::kF16 ? 31 : 255;
}

// binary32 to bfloat16, nearest even; finite values beyond the range become the largest finite one; every NaN
// becomes 0x7fc0.
KVCAST_HD constexpr std::uint16_t to_bf16(float f) {
    const auto u = std::bit_cast<std::uint32_t>(f);
    const std::uint32_t magnitude = u & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7fc0;
    const auto sign = static_cast<std::uint16_t>(u >> 16 & 0x8000u);
    if (magnitude == 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7f80u);
    const std::uint32_t rounded = (magnitude + 0x7fffu + (magnitude >> 16 & 1u)) >> 16;
    return static_cast<std::uint16_t>(sign | (rounded >= 0x7f80u ? 0x7f7fu : rounded));
}

// binary32 to binary16 by the same rules (NaN becomes 0x7e00).
KVCAST_HD constexpr std::uint16_t to_f16(float f) {
    const auto u = std::bit_cast<std::uint32_t>(f);
    const std::uint32_t magnitude = u & 0x7fffffffu;
    const auto sign = static_cast<std::uint16_t>(u >> 16 & 0x8000u);
    if (magnitude > 0x7f800000u) return 0x7e00;
    if (magnitude == 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7c00u);
    if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7bffu);  // rounds beyond 65504
    if (magnitude < 0x33000000u) return sign;                                         // below half of 2^-24
    const std::uint32_t exponent = magnitude >> 23;
    const bool subnormal = exponent < 113;
    const std::uint32_t significand = (magnitude & 0x7fffffu) | 0x800000u;
    const std::uint32_t drop = subnormal ? 126 - exponent : 13;
    const std::uint32_t kept = significand >> drop;
    const std::uint32_t rest = significand & ((1u << drop) - 1);
    const std::uint32_t half = 1u << (drop - 1);
    const std::uint32_t up = rest > half || (rest == half && (kept & 1)) ? 1 : 0;
    const std::uint32_t base = subnormal ? 0 : (exponent - 113) << 10;
    return static_cast<std::uint16_t>(sign | (base + kept + up));
}

KVCAST_HD constexpr float from_bf16(std::uint16_t h) {
    return std::bit_cast<float>(std::uint32_t{h} << 16);
}

KVCAST_HD constexpr float from_f16(std::uint16_t h) {
    const std::uint32_t sign = std::uint32_t{h & 0x8000u} << 16;
    const std::uint32_t exponent = h >> 10 & 31u;
    const std::uint32_t fraction = h & 0x3ffu;
    if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | fraction << 13);
    if (exponent != 0) return std::bit_cast<float>(sign | (exponent + 112) << 23 | fraction << 13);
    const float magnitude = static_cast<float>(fraction) * power_of_two(-24);
    return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(magnitude));
}

// The stored bits of an element as a value, and back (see to_bf16 for rounding, range and NaN).
KVCAST_HD constexpr float from_bits(Dtype d, std::uint32_t bits) {
    switch (d) {
        case Dtype::kBf16:
            return from_bf16(static_cast<std::uint16_t>(bits));
        case Dtype::kF16:
            return from_f16(static_cast<std::uint16_t>(bits));
        default:
            return std::bit_cast<float>(bits);
    }
}
KVCAST_HD constexpr std::uint32_t to_bits(Dtype d, float f) {
    switch (d) {
        case Dtype::kBf16:
            return to_bf16(f);
        case Dtype::kF16:
            return to_f16(f);
        default:
            return f != f ? 0x7fc00000u : std::bit_cast<std::uint32_t>(f);
    }
}

// An exact element turned by an angle. Products of a binary32 and a 15-bit integer are exact in binary64, so
// that the sum is rounded once, the scaling is exact, and the conversion to binary32 rounds once more;
// contraction to a fused multiply-add changes nothing.
KVCAST_HD constexpr float rotate_exact(float x, std::int32_t cos, float y, std::int32_t sin) {
    const double sum = static_cast<double>(x) * cos + static_cast<double>(y) * sin;
    return static_cast<float>(sum * (1.0 / (1 << kTrigBits)));
}

}  // namespace kvcast::kernels
