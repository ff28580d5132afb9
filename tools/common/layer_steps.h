// Step multipliers in files: a JSON object with one array of numbers per plane ("k" and "v", or "latent"),
// one number per layer.
#pragma once

#include <string>

#include "codec/delta/levels.h"

namespace kvcast::tools {

// Throws Error where the file does not fit the layout.
LayerSteps read_layer_steps(const std::string& path, const Layout& layout);

// The file that a choice names; empty for "flat" and "thirds".
std::string layer_steps_file(const std::string& choice);

// "flat", "thirds", or a file to be read.
LayerSteps choose_layer_steps(const std::string& choice, const Layout& layout);

// Replaces `path`. Throws Error.
void write_layer_steps(const std::string& path, const Layout& layout, const LayerSteps& steps);

}  // namespace kvcast::tools
