// Calibrations that benches make: their speed is what counts, their rate means nothing.
#pragma once

#include <memory>

#include "codec/klt/calibration.h"

namespace kvcast::bench {

// The calibration without what predicts from token ids and from two layers back: its speed is that of a
// first-stage calibration. Throws std::runtime_error where it cannot be written.
std::shared_ptr<const Calibration> first_stage(const Calibration& whole);

// First-stage predictors and one level for planes whose width is a power of two: Hadamard transforms and
// dense predictions, all of 8 bits. Coefficients from `coded` on get no bits.
std::shared_ptr<const Calibration> dense_first_stage(const Layout& layout, const std::string& model,
                                                     std::size_t coded);

}  // namespace kvcast::bench
