#include "tools/stream/codec_adapter.h"

#include <fmt/format.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>

#include "codec/format/chain.h"
#include "tools/common/file.h"

namespace kvcast::tools {

CodecAdapter::CodecAdapter(std::size_t workers, std::string cache_folder)
    : pool_(workers), workspaces_(pool_.workers()), cache_folder_(std::move(cache_folder)) {}

std::string CodecAdapter::path_of(const Hash& id) const {
    return fmt::format("{}/{}.kvcal", cache_folder_, to_hex(id));
}

bool CodecAdapter::has_calibration(const Hash& id) {
    if (calibration_ && calibration_->id() == id) return true;
    if (cache_folder_.empty() || !std::filesystem::exists(path_of(id))) return false;
    try {
        const MappedFile file(path_of(id));
        const std::span bytes(reinterpret_cast<const std::uint8_t*>(file.bytes().data()),
                              file.bytes().size());
        auto calibration =
            Calibration::read(bytes);  // checks the file against damage; its id is the bytes' hash
        if (!calibration.ok() || calibration.value()->id() != id) return false;
        calibration_ = std::move(calibration.value());
    } catch (const Error&) {
        return false;  // unreadable: as good as not there
    }
    return true;
}

Status CodecAdapter::add_calibration(std::span<const std::uint8_t> file) {
    auto calibration = Calibration::read(file);
    if (!calibration.ok()) return calibration.status();
    calibration_ = std::move(calibration.value());
    if (cache_folder_.empty()) return {};
    try {
        std::filesystem::create_directories(cache_folder_);
        OutputFile out(path_of(calibration_->id()));
        out.append(std::as_bytes(file));
        out.commit();
    } catch (const std::exception&) {
        // A cache that cannot be written costs the next session a download.
    }
    return {};
}

Status CodecAdapter::decode(std::span<const std::uint8_t> object, const streamer::LayerCallback& deliver) {
    const auto start = std::chrono::steady_clock::now();
    const auto decoder = ChunkDecoder::open(object, {std::nullopt, std::nullopt, calibration_});
    if (!decoder.ok()) return decoder.status();
    const ChunkHeader& header = decoder.value().header();
    const std::size_t per_layer = header.layout.planes.size();
    planes_.resize(header.layout.layers * per_layer);
    std::vector<PlaneBuffer> buffers;
    std::uint64_t bytes = 0;
    for (std::size_t i = 0; i < planes_.size(); ++i) {
        const std::size_t row =
            header.layout.planes[i % per_layer].width() * kernels::dtype_bytes(decoder.value().dtype());
        planes_[i].resize(row * header.tokens);
        buffers.push_back({planes_[i].data(), row});
        bytes += planes_[i].size();
    }
    if (Status s = decoder.value().decode(buffers, pool_, workspaces_); !s.ok()) return s;
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

std::string default_cache_folder() {
    const char* folder = std::getenv("XDG_CACHE_HOME");
    if (folder != nullptr && *folder != 0) return std::string(folder) + "/kvcast";
    const char* home = std::getenv("HOME");
    return home != nullptr && *home != 0 ? std::string(home) + "/.cache/kvcast" : "";
}

}  // namespace kvcast::tools
