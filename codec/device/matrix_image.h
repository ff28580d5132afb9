// A matrix in an image of the device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "codec/device/image.h"
#include "codec/klt/calibration.h"
#include "kernels/cuda/limbs.h"

namespace kvcast::device {

// Offsets of its arrays.
struct MatrixImage {
    std::size_t entries = 0;  // kernels::cuda::LimbMatrix
    std::uint32_t limbs = 1;
    std::uint32_t slots = 0;
    std::size_t shifts = 0;  // std::uint8_t [outputs], and more as the tiles of entries
};

// What there is once for each output goes on to the end of the tiles.
template <typename T>
std::size_t append_by_output(std::vector<std::byte>& image, std::vector<T> values) {
    values.resize(kernels::cuda::limb_tiles(u32(values.size())) * kernels::cuda::kOutputTile);
    return append<T>(image, values);
}

inline MatrixImage append_matrix(std::vector<std::byte>& image, const ShiftedMatrix& m) {
    const kernels::cuda::LimbMatrix limbs = kernels::cuda::to_limbs(m.entries, m.outputs, m.inputs);
    return {append<std::uint8_t>(image, limbs.bytes), limbs.limbs, limbs.slots,
            append_by_output(image, m.shifts)};
}

}  // namespace kvcast::device
