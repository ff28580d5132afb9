#include "tools/client/calibration_cache.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>

#include "codec/format/chain.h"
#include "tools/common/file.h"

namespace kvcast::client {
namespace {

constexpr char kBegun[] = ".begun";
constexpr std::size_t kMostBegun = 4;

}  // namespace

std::string CalibrationCache::path_of(const Hash& id) const {
    return fmt::format("{}/{}.kvcal", folder_, to_hex(id));
}

std::string CalibrationCache::begun_path_of(const Hash& id) const {
    return path_of(id) + kBegun;
}

void CalibrationCache::set_last(std::shared_ptr<const Calibration> calibration) {
    const std::scoped_lock lock(mutex_);
    last_ = std::move(calibration);
}

bool CalibrationCache::has(const Hash& id) {
    if (const auto known = last(); known && known->id() == id) return true;
    std::error_code unreachable;
    if (folder_.empty() || !std::filesystem::exists(path_of(id), unreachable)) return false;
    try {
        const tools::MappedFile file(path_of(id));
        // Its id is the bytes' hash.
        auto calibration = Calibration::read(file.octets(), *open_pool(Calibration::kReaders));
        if (!calibration.ok() || calibration.value()->id() != id) {
            std::filesystem::remove(path_of(id), unreachable);  // damaged
            return false;
        }
        set_last(std::move(calibration.value()));
    } catch (const std::exception&) {
        return false;  // unreadable: as good as not there
    }
    return true;
}

Status CalibrationCache::add(std::span<const std::uint8_t> file) {
    auto calibration = Calibration::read(file, *open_pool(Calibration::kReaders));
    if (!calibration.ok()) return calibration.status();
    const Hash id = calibration.value()->id();
    set_last(std::move(calibration.value()));
    write(path_of(id), file);
    keep_begun(id, {});
    return {};
}

void CalibrationCache::keep_begun(const Hash& id, std::span<const std::uint8_t> front) {
    begun_.clear();
    const std::string path = begun_path_of(id);
    std::error_code unreachable;
    if (front.empty()) {
        if (!folder_.empty()) std::filesystem::remove(path, unreachable);
        return;
    }
    // Another session may have brought more of it.
    if (!folder_.empty() && std::filesystem::exists(path_of(id), unreachable)) return;
    if (!folder_.empty() && std::filesystem::file_size(path, unreachable) >= front.size() && !unreachable)
        return;
    if (write(path, front)) {
        drop_old_fronts();
    } else {
        begun_id_ = id;
        begun_.assign(front.begin(), front.end());
    }
}

// Whoever publishes may name calibrations that never come.
void CalibrationCache::drop_old_fronts() const {
    try {
        std::vector<std::pair<std::filesystem::file_time_type, std::filesystem::path>> fronts;
        for (const auto& entry : std::filesystem::directory_iterator(folder_)) {
            if (entry.path().extension() == kBegun)
                fronts.emplace_back(entry.last_write_time(), entry.path());
        }
        std::ranges::sort(fronts, std::greater());
        for (std::size_t i = kMostBegun; i < fronts.size(); ++i) std::filesystem::remove(fronts[i].second);
    } catch (const std::exception&) {
        // Another process cleans up at the same time, or nobody may.
    }
}

std::vector<std::uint8_t> CalibrationCache::begun(const Hash& id) const {
    if (!begun_.empty() && begun_id_ == id) return begun_;
    std::error_code unreachable;
    if (folder_.empty() || !std::filesystem::exists(begun_path_of(id), unreachable)) return {};
    try {
        const tools::MappedFile file(begun_path_of(id));
        return {file.octets().begin(), file.octets().end()};
    } catch (const std::exception&) {
        return {};
    }
}

// A cache that cannot be written costs the next session a download. What is in it is checked when it is read:
// nobody waits until it is on the disk.
bool CalibrationCache::write(const std::string& path, std::span<const std::uint8_t> bytes) const {
    if (folder_.empty()) return false;
    try {
        std::filesystem::create_directories(folder_);
        tools::OutputFile out(path);
        out.append(std::as_bytes(bytes));
        out.commit(false);
        return true;
    } catch (const std::exception&) {
        return false;
    }
}

std::string default_cache_folder() {
    const char* folder = std::getenv("XDG_CACHE_HOME");
    if (folder != nullptr && *folder != 0) return std::string(folder) + "/kvcast";
    const char* home = std::getenv("HOME");
    return home != nullptr && *home != 0 ? std::string(home) + "/.cache/kvcast" : "";
}

}  // namespace kvcast::client
