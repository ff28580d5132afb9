// The codec, on the CPU or a device, as sessions want it: planes come in host memory.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "codec/decoder.h"
#include "codec/device/coder.h"
#include "streamer/chunk_codec.h"
#include "tools/client/calibration_cache.h"

namespace kvcast::client {

// Keeps calibrations, by their id, in `cache_folder` (none if empty) and in memory. One session at a time.
class CodecAdapter final : public streamer::ChunkCodec {
  public:
    // Decodes on `workers` threads,
    CodecAdapter(std::size_t workers, std::string cache_folder);
    // or on a device.
    CodecAdapter(device::DeviceDecoder decoder, std::string cache_folder);

    bool has_calibration(const Hash& id) override { return cache_.has(id); }
    Status add_calibration(std::span<const std::uint8_t> file) override { return cache_.add(file); }
    void keep_begun(const Hash& id, std::span<const std::uint8_t> front) override {
        cache_.keep_begun(id, front);
    }
    std::vector<std::uint8_t> begun_calibration(const Hash& id) override { return cache_.begun(id); }
    Status decode(std::span<const std::uint8_t> object, const streamer::LayerCallback& deliver) override;

    // Of all chunks so far.
    double decode_seconds() const { return decode_seconds_; }
    std::uint64_t decoded_bytes() const { return decoded_bytes_; }

  private:
    Status decode_into(std::span<const PlaneBuffer> buffers, const ChunkDecoder& decoder,
                       std::span<const std::uint8_t> object);

    CalibrationCache cache_;
    ThreadPool pool_;
    std::vector<DecodeWorkspace> workspaces_;
    std::optional<device::DeviceDecoder> device_;
    std::shared_ptr<const Calibration> on_device_;
    std::vector<std::vector<std::byte>> planes_;  // [layer][plane]
    double decode_seconds_ = 0;
    std::uint64_t decoded_bytes_ = 0;
};

}  // namespace kvcast::client
