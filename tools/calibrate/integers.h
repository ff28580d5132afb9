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
    double unit_step = 1.0 / 32;  // step of multiplier 1, in the metric
    double headroom = 1.5;        // how far states reach beyond the largest value seen
    // Entries are within +-(2^(bits - 1) - 1); 2 to 15 bits.
    unsigned transform_bits = 8;
    unsigned term_bits = 8;  // of prediction matrices
};

// Token features as integers: rows of `features` have variance 1 per column; four standard deviations are at
// +-127. Column f is rounded to multiples of 2^shifts[f]; a shift is 0 to 7.
TokenTable token_table(const Matrix& features, std::span<const unsigned> shifts);
Matrix token_features(const TokenTable& table, std::span<const std::int32_t> token_ids);

// Everything but levels and classes: those are zero for one level of multiplier 1. `sets`: fits of all units.
CalibrationData to_integers(const Units& units, std::span<const std::vector<UnitFit>> sets,
                            const TokenTable& tokens, const std::string& model,
                            const IntegerOptions& options);

}  // namespace kvcast::calibrate
