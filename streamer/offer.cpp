#include "streamer/offer.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

namespace kvcast::streamer {
namespace {

LevelView offered_level(const Manifest& manifest, const ManifestObject& object,
                        const SessionOptions& options) {
    const ManifestLevel& level = level_of(manifest, object.level);
    const bool asked_for = !options.finest_level || object.level >= *options.finest_level;
    const bool usable = asked_for && refusal(manifest, object, options).empty();
    return {object.level, object.bytes,         level.kl.value_or(object.level),
            usable,       level.kl.has_value(), level.profile == Profile::kKlt};
}

}  // namespace

const ManifestLevel& level_of(const Manifest& manifest, unsigned level) {
    return *std::ranges::find(manifest.levels, level, &ManifestLevel::level);
}

Status check_memory(const Located& located, const SessionOptions& options) {
    const std::uint64_t per_token = located.manifest.layout.token_bytes();
    std::uint64_t all = 0;
    for (const ManifestChunk& c : std::span(located.manifest.chunks).first(located.chunks)) {
        all += c.tokens * per_token;
        if (c.tokens * per_token > options.chunk_bytes) {
            return {ErrorCode::kLimitExceeded,
                    fmt::format("a chunk of {} tokens decodes to {} bytes, at most {} are allowed", c.tokens,
                                c.tokens * per_token, options.chunk_bytes)};
        }
    }
    if (all > options.kv_bytes) {
        return {ErrorCode::kLimitExceeded,
                fmt::format("its KV takes {} bytes, at most {} are allowed", all, options.kv_bytes)};
    }
    return {};
}

std::string refusal(const Manifest& manifest, const ManifestObject& object, const SessionOptions& options) {
    const auto& calibration = manifest.calibration;
    const bool calibrated = level_of(manifest, object.level).profile == Profile::kKlt && calibration;
    const std::uint64_t most = options.chunk_bytes;
    if (object.bytes > most) return fmt::format("{} bytes, at most {} are read", object.bytes, most);
    if (calibrated && calibration->bytes > most)
        return fmt::format("a calibration of {} bytes, at most {} are read", calibration->bytes, most);
    return {};
}

std::vector<ChunkView> offered_chunks(const Located& located, const SessionOptions& options) {
    std::vector<ChunkView> chunks;
    std::size_t first = 0;
    for (const ManifestChunk& c : std::span(located.manifest.chunks).first(located.chunks)) {
        ChunkView view;
        view.first_token = first;
        view.tokens = c.tokens;
        for (const ManifestObject& o : c.objects)
            view.levels.push_back(offered_level(located.manifest, o, options));
        first += view.tokens;
        chunks.push_back(std::move(view));
    }
    return chunks;
}

void add_text(std::vector<ChunkView>& chunks, std::size_t end) {
    const std::size_t first = chunks.empty() ? 0 : chunks.back().first_token + chunks.back().tokens;
    if (end <= first) return;
    ChunkView tail;
    tail.first_token = first;
    tail.tokens = end - first;
    tail.status = ChunkStatus::kText;
    chunks.push_back(std::move(tail));
}

void mark_present(std::vector<ChunkView>& chunks, std::size_t tokens) {
    for (ChunkView& c : chunks) {
        if (c.first_token >= tokens) return;
        c.present = std::min(c.tokens, tokens - c.first_token);
        if (c.present < c.tokens) return;
        c.status = ChunkStatus::kPresent;
        c.levels.clear();
    }
}

}  // namespace kvcast::streamer
