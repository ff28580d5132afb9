// What encoders need beside a calibration, as the device reads it: the inverses of its transforms.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <vector>

#include "codec/klt/klt_encoder.h"

namespace kvcast::device {

// Immutable; threads may share it. Copied to the device once, to an address that is a multiple of kAlignment,
// and used by any number of plans. 4 bytes per entry of the calibration's transforms.
class AnalysisImage {
  public:
    // kBadArgument where a transform has no inverse. Takes a while: inverts them all.
    static Result<AnalysisImage> make(std::shared_ptr<const Calibration> calibration);

    const KltAnalysis& analysis() const { return *analysis_; }
    std::span<const std::byte> bytes() const { return bytes_; }

    // Offset in bytes() of float [channel][coefficient] of a unit, by its index in the calibration.
    std::size_t matrix(std::size_t unit) const { return offsets_[unit]; }

  private:
    AnalysisImage() = default;

    std::shared_ptr<const KltAnalysis> analysis_;
    std::vector<std::byte> bytes_;
    std::vector<std::size_t> offsets_;  // [unit]
};

}  // namespace kvcast::device
