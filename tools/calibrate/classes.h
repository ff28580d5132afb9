// Spread classes of a calibration's levels, from what its transforms make of sample tokens.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "codec/klt/calibration.h"
#include "tools/calibrate/row_store.h"

namespace kvcast::calibrate {

// Tokens whose classes are fitted: rows of the store, and their ids.
struct SampleTokens {
    std::vector<std::size_t> rows;
    std::vector<std::int32_t> token_ids;
};

// Which levels there are, from finest to coarsest.
struct LevelChoice {
    unsigned multiplier = 1;
    std::size_t set = 0;
};

// Fills levels (rates measured in ideal code length), and classes of all levels in all sets. `tick` per level
// and set.
void fit_classes(CalibrationData& data, std::span<const LevelChoice> levels, const RowStore& store,
                 const SampleTokens& sample, const std::function<void()>& tick);

}  // namespace kvcast::calibrate
