// The codec, on the CPU or a device, as sessions want it: planes come in host memory.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "codec/decoder.h"
#include "codec/device/coder.h"
#include "tools/client/cached_codec.h"

namespace kvcast::client {

// Keeps calibrations, by their id, in `cache_folder` (none if empty) and in memory. One session at a time.
class CodecAdapter final : public CachedCodec {
  public:
    // Decodes on `workers` threads,
    CodecAdapter(std::size_t workers, std::string cache_folder);
    // or on a device.
    CodecAdapter(device::DeviceDecoder decoder, std::string cache_folder);

    Status decode(std::span<const std::uint8_t> object, const streamer::LayerCallback& deliver) override;

    // Of all chunks so far.
    double decode_seconds() const { return decode_seconds_; }
    std::uint64_t decoded_bytes() const { return decoded_bytes_; }

  private:
    Status decode_into(std::span<const PlaneBuffer> buffers, const ChunkDecoder& decoder,
                       std::span<const std::uint8_t> object);

    ThreadPool pool_;
    std::vector<DecodeWorkspace> workspaces_;
    std::optional<device::DeviceDecoder> device_;
    std::vector<std::vector<std::byte>> planes_;  // [layer][plane]
    double decode_seconds_ = 0;
    std::uint64_t decoded_bytes_ = 0;
};

// What a session plans with before it has decoded anything: bytes of KV a second that so many threads of this
// machine decode at least, of klt, the slowest profile.
double expected_decode_speed(std::size_t workers);
// The same of a GPU.
inline constexpr double kExpectedDeviceSpeed = 30e9;

}  // namespace kvcast::client
