// Elements of a type that is known at run time, as bits in the low end of 32.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels/math.h"

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

// The magnitude of the largest bits, without sign, of some floats.
inline float magnitude_of(std::uint32_t bits) {
    return bits >= 0x7f800000u ? std::numeric_limits<float>::infinity() : std::bit_cast<float>(bits);
}

}  // namespace kvcast::kernels::scalar
