// Elements of a type that is known at run time, as bits in the low end of 32; and what all backends do with
// the floats of a head.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels/ops.h"

namespace kvcast::kernels::scalar {

inline std::uint32_t element_at(const void* elements, Dtype dtype, std::size_t i) {
    if (dtype == Dtype::kF32) {
        std::uint32_t bits;
        std::memcpy(&bits, static_cast<const std::uint8_t*>(elements) + 4 * i, 4);
        return bits;
    }
    std::uint16_t bits;
    std::memcpy(&bits, static_cast<const std::uint8_t*>(elements) + 2 * i, 2);
    return bits;
}

inline void put_element(void* elements, Dtype dtype, std::size_t i, std::uint32_t bits) {
    if (dtype == Dtype::kF32) {
        std::memcpy(static_cast<std::uint8_t*>(elements) + 4 * i, &bits, 4);
        return;
    }
    const auto half = static_cast<std::uint16_t>(bits);
    std::memcpy(static_cast<std::uint8_t*>(elements) + 2 * i, &half, 2);
}

// What a value of a strip becomes.
inline std::int16_t meant(const Strip& strip, std::int16_t value) {
    if (strip.meaning == nullptr) return value;
    const Meaning& m = *strip.meaning;
    const std::int16_t state = state_of(strip.mean, value, m.shift);
    if (!m.dtype) return state;
    return static_cast<std::int16_t>(to_bits(*m.dtype, value_of(state, m.scale)));
}

// Turns the pairs of a tile: unrotate(a, b, cos, sin, tokens) does one of them.
template <typename Unrotate>
void turn_back(const HeadLoad& h, const Unrotate& unrotate) {
    const Rotation& r = h.rotation;
    for (std::size_t p = 0; p < r.pairs; ++p) {
        float* a = h.tile + (r.first + p * r.pair_step) * h.tile_stride;
        unrotate(a, a + r.partner * h.tile_stride, r.cos + p * r.table_stride, r.sin + p * r.table_stride,
                 h.tokens);
    }
}

// The magnitude of the largest bits, without sign, of some floats.
inline float magnitude_of(std::uint32_t bits) {
    return bits >= 0x7f800000u ? std::numeric_limits<float>::infinity() : std::bit_cast<float>(bits);
}

}  // namespace kvcast::kernels::scalar
