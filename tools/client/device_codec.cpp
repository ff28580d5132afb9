#include "tools/client/device_codec.h"

#include <vector>

namespace kvcast::client {

DeviceCodec::DeviceCodec(device::DeviceDecoder decoder, device::DeviceDecoder::Placement place,
                         std::string cache_folder)
    : CachedCodec(std::move(cache_folder)), decoder_(std::move(decoder)), place_(std::move(place)) {}

Status DeviceCodec::decode(std::span<const std::uint8_t> object, const streamer::LayerCallback& deliver) {
    if (Status s = give_calibration_to(decoder_); !s.ok()) return s;
    std::vector<streamer::DecodedPlane> placed;
    std::size_t per_layer = 1;
    Status s = decoder_.decode(object, [&](const ChunkHeader& header) {
        std::vector<device::DevicePlane> planes = place_(header);
        for (const device::DevicePlane& p : planes) placed.push_back({p.rows, p.row_bytes});
        per_layer = header.layout.planes.size();
        return planes;
    });
    if (!s.ok()) return s;
    for (std::size_t layer = 0; layer < placed.size() / per_layer; ++layer)
        deliver(layer, std::span(placed).subspan(layer * per_layer, per_layer));
    return {};
}

}  // namespace kvcast::client
