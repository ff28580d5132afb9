// Frequencies of rotary position embedding under the scaling schemes of Hugging Face configurations.
#pragma once

#include <cstddef>

#include "tools/model/config.h"
#include "tools/model/json.h"

namespace kvcast::model {

// From the keys of a config.json: `rope_theta` with `rope_scaling`, or `rope_parameters` that holds both.
// Schemes: default, linear, llama3, yarn. Throws tools::Error for any other, and for parameters that are
// missing.
RopeParameters rope_parameters(const JsonObject& config, std::size_t head_dim);

}  // namespace kvcast::model
