// Encoding and decoding on a CUDA device for those whose chunk objects, and perhaps planes, are in host
// memory: tools, and sessions that stream KV to an engine. Includes no CUDA header, and links in builds
// without CUDA, where open() says kNoDevice.
//
// Bytes and values are those of ChunkEncoder and ChunkDecoder. Both classes keep their memory, on the device
// and pinned, between calls; one thread at a time. The device is the one that was current in the thread that
// called open(); later calls may come from any thread, and leave its current device as it was.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "codec/decoder.h"
#include "codec/device/plane.h"
#include "codec/encoder.h"

namespace kvcast::device {

class DeviceEncoder {
  public:
    // kNoDevice; kDevice; klt: kMissingCalibration, kBadArgument (a transform without an inverse).
    static Result<DeviceEncoder> open(EncodeOptions options);
    ~DeviceEncoder();
    DeviceEncoder(DeviceEncoder&&) noexcept;
    DeviceEncoder& operator=(DeviceEncoder&&) noexcept;

    // As ChunkEncoder::encode, from planes in host memory; kDevice too.
    Status encode(const ChunkInput& input, std::vector<std::uint8_t>& object, Hash& chain);

  private:
    struct State;
    explicit DeviceEncoder(std::unique_ptr<State> state);
    std::unique_ptr<State> state_;
};

class DeviceDecoder {
  public:
    // Where planes [layer][plane] of a chunk go, in device memory. Called once per chunk, whose header is
    // sound, before anything is written. Memory and block tables stay until decode() returns; they are
    // written and read on a stream of the decoder's own, so that what was queued on them before, on any
    // stream, is done when this returns.
    using Placement = std::function<std::vector<DevicePlane>(const ChunkHeader& header)>;

    // kNoDevice, kDevice.
    static Result<DeviceDecoder> open(DecodeOptions options);
    ~DeviceDecoder();
    DeviceDecoder(DeviceDecoder&&) noexcept;
    DeviceDecoder& operator=(DeviceDecoder&&) noexcept;

    // For chunks from now on. Where it fails (kDevice), there is none.
    Status set_calibration(std::shared_ptr<const Calibration> calibration);

    // Decodes an object straight into its place. Blocks go through two pinned buffers, some layers at a time:
    // while the device copies and decodes some, the host checks and copies the next. Returns when all is
    // there. On failure the rows are unspecified: the errors of ChunkDecoder and DecodePlan::make, and
    // kDevice.
    Status decode(std::span<const std::uint8_t> object, const Placement& place);

    // Layers first to end - 1 into host memory, as ChunkDecoder::decode_layers; `planes` is
    // [layer - first][plane].
    Status decode_layers(std::span<const std::uint8_t> object, std::size_t first, std::size_t end,
                         std::span<const PlaneBuffer> planes);

  private:
    struct State;
    explicit DeviceDecoder(std::unique_ptr<State> state);
    std::unique_ptr<State> state_;
};

}  // namespace kvcast::device
