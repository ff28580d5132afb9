// Quality levels of the delta profile, and layer-aware quantisation steps (CacheGen, arXiv 2310.07240,
// section 5.2). Encoder policy, not format: a decoder reads the steps that result.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "codec/format/error.h"
#include "codec/format/layout.h"

namespace kvcast {

// Level n quantises with step kDeltaSteps[n - 1], in units of each plane's standard deviation within the
// chunk: from hardly visible to the coarsest that keeps text coherent.
inline constexpr double kDeltaSteps[] = {0.2, 0.4, 0.6, 0.8, 1.0, 1.4, 2.0};
inline constexpr unsigned kDeltaLevels = std::size(kDeltaSteps);

// Step multipliers [layer][plane], geometric mean about 1. Empty stands for 1 everywhere.
using LayerSteps = std::vector<double>;

// CacheGen's thirds of the layers: relative steps 1 : 2 : 3 from the first third to the last.
LayerSteps thirds(std::size_t layers, std::size_t planes);

// kBadArgument unless there is one finite multiplier in [1/64, 64] per layer and plane.
Status check_layer_steps(const LayerSteps& steps, const Layout& layout);

}  // namespace kvcast
