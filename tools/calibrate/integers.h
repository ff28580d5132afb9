// From the floating-point model to the integers of a calibration file.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <vector>

#include "codec/klt/calibration.h"
#include "tools/calibrate/fit.h"

namespace kvcast::calibrate {

struct IntegerOptions {
    double unit_step = 1.0 / 32;   // step of multiplier 1, in the metric
    double headroom = 1.5;         // how far states reach beyond the largest value seen
    unsigned transform_bytes = 1;  // entries of transforms: int8 or int16
    unsigned term_bytes = 1;       // of prediction matrices
};

// Token features as integers: rows of `features` have variance 1 per column; the first `wide` columns become
// 8 bits (four standard deviations at +-127), the others 4 bits.
TokenTable token_table(const Matrix& features, std::size_t wide);
Matrix token_features(const TokenTable& table, std::span<const std::int32_t> token_ids);

// Everything but levels and classes: those are zero for one level of multiplier 1. `sets`: fits of all units.
CalibrationData to_integers(const Units& units, std::span<const std::vector<UnitFit>> sets,
                            const TokenTable& tokens, const std::string& model,
                            const IntegerOptions& options);

}  // namespace kvcast::calibrate
