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
    std::size_t shifts = 0;  // std::uint8_t [outputs]
};

inline MatrixImage append_matrix(std::vector<std::byte>& image, const ShiftedMatrix& m) {
    const kernels::cuda::LimbMatrix limbs = kernels::cuda::to_limbs(m.entries, m.outputs, m.inputs);
    return {append<std::uint8_t>(image, limbs.bytes), limbs.limbs, append<std::uint8_t>(image, m.shifts)};
}

}  // namespace kvcast::device
