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
    // What rounding a prediction matrix may add to the variance of each coefficient, in squared steps: finer
    // entries would cost bytes of the calibration and save none of the chunks'. What is rounded away follows
    // the signal, so that its errors add up over tokens: at 0.01 the KL divergence is a multiple.
    double rounding = 4e-5;
};

// Shifts for token_table(): the more a feature explains, the finer it is, so that one bit more of any feature
// would gain as much. Rounding one adds at most about `noise` to all coefficients of a token together.
std::vector<unsigned> feature_shifts(std::span<const double> importance, double noise);

// Token features as integers: rows of `features` have variance 1 per column; four standard deviations are at
// +-127. Column f is rounded to multiples of 2^shifts[f]; a shift is 0 to 7.
TokenTable token_table(const Matrix& features, std::span<const unsigned> shifts);
Matrix token_features(const TokenTable& table, std::span<const std::int32_t> token_ids);

// Everything but levels and classes: those are zero for one level of multiplier 1. `sets`: fits of all units.
CalibrationData to_integers(const Units& units, std::span<const std::vector<UnitFit>> sets,
                            const TokenTable& tokens, const std::string& model,
                            const IntegerOptions& options);

// The metrics [unit] that a calibration was made with: its transforms T are made of orthogonal ones U and a
// metric R, R T being a multiple of U, so that R'R is one of the inverse of T T'.
std::vector<Matrix> calibrated_metrics(const CalibrationData& data, double unit_step);

}  // namespace kvcast::calibrate
