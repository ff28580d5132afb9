#include "tools/client/codec_adapter.h"

#include <chrono>

namespace kvcast::client {

CodecAdapter::CodecAdapter(std::size_t workers, std::string cache_folder)
    : CachedCodec(std::move(cache_folder)), pool_(workers), workspaces_(pool_.workers()) {}

CodecAdapter::CodecAdapter(device::DeviceDecoder decoder, std::string cache_folder)
    : CachedCodec(std::move(cache_folder)), pool_(1), device_(std::move(decoder)) {}

Status CodecAdapter::decode_into(std::span<const PlaneBuffer> buffers, const ChunkDecoder& decoder,
                                 std::span<const std::uint8_t> object) {
    if (!device_) return decoder.decode(buffers, pool_, workspaces_);
    if (Status s = give_calibration_to(*device_); !s.ok()) return s;
    return device_->decode_layers(object, 0, decoder.header().layout.layers, buffers);
}

Status CodecAdapter::decode(std::span<const std::uint8_t> object, const streamer::LayerCallback& deliver) {
    const auto start = std::chrono::steady_clock::now();
    const auto decoder = ChunkDecoder::open(object, {std::nullopt, std::nullopt, calibration()});
    if (!decoder.ok()) return decoder.status();
    const ChunkHeader& header = decoder.value().header();
    const std::size_t per_layer = header.layout.planes.size();
    planes_.resize(header.layout.layers * per_layer);
    std::vector<PlaneBuffer> buffers;
    std::uint64_t bytes = 0;
    for (std::size_t i = 0; i < planes_.size(); ++i) {
        const std::size_t row = header.layout.row_bytes(i, decoder.value().dtype());
        planes_[i].resize(row * header.tokens);
        buffers.push_back({planes_[i].data(), row});
        bytes += planes_[i].size();
    }
    if (Status s = decode_into(buffers, decoder.value(), object); !s.ok()) return s;
    decode_seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    decoded_bytes_ += bytes;
    std::vector<streamer::DecodedPlane> planes(per_layer);
    for (std::size_t l = 0; l < header.layout.layers; ++l) {
        for (std::size_t p = 0; p < per_layer; ++p) {
            const PlaneBuffer& b = buffers[l * per_layer + p];
            planes[p] = {b.rows, b.row_bytes};
        }
        deliver(l, planes);
    }
    return {};
}

double expected_decode_speed(std::size_t workers) {
    constexpr double kScalar = 50e6, kAvx2 = 150e6, kAvx512 = 400e6;  // bf16, one core
    const std::string_view backend = kernels::best_ops().name;
    const double core = backend == "scalar" ? kScalar : backend == "avx2" ? kAvx2 : kAvx512;
    return core * static_cast<double>(workers);
}

}  // namespace kvcast::client
