// What codecs of sessions share: where their calibrations are kept.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "codec/device/coder.h"
#include "streamer/chunk_codec.h"
#include "tools/client/calibration_cache.h"

namespace kvcast::client {

class CachedCodec : public streamer::ChunkCodec {
  public:
    bool has_calibration(const Hash& id) final { return cache_.has(id); }
    Status add_calibration(std::span<const std::uint8_t> file) final { return cache_.add(file); }
    void keep_begun(const Hash& id, std::span<const std::uint8_t> front) final {
        cache_.keep_begun(id, front);
    }
    std::vector<std::uint8_t> begun_calibration(const Hash& id) final { return cache_.begun(id); }

  protected:
    explicit CachedCodec(std::string folder) : cache_(std::move(folder)) {}

    // The last one that was there when it was asked for, or was added; null at first.
    std::shared_ptr<const Calibration> calibration() const { return cache_.last(); }
    // The same for the codec's decoder on a device, always the same one. On the decode thread.
    Status give_calibration_to(device::DeviceDecoder& decoder) {
        const auto last = calibration();
        if (on_device_ == last) return {};
        Status s = decoder.set_calibration(last);
        if (s.ok()) on_device_ = last;
        return s;
    }

  private:
    CalibrationCache cache_;
    std::shared_ptr<const Calibration> on_device_;
};

}  // namespace kvcast::client
