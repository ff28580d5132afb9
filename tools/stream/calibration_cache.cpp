#include "tools/stream/calibration_cache.h"

#include <fmt/format.h>

#include <cstdlib>
#include <filesystem>

#include "codec/format/chain.h"
#include "tools/common/file.h"

namespace kvcast::tools {

std::string CalibrationCache::path_of(const Hash& id) const {
    return fmt::format("{}/{}.kvcal", folder_, to_hex(id));
}

bool CalibrationCache::has(const Hash& id) {
    if (last_ && last_->id() == id) return true;
    std::error_code unreachable;
    if (folder_.empty() || !std::filesystem::exists(path_of(id), unreachable)) return false;
    try {
        const MappedFile file(path_of(id));
        const std::span bytes(reinterpret_cast<const std::uint8_t*>(file.bytes().data()),
                              file.bytes().size());
        auto calibration =
            Calibration::read(bytes);  // checks the file against damage; its id is the bytes' hash
        if (!calibration.ok() || calibration.value()->id() != id) return false;
        last_ = std::move(calibration.value());
    } catch (const std::exception&) {
        return false;  // unreadable: as good as not there
    }
    return true;
}

Status CalibrationCache::add(std::span<const std::uint8_t> file) {
    auto calibration = Calibration::read(file);
    if (!calibration.ok()) return calibration.status();
    last_ = std::move(calibration.value());
    if (folder_.empty()) return {};
    try {
        std::filesystem::create_directories(folder_);
        OutputFile out(path_of(last_->id()));
        out.append(std::as_bytes(file));
        out.commit();
    } catch (const std::exception&) {
        // A cache that cannot be written costs the next session a download.
    }
    return {};
}

std::string default_cache_folder() {
    const char* folder = std::getenv("XDG_CACHE_HOME");
    if (folder != nullptr && *folder != 0) return std::string(folder) + "/kvcast";
    const char* home = std::getenv("HOME");
    return home != nullptr && *home != 0 ? std::string(home) + "/.cache/kvcast" : "";
}

}  // namespace kvcast::tools
