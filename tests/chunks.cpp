#include "tests/chunks.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace kvcast::test {

void repair_header(std::vector<std::uint8_t>& chunk) {
    const Result<std::size_t> length = header_length(chunk);
    if (!length.ok() || length.value() > chunk.size()) return;
    const std::uint32_t crc = crc32(std::span(chunk).first(length.value() - 4));
    std::memcpy(chunk.data() + length.value() - 4, &crc, sizeof(crc));
}

bool repair_chunk(std::vector<std::uint8_t>& chunk, const Hash* calibration) {
    repair_header(chunk);
    Result<ChunkHeader> header = read_header(chunk);
    if (!header.ok()) return false;
    ChunkHeader& h = header.value();
    if (calibration != nullptr) {
        if (h.profile != Profile::kKlt) return false;
        h.calibration = *calibration;
    }
    std::size_t at = h.header_bytes;
    for (std::size_t l = 0; l < h.layout.layers; ++l) {
        const std::size_t size = std::min<std::uint64_t>(h.layer_payload_bytes(l), chunk.size() - at);
        h.layer_crc[l] = crc32(std::span(chunk).subspan(at, size));
        at += size;
    }
    Result<std::vector<std::uint8_t>> out = write_header(h);
    if (!out.ok()) return false;
    out.value().insert(out.value().end(), chunk.begin() + static_cast<std::ptrdiff_t>(h.header_bytes),
                       chunk.end());
    chunk = std::move(out.value());
    return true;
}

HostPlanes::HostPlanes(const ChunkHeader& header, Dtype dtype, std::size_t layers) {
    const std::size_t planes = header.layout.planes.size();
    for (std::size_t i = 0; i < layers * planes; ++i) {
        const std::size_t row = header.layout.row_bytes(i, dtype);
        bytes_.emplace_back(row * header.tokens);
        planes_.push_back({bytes_.back().data(), row});
    }
}

std::uint64_t values_of(const ChunkHeader& header) {
    return header.tokens * header.layout.values_per_token();
}

}  // namespace kvcast::test
