// From residuals to coefficients: the inverse transforms of a calibration's units, for encoders. The
// encoder's own affair; in integers, so that all backends find the same coefficients and use the same matrix
// products (kernels::Projection) as prediction and reconstruction do.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "codec/klt/calibration.h"

namespace kvcast {

// Immutable; threads may share it.
class KltAnalysis {
  public:
    // kBadArgument where a transform has no inverse, or one beyond all measure. Takes a while: inverts all.
    static Result<std::shared_ptr<const KltAnalysis>> make(std::shared_ptr<const Calibration> calibration);

    const Calibration& calibration() const { return *calibration_; }

    // [coefficient][channel] of a unit, by its index in calibration().data().units: products with state units
    // are coefficients at multiplier 1 in units of fraction().
    const ShiftedMatrix& matrix(std::size_t unit) const { return units_[unit].matrix; }

    // A power of two, between 2^-80 and 2^80.
    float fraction(std::size_t unit) const { return units_[unit].fraction; }

    // sums[t * outputs + j] becomes coefficient j, of the first `outputs` ones, of integers residual
    // [token][width], which are at most 2^15 in magnitude.
    void multiply(const kernels::Ops& ops, std::size_t unit, const std::int16_t* residual, std::size_t tokens,
                  std::size_t outputs, std::int32_t* sums) const;

  private:
    struct Unit {
        ShiftedMatrix matrix;
        float fraction = 1;
        kernels::PackedMatrix packed;
    };

    std::shared_ptr<const Calibration> calibration_;
    std::vector<Unit> units_;
};

}  // namespace kvcast
