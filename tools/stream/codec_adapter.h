// The CPU codec, as sessions want it.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "codec/decoder.h"
#include "codec/klt/calibration.h"
#include "streamer/chunk_codec.h"

namespace kvcast::tools {

// Decodes on `workers` threads. Keeps calibrations, by their id, in `cache_folder` (none if empty) and in
// memory. One session at a time.
class CodecAdapter final : public streamer::ChunkCodec {
  public:
    CodecAdapter(std::size_t workers, std::string cache_folder);

    bool has_calibration(const Hash& id) override;
    Status add_calibration(std::span<const std::uint8_t> file) override;
    Status decode(std::span<const std::uint8_t> object, const streamer::LayerCallback& deliver) override;

    // Of all chunks so far.
    double decode_seconds() const { return decode_seconds_; }
    std::uint64_t decoded_bytes() const { return decoded_bytes_; }

  private:
    std::string path_of(const Hash& id) const;

    ThreadPool pool_;
    std::vector<DecodeWorkspace> workspaces_;
    std::string cache_folder_;
    std::shared_ptr<const Calibration> calibration_;
    std::vector<std::vector<std::byte>> planes_;  // [layer][plane]
    double decode_seconds_ = 0;
    std::uint64_t decoded_bytes_ = 0;
};

// $XDG_CACHE_HOME/kvcast, ~/.cache/kvcast, or nothing where neither is known.
std::string default_cache_folder();

}  // namespace kvcast::tools
