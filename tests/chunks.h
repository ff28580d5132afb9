// Chunk objects that tests and fuzzers have changed, and where they are decoded to.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "codec/decoder.h"

namespace kvcast::test {

// The checksum of a chunk's header, where there is one.
void repair_header(std::vector<std::uint8_t>& chunk);

// All checksums of a chunk; false where its header is refused, even so. klt: of the calibration of that id.
bool repair_chunk(std::vector<std::uint8_t>& chunk, const Hash* calibration = nullptr);

// Memory for `layers` layers of a chunk: planes [layer][plane] as contiguous rows.
class HostPlanes {
  public:
    HostPlanes(const ChunkHeader& header, Dtype dtype, std::size_t layers = 1);

    std::span<const PlaneBuffer> planes() const { return planes_; }
    const std::vector<std::vector<std::uint8_t>>& bytes() const { return bytes_; }

  private:
    std::vector<std::vector<std::uint8_t>> bytes_;
    std::vector<PlaneBuffer> planes_;
};

// Values of a chunk's planes together.
std::uint64_t values_of(const ChunkHeader& header);

}  // namespace kvcast::test
