// A calibration as the device reads it: matrices by inputs, so that neighbouring threads read neighbouring
// outputs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "codec/device/matrix_image.h"
#include "codec/klt/calibration.h"

namespace kvcast::device {

// Immutable; threads may share it. Copied to the device once, to an address that is a multiple of kAlignment,
// and used by any number of plans.
class CalibrationImage {
  public:
    explicit CalibrationImage(std::shared_ptr<const Calibration> calibration);

    const Calibration& calibration() const { return *calibration_; }
    std::span<const std::byte> bytes() const { return bytes_; }

    // Offsets of arrays in bytes().
    struct Unit {
        std::size_t channels = 0;  // kernels::cuda::channel_word [width], and more as in MatrixImage
        MatrixImage transform;
        std::vector<MatrixImage> terms;
        std::size_t classes = 0;
    };

    // By its index in calibration().data().units.
    const Unit& unit(std::size_t index) const { return units_[index]; }

    // std::int8_t [part][level][group] of the plane whose first unit this is.
    std::size_t classes(std::size_t index) const { return units_[index].classes; }

    // std::uint16_t [level].
    std::size_t multipliers() const { return multipliers_; }

  private:
    Unit make_unit(const CalibrationUnit& unit);
    void add_classes(const Calibration::Set& set, std::size_t layer, std::size_t plane);

    std::shared_ptr<const Calibration> calibration_;
    std::vector<std::byte> bytes_;
    std::vector<Unit> units_;
    std::size_t multipliers_ = 0;
};

}  // namespace kvcast::device
