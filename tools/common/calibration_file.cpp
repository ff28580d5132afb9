#include "tools/common/calibration_file.h"

#include "tools/common/damage.h"

namespace kvcast::tools {

std::shared_ptr<const Calibration> read_calibration(const MappedFile& file, const std::string& path) {
    const auto read = Calibration::read(file.octets(), *open_pool(Calibration::kReaders));
    if (!read.ok()) raise(path, 0, read.status());
    return read.value();
}

std::shared_ptr<const Calibration> load_calibration(const std::string& path) {
    return path.empty() ? nullptr : read_calibration(MappedFile(path), path);
}

}  // namespace kvcast::tools
