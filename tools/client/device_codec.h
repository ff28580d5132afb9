// Sessions that bring KV straight into an engine's memory on a device.
//
//     auto decoder = device::DeviceDecoder::open({});
//     DeviceCodec codec(std::move(decoder.value()), place, cache_folder);
//     Session session(client.loop(), client.transport(), wanted, options, codec, sink);
//
// An object's blocks go through two pinned buffers, some layers at a time: while the device copies and
// decodes some, the host checks and copies the next (codec/device/coder.h). Nothing decoded passes through
// the host.
#pragma once

#include <memory>
#include <string>

#include "codec/device/coder.h"
#include "tools/client/cached_codec.h"

namespace kvcast::client {

// One session at a time.
class DeviceCodec final : public CachedCodec {
  public:
    // `place` is called on the decode thread, once per chunk: where planes [layer][plane] of the header's
    // tokens, from first_token on, go in device memory. Rows may be written although the chunk then fails and
    // comes again at another level, or is recomputed: nobody reads them before on_layer or on_recompute.
    // What was queued on them before is done when `place` returns.
    // Calibrations are kept in `cache_folder` (none if empty).
    DeviceCodec(device::DeviceDecoder decoder, device::DeviceDecoder::Placement place,
                std::string cache_folder);

    // What is delivered are the addresses that `place` gave (DevicePlane::rows and row_bytes); all work on
    // them is done, for every stream.
    Status decode(std::span<const std::uint8_t> object, const streamer::LayerCallback& deliver) override;

  private:
    device::DeviceDecoder decoder_;
    device::DeviceDecoder::Placement place_;
};

}  // namespace kvcast::client
