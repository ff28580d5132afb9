// Calibration files of the klt profile.
#pragma once

#include <memory>
#include <string>

#include "codec/klt/calibration.h"

namespace kvcast::tools {

// Reads and checks a .kvcal file; null for an empty path. Throws Error or DamagedInput.
std::shared_ptr<const Calibration> load_calibration(const std::string& path);

}  // namespace kvcast::tools
