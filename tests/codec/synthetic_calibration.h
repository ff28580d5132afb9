// Small calibrations that obey every rule and mean nothing, the same on every platform.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "codec/klt/calibration.h"

namespace kvcast::test {

struct CalibrationShape {
    std::vector<std::size_t> parts;  // [plane]
    std::size_t features = 0;
    std::size_t wide = 0;  // features of shift 0; the others have 4
    std::uint64_t seed = 1;
};

// Three levels, the last in a set of its own, with transforms of 8 bits. Terms: two layers back, one layer
// back, K for V, tokens, as far as they exist.
CalibrationData make_calibration_data(const Layout& layout, const CalibrationShape& shape);

std::vector<std::uint8_t> calibration_bytes(const CalibrationData& data);
std::shared_ptr<const Calibration> make_calibration(const Layout& layout, const CalibrationShape& shape);

}  // namespace kvcast::test
