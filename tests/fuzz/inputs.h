// What fuzzers make of their bytes, and where they decode to. Lengths, ids and checksums are repaired, so
// that mutations reach the rules behind them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "codec/decoder.h"
#include "codec/klt/calibration.h"

namespace kvcast::fuzz {

// The checksum of a chunk's header, where there is one.
void repair_header(std::vector<std::uint8_t>& chunk);

// All checksums of a chunk; false where its header is refused, even so. klt: of the calibration of that id.
bool repair_chunk(std::vector<std::uint8_t>& chunk, const Hash* calibration = nullptr);

// A calibration and a chunk of it. Input: u32 length of the calibration, the calibration, u8 count of
// changes, changes, the chunk. A mutation within a calibration's block breaks it nearly always: what blocks
// may hold is changed after they are read, and written again. Nothing where the rules forbid the calibration,
// or the chunk's header.
struct KltInput {
    std::shared_ptr<const Calibration> calibration;
    std::vector<std::uint8_t> chunk;
};
std::optional<KltInput> klt_input(std::span<const std::uint8_t> data);

// Memory for `layers` layers of a chunk: planes [layer][plane] as contiguous rows.
class Rows {
  public:
    Rows(const ChunkHeader& header, Dtype dtype, std::size_t layers = 1);

    std::span<const PlaneBuffer> planes() const { return planes_; }
    const std::vector<std::vector<std::uint8_t>>& bytes() const { return bytes_; }

  private:
    std::vector<std::vector<std::uint8_t>> bytes_;
    std::vector<PlaneBuffer> planes_;
};

// Values of a chunk's planes together.
std::uint64_t values_of(const ChunkHeader& header);

}  // namespace kvcast::fuzz
