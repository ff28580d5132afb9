#include "tools/common/calibration_file.h"

#include "tools/common/damage.h"
#include "tools/common/file.h"

namespace kvcast::tools {

std::shared_ptr<const Calibration> load_calibration(const std::string& path) {
    if (path.empty()) return nullptr;
    const MappedFile file(path);
    const auto read =
        Calibration::read({reinterpret_cast<const std::uint8_t*>(file.bytes().data()), file.bytes().size()});
    if (!read.ok()) raise(path, 0, read.status());
    return read.value();
}

}  // namespace kvcast::tools
