// Calibration files of the klt profile.
#pragma once

#include <memory>
#include <string>

#include "codec/klt/calibration.h"
#include "tools/common/file.h"

namespace kvcast::tools {

// Checks what is in a .kvcal file. Throws DamagedInput, which names the path.
std::shared_ptr<const Calibration> read_calibration(const MappedFile& file, const std::string& path);

// Reads and checks a .kvcal file; null for an empty path. Throws Error or DamagedInput.
std::shared_ptr<const Calibration> load_calibration(const std::string& path);

}  // namespace kvcast::tools
