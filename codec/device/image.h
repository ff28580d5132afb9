// What makers of plans share: arrays in an image that is copied to the device, places in the workspace, and
// tasks that both directions have.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <vector>

#include "codec/device/plane.h"
#include "codec/format/layout.h"
#include "kernels/cuda/tasks.h"

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

// The batch's workspace, handed out from its beginning.
class Workspace {
  public:
    // Offset of `bytes` bytes.
    std::uint64_t take(std::uint64_t bytes) {
        const std::uint64_t offset = bytes_;
        bytes_ += round_up(bytes, kAlignment);
        return offset;
    }
    std::uint64_t bytes() const { return bytes_; }

  private:
    std::uint64_t bytes_ = 0;
};

// What the neighbours of a table of cosines and sines have in common.
enum class AngleOrder : std::uint8_t { kByPair, kByPosition };

// Cosines and sines of `columns` positions from `first` on.
inline kernels::cuda::RotationTask rotation_task(const Rope& rope, std::uint64_t first, std::size_t columns,
                                                 std::vector<std::byte>& image, Workspace& workspace,
                                                 AngleOrder order = AngleOrder::kByPair) {
    const bool by_pair = order == AngleOrder::kByPair;
    return {.table =
                workspace.take((rope.pairs() * columns + kernels::cuda::kBodyUnit) * sizeof(kernels::SinCos)),
            .frequencies = append<std::uint64_t>(image, rope.frequencies),
            .first = first,
            .pairs = u32(rope.pairs()),
            .columns = u32(columns),
            .pair_stride = by_pair ? u32(columns) : 1,
            .column_stride = by_pair ? 1 : u32(rope.pairs()),
            .first_channel = u32(rope.offset),
            .pair_step = u32(rope.pair_step()),
            .partner = u32(rope.partner())};
}

}  // namespace kvcast::device
