#include "streamer/locator.h"

#include <fmt/format.h>

#include "codec/format/chain.h"
#include "streamer/store.h"

namespace kvcast::streamer {
namespace {

std::vector<Hash> chains_of(const Wanted& wanted) {
    std::vector<Hash> out;
    const Hash layout = layout_hash(*wanted.layout);
    Hash parent = {};
    const std::span<const std::int32_t> ids = wanted.token_ids;
    for (std::size_t first = 0; first + wanted.chunk_tokens <= ids.size(); first += wanted.chunk_tokens) {
        parent =
            chain_hash(parent, wanted.salt, layout, wanted.model, ids.subspan(first, wanted.chunk_tokens));
        out.push_back(parent);
    }
    return out;
}

}  // namespace

Status check_wanted(const Wanted& wanted) {
    if (!wanted.token_ids.empty() && wanted.present_tokens > wanted.token_ids.size()) {
        return {ErrorCode::kBadArgument, fmt::format("{} tokens are present, the context has {}",
                                                     wanted.present_tokens, wanted.token_ids.size())};
    }
    const bool by_tokens = !wanted.store_url.empty() && !wanted.token_ids.empty() && wanted.layout;
    if (!wanted.manifest_url.empty() || (by_tokens && wanted.chunk_tokens != 0)) return {};
    return {
        ErrorCode::kBadArgument,
        "a manifest's URL is needed, or a store's URL with token ids, their number in a chunk, and a layout"};
}

Locator::Locator(const Environment& environment, Wanted wanted, Heard heard, Done done)
    : environment_(environment),
      wanted_(std::move(wanted)),
      heard_(std::move(heard)),
      done_(std::move(done)) {
    if (!wanted_.manifest_url.empty()) {
        manifest_url_ = wanted_.manifest_url;
        fetch(manifest_url_, 2 * ManifestLimits::kBytes);
        return;
    }
    chains_ = chains_of(wanted_);
    unknown_ = chains_.size();
    probe();
}

void Locator::fetch(std::string url, std::uint64_t limit) {
    DownloadRequest request;
    request.url = std::move(url);
    request.limit = limit;
    download_ = std::make_unique<Download>(environment_.loop, environment_.transport, std::move(request),
                                           environment_.download, *this, environment_.seed++);
}

// A store that has a chunk's pointer has those of all chunks before it: bisection.
void Locator::probe() {
    if (known_ < unknown_)
        return fetch(join_url(wanted_.store_url, pointer_name(chains_[(known_ + unknown_) / 2])),
                     kPointerBytes);
    if (known_ == 0) {
        // Later: the constructor may be what runs.
        nothing_stored_ = environment_.loop.after(Duration(0), [this] {
            end(Status(ErrorCode::kNotStored, refused_ ? "no prefix of these tokens is stored, or the store "
                                                         "refuses to show it: HTTP status 403"
                                                       : "no prefix of these tokens is stored"));
        });
        return;
    }
    manifest_url_ = join_url(wanted_.store_url, found_);
    fetch(manifest_url_, 2 * ManifestLimits::kBytes);
}

void Locator::on_finished(Result<std::vector<std::uint8_t>> object, int http_status) {
    const std::unique_ptr<Download> ended = std::move(download_);
    try {
        go_on(std::move(object), http_status);
    } catch (...) {
        end(status_of_exception());
    }
}

void Locator::go_on(Result<std::vector<std::uint8_t>> object, int http_status) {
    if (manifest_url_.empty()) return on_pointer(std::move(object), http_status);
    if (!object.ok()) {
        const Status s = object.status();
        return end(Status(s.code(), "manifest: " + s.message()));
    }
    on_manifest(object.value());
}

// The last thing that it does: who is told may destroy it.
void Locator::end(Result<Located> located) {
    const Done done = std::move(done_);
    done(std::move(located));
}

void Locator::on_pointer(Result<std::vector<std::uint8_t>> object, int http_status) {
    const std::size_t probed = (known_ + unknown_) / 2;
    if (object.ok()) {
        if (auto name = manifest_of_pointer(object.value())) {
            known_ = probed + 1;
            found_ = std::move(*name);
            return probe();
        }
    } else if (http_status != 404 && http_status != 403) {
        return end(Status(object.status().code(), "lookup: " + object.status().message()));
    }
    refused_ = refused_ || http_status == 403;
    unknown_ = probed;
    probe();
}

void Locator::on_manifest(std::span<const std::uint8_t> document) {
    end(check({reinterpret_cast<const char*>(document.data()), document.size()}));
}

Result<Located> Locator::check(std::string_view document) const {
    Result<std::string> payload = open_manifest(document, environment_.trusted);
    if (!payload.ok()) return payload.status();
    Result<Manifest> manifest = read_manifest(payload.value());
    if (!manifest.ok()) return manifest.status();
    const Manifest& m = manifest.value();
    if (m.expires && *m.expires <= environment_.wall_clock)
        return Status(ErrorCode::kExpired, "the manifest expired at " + format_time(*m.expires));
    if (!wanted_.model.empty() && m.model != wanted_.model) {
        return Status(ErrorCode::kForeign,
                      fmt::format("the publication is of model '{}', expected '{}'", m.model, wanted_.model));
    }
    if (wanted_.layout && layout_hash(m.layout) != layout_hash(*wanted_.layout))
        return Status(ErrorCode::kForeign, "the publication's layout is not the expected one");
    Result<std::size_t> confirmed = confirm_chain(m, wanted_.salt, wanted_.token_ids);
    if (!confirmed.ok()) return confirmed.status();
    if (confirmed.value() == 0) {
        return Status(ErrorCode::kForeign,
                      fmt::format("the wanted {} tokens do not fill the first chunk of {}",
                                  wanted_.token_ids.size(), m.chunks.front().tokens));
    }
    Located out;
    out.manifest = std::move(manifest.value());
    out.manifest_url = manifest_url_;
    out.root = root_of_manifest(manifest_url_);
    out.chunks = confirmed.value();
    for (const ManifestChunk& c : std::span(out.manifest.chunks).first(out.chunks)) out.tokens += c.tokens;
    out.token_ids = wanted_.token_ids;
    if (out.token_ids.empty()) {
        for (const ManifestChunk& c : out.manifest.chunks)
            out.token_ids.insert(out.token_ids.end(), c.token_ids.begin(), c.token_ids.end());
    }
    return out;
}

}  // namespace kvcast::streamer
