#include "streamer/verify.h"

#include <fmt/format.h>

#include <algorithm>

#include "codec/format/chain.h"

namespace kvcast::streamer {
namespace {

Status foreign(const char* what) {
    return {ErrorCode::kForeign, fmt::format("the object is of another {} than the manifest says", what)};
}

std::uint64_t first_token(const Manifest& manifest, std::size_t chunk) {
    std::uint64_t first = 0;
    for (std::size_t i = 0; i < chunk; ++i) first += manifest.chunks[i].tokens;
    return first;
}

Status check_header(const ChunkHeader& h, const Manifest& m, std::size_t chunk, unsigned level) {
    const auto listed = std::ranges::find(m.levels, level, &ManifestLevel::level);
    if (h.model != m.model) return foreign("model");
    if (!(h.layout == m.layout)) return foreign("layout");
    if (h.level != level || listed == m.levels.end() || h.profile != listed->profile) return foreign("level");
    if (h.tokens != m.chunks[chunk].tokens || h.first_token != first_token(m, chunk) ||
        h.base_position != m.base_position) {
        return foreign("token range");
    }
    if (h.chain != m.chunks[chunk].chain || h.parent != (chunk == 0 ? Hash{} : m.chunks[chunk - 1].chain))
        return foreign("chain");
    if (h.profile == Profile::kKlt && (!m.calibration || h.calibration != m.calibration->id))
        return foreign("calibration");
    return {};
}

}  // namespace

Status verify_object(std::span<const std::uint8_t> object, const Manifest& manifest, std::size_t chunk,
                     const ManifestObject& promised) {
    if (object.size() != promised.bytes || sha256(object) != promised.sha256)
        return {ErrorCode::kObjectMismatch, "the object's bytes do not hash to what the manifest promises"};
    const Result<ChunkHeader> header = read_header(object);
    if (!header.ok()) return header.status();
    const ChunkHeader& h = header.value();
    if (h.header_bytes + h.payload_bytes() != object.size())
        return {ErrorCode::kTruncated, "the object is not as long as its header says"};
    return check_header(h, manifest, chunk, promised.level);
}

}  // namespace kvcast::streamer
