// What encoders need beside a calibration, as the device reads it: the inverses of its transforms.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <vector>

#include "codec/device/matrix_image.h"
#include "codec/klt/klt_analysis.h"

namespace kvcast::device {

// Immutable; threads may share it. Copied to the device once, to an address that is a multiple of kAlignment,
// and used by any number of plans. 2 bytes per entry of the calibration's transforms.
class AnalysisImage {
  public:
    // As KltAnalysis::make().
    static Result<AnalysisImage> make(std::shared_ptr<const Calibration> calibration);

    const KltAnalysis& analysis() const { return *analysis_; }
    std::span<const std::byte> bytes() const { return bytes_; }

    // In bytes(), of a unit, by its index in the calibration: KltAnalysis::matrix().
    const MatrixImage& matrix(std::size_t unit) const { return matrices_[unit]; }

  private:
    AnalysisImage() = default;

    std::shared_ptr<const KltAnalysis> analysis_;
    std::vector<std::byte> bytes_;
    std::vector<MatrixImage> matrices_;  // [unit]
};

}  // namespace kvcast::device
