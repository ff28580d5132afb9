// Calibrations of what sessions decode, in memory and in a folder.
#pragma once

#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "codec/klt/calibration.h"

namespace kvcast::client {

// Keeps the last calibration, and all of them by their id in a folder (none if empty). One thread at a
// time, but last() from any.
class CalibrationCache {
  public:
    explicit CalibrationCache(std::string folder) : folder_(std::move(folder)) {}

    // Whether it is the last one, or now is: read from the folder.
    bool has(const Hash& id);
    // Makes it the last one, and tries to keep it in the folder. The file's hash was checked.
    Status add(std::span<const std::uint8_t> file);

    // The front of a calibration's file that is still to be fetched whole, unchecked; empty: nothing, or no
    // more. The folder keeps the last few.
    void keep_begun(const Hash& id, std::span<const std::uint8_t> front);
    std::vector<std::uint8_t> begun(const Hash& id) const;

    // The last one; null at first.
    std::shared_ptr<const Calibration> last() const {
        const std::scoped_lock lock(mutex_);
        return last_;
    }

  private:
    void set_last(std::shared_ptr<const Calibration> calibration);
    std::string path_of(const Hash& id) const;
    std::string begun_path_of(const Hash& id) const;
    void drop_old_fronts() const;
    bool write(const std::string& path, std::span<const std::uint8_t> bytes) const;

    std::string folder_;
    mutable std::mutex mutex_;
    std::shared_ptr<const Calibration> last_;  // guarded by mutex_
    Hash begun_id_ = {};
    std::vector<std::uint8_t> begun_;  // of begun_id_, where no folder takes it
};

// $XDG_CACHE_HOME/kvcast, ~/.cache/kvcast, or nothing where neither is known.
std::string default_cache_folder();

}  // namespace kvcast::client
