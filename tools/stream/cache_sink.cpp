#include "tools/stream/cache_sink.h"

#include <algorithm>
#include <cstring>

namespace kvcast::tools {

using streamer::TokenRange;

void CacheSink::on_manifest(const streamer::Manifest& manifest, std::size_t chunks) {
    KvCache blank = {manifest.layout, manifest.model, manifest.base_position, {}, {}};
    for (const streamer::ManifestChunk& c : std::span(manifest.chunks).first(chunks)) {
        blank.token_ids.insert(blank.token_ids.end(), c.token_ids.begin(), c.token_ids.end());
        if (c.token_ids.empty()) blank.token_ids.resize(blank.token_ids.size() + c.tokens);
    }
    // The caller's tokens win: there may be more of them than are stored, or fewer.
    if (!cache_.token_ids.empty()) blank.token_ids = cache_.token_ids;
    expect(std::move(blank));
}

void CacheSink::expect(KvCache blank) {
    cache_ = std::move(blank);
    cache_.planes.clear();
    const std::scoped_lock lock(mutex_);
    there_.assign(cache_.tokens(), false);
}

// Not when the manifest is there, on the loop's thread: requests would wait for it.
void CacheSink::make_room() {
    room_.run([this] {
        decltype(cache_.planes) planes;  // all, or none
        for (std::size_t p = 0; p < cache_.layout.planes.size(); ++p)
            planes.emplace_back(cache_.layout.layers * cache_.tokens() * cache_.row_bytes(p));
        cache_.planes = std::move(planes);
    });
}

void CacheSink::on_layer(std::size_t, TokenRange tokens, std::size_t layer,
                         std::span<const streamer::DecodedPlane> planes) {
    make_room();
    for (std::size_t p = 0; p < planes.size(); ++p) {
        const std::size_t row = cache_.row_bytes(p);
        std::memcpy(cache_.planes[p].data() + (layer * cache_.tokens() + tokens.first) * row, planes[p].rows,
                    (tokens.end - tokens.first) * row);
    }
    if (layer + 1 == cache_.layout.layers) mark(tokens);
}

void CacheSink::on_recompute(TokenRange tokens, std::span<const std::int32_t> token_ids) {
    if (!recompute_ || token_ids.empty()) {
        left_out_.push_back(tokens);
        return;
    }
    const auto start = std::chrono::steady_clock::now();
    try {
        make_room();
        const KvCache added = recompute_(first_tokens(cache_, tokens.first), token_ids);
        const std::size_t count = tokens.end - tokens.first;
        for (std::size_t p = 0; p < cache_.planes.size(); ++p) {
            const std::size_t row = cache_.row_bytes(p);
            for (std::size_t l = 0; l < cache_.layout.layers; ++l) {
                std::memcpy(cache_.planes[p].data() + (l * cache_.tokens() + tokens.first) * row,
                            added.planes[p].data() + l * count * row, count * row);
            }
        }
        mark(tokens);
    } catch (const std::exception& e) {
        error_ = e.what();
        left_out_.push_back(tokens);
    }
    recompute_seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void CacheSink::mark(TokenRange tokens) {
    const std::scoped_lock lock(mutex_);
    std::fill(there_.begin() + static_cast<std::ptrdiff_t>(tokens.first),
              there_.begin() + static_cast<std::ptrdiff_t>(tokens.end), true);
}

std::size_t CacheSink::tokens_there() const {
    const std::scoped_lock lock(mutex_);
    return static_cast<std::size_t>(std::ranges::count(there_, true));
}

std::size_t CacheSink::complete_tokens() const {
    const std::scoped_lock lock(mutex_);
    return static_cast<std::size_t>(std::ranges::find(there_, false) - there_.begin());
}

}  // namespace kvcast::tools
