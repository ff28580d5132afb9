// What makers of plans share: arrays in an image that is copied to the device.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <vector>

namespace kvcast::device {

// Blocks of threads that one launch may have.
inline constexpr std::uint64_t kMostTiles = std::numeric_limits<std::int32_t>::max();

constexpr std::uint32_t u32(std::size_t n) {
    return static_cast<std::uint32_t>(n);
}

constexpr std::size_t round_up(std::size_t n, std::size_t unit) {
    return (n + unit - 1) / unit * unit;
}

// Appends an array, aligned for anything that is in it; its offset.
template <typename T>
std::size_t append(std::vector<std::byte>& image, std::span<const T> items) {
    const std::size_t offset = round_up(image.size(), std::max<std::size_t>(alignof(T), 16));
    image.resize(offset + items.size_bytes());
    if (!items.empty()) std::memcpy(image.data() + offset, items.data(), items.size_bytes());
    return offset;
}

}  // namespace kvcast::device
