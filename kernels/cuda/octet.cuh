// A lane's eight tokens of a channel: as they are coded, as states, and as the words that go to memory.
#pragma once

#include "kernels/cuda/compiler.cuh"
#include "kernels/cuda/head.cuh"
#include "kernels/cuda/pack.cuh"
#include "kernels/cuda/platform.cuh"
#include "kernels/cuda/warp_rans.cuh"

namespace kvcast::kernels::cuda {

inline constexpr std::uint32_t kLaneTokens = kBodyUnit / kLanes;

// Two to a word: token g is number 32 g + lane.
struct Octet {
    std::uint32_t words[kLaneTokens / 2];
};

// A lane's place of a channel: where body_index() has its tokens.
template <typename State>
__device__ __forceinline__ State* lane_place(State* channel) {
    return channel + lane_id() * kLaneTokens;
}

// To a lane's place, and from there by the same lane.
__device__ __forceinline__ void keep(std::int16_t* place, const Octet& octet) {
    *reinterpret_cast<uint4*>(place) = {octet.words[0], octet.words[1], octet.words[2], octet.words[3]};
}
__device__ __forceinline__ Octet kept(const std::int16_t* place) {
    const uint4 v = *reinterpret_cast<const uint4*>(place);
    return {{v.x, v.y, v.z, v.w}};
}

// Symbols and bit planes (WarpReader::CodedQuad) of both halves of an octet. Values of escapes lie where a
// lane keeps its octet.
struct OctetCodes {
    std::uint32_t symbols[2];
    std::uint32_t planes[2];
    bool escaped;  // some lane's value is an escape's; the same in all lanes
};

// Reads up to 256 tokens of a channel that is not zero and has at most kBytePlanes raw bits: put(half,
// CodedQuad), once or twice. Whether there are escapes. By all lanes together.
template <typename Put>
__device__ __forceinline__ bool read_codes(WarpReader& in, const StepCoding& c, std::uint32_t tokens,
                                           std::int16_t* place, Put put) {
    constexpr std::uint32_t quad = 4 * kLanes;
    std::uint32_t escaped = 0;
    KVCAST_UNROLL(1)
    for (std::uint32_t half = 0; half * quad < tokens; ++half) {
        std::int16_t* own = place + half * 4;
        put(half,
            in.coded_quad(
                c, tokens - half * quad,
                [&](unsigned g, std::int32_t value) { own[g] = static_cast<std::int16_t>(value); }, escaped));
    }
    return escaped != 0;
}

// The same of more than seven groups, the usual case: `last` tokens, 1 to 32, in the eighth. Raw: there are
// raw bits.
inline constexpr std::uint32_t kSevenGroups = kBodyUnit - kLanes;
template <bool Raw, typename Put>
__device__ __forceinline__ bool read_usual_codes(WarpReader& in, const StepCoding& c, std::uint32_t last,
                                                 std::int16_t* place, Put put) {
    std::uint32_t escaped = 0;
    KVCAST_UNROLL(2)
    for (std::uint32_t half = 0; half < 2; ++half) {
        std::int16_t* own = place + half * 4;
        put(half,
            in.coded_quad_but_last<Raw>(
                c, half == 0 ? kLanes : last,
                [&](unsigned g, std::int32_t value) { own[g] = static_cast<std::int16_t>(value); }, escaped));
    }
    return escaped != 0;
}

// A channel of more raw bits than that: states, at body_index() of the channel's place.
__device__ __forceinline__ void read_wide(WarpReader& in, const Channel& channel, std::uint32_t guard_bits,
                                          std::uint32_t tokens, std::int16_t* states) {
    in.strip(channel.reader(), tokens, [&](std::uint32_t t, std::int16_t q) {
        states[body_index(t)] = state_of(static_cast<std::int16_t>(channel.center()), q, guard_bits);
    });
}

// A channel of zeros: all its states are the mean.
__device__ __forceinline__ Octet constant(std::int32_t state) {
    const std::uint32_t both = halves(state, state);
    return {{both, both, both, both}};
}

// Makes values of codes. By all lanes together.
class OctetValues {
  public:
    // States, saturated, and `bias` added to each.
    __device__ __forceinline__ void states(const Channel& channel, std::uint32_t guard_bits,
                                           const OctetCodes& codes, const std::int16_t* place,
                                           std::int32_t bias, std::int32_t (&states)[kLaneTokens]) const {
        std::uint32_t symbols[2], raw[2] = {};
        KVCAST_UNROLL(2)
        for (unsigned i = 0; i < 2; ++i) symbols[i] = codes.symbols[i] >> 4 & 0x0f0f0f0fu;
        KVCAST_UNROLL(8)
        for (unsigned g = 0; g < kLaneTokens; ++g)
            states[g] = byte_of(symbols, g) * channel.step() + (channel.least() + bias);
        if (channel.planes() != 0) {
            KVCAST_UNROLL(2)
            for (unsigned i = 0; i < 2; ++i) raw[i] = transposed_(codes.planes[i]);
            KVCAST_UNROLL(8)
            for (unsigned g = 0; g < kLaneTokens; ++g) states[g] += byte_of(raw, g) << guard_bits;
        }
        if (channel.inside() && !codes.escaped) return;
        const ClassReader reader = channel.reader();
        KVCAST_UNROLL(8)
        for (unsigned g = 0; g < kLaneTokens; ++g) {
            std::int32_t v = states[g] - bias;
            if (byte_of(symbols, g) == kEscape) {
                v = WarpReader::value(reader, place[g], raw[g / 4] >> 8 * (g % 4) & 255u) *
                        (1 << guard_bits) +
                    channel.center();
            }
            states[g] = saturate16(v) + bias;
        }
    }

    // bf16 elements: WarpReader::element(), four at once, low bytes, then high ones.
    __device__ __forceinline__ Octet elements(std::int32_t center, const OctetCodes& codes,
                                              const std::int16_t* place) const {
        constexpr std::uint32_t top = 0x80808080u;
        const std::uint32_t from =
            __byte_perm(static_cast<std::uint32_t>(center + kSymbolZero), 0, 0x0000);  // of each byte
        Octet octet;
        KVCAST_UNROLL(2)
        for (unsigned i = 0; i < 2; ++i) {
            const std::uint32_t symbols = codes.symbols[i] >> 4 & 0x0f0f0f0fu;
            const std::uint32_t raw = transposed_(codes.planes[i]);
            std::uint32_t exponents = ((from | top) - symbols) ^ (~from & top);  // no byte borrows
            if (codes.escaped) {
                KVCAST_UNROLL(4)
                for (unsigned g = 0; g < 4; ++g) {
                    if ((symbols >> 8 * g & 15u) != kEscape) continue;
                    const auto exponent = static_cast<std::uint32_t>(center - place[4 * i + g]) & 255u;
                    exponents = (exponents & ~(255u << 8 * g)) | exponent << 8 * g;
                }
            }
            const std::uint32_t low = (exponents << 7 & top) | (raw & ~top);
            const std::uint32_t high = (exponents >> 1 & ~top) | (raw & top);
            octet.words[2 * i] = __byte_perm(low, high, 0x5140);
            octet.words[2 * i + 1] = __byte_perm(low, high, 0x7362);
        }
        return octet;
    }

  private:
    static __device__ __forceinline__ std::int32_t byte_of(const std::uint32_t (&words)[2], unsigned g) {
        return static_cast<std::int32_t>(__byte_perm(words[g / 4], 0, 0x4440 + g % 4));
    }

    BitTransposer transposed_;
};

// States without a bias, in words.
__device__ __forceinline__ Octet packed(const std::int32_t (&states)[kLaneTokens]) {
    Octet octet;
    KVCAST_UNROLL(4)
    for (unsigned i = 0; i < kLaneTokens / 2; ++i) octet.words[i] = halves(states[2 * i], states[2 * i + 1]);
    return octet;
}

}  // namespace kvcast::kernels::cuda
