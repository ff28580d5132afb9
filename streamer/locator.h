// Finds and checks the manifest of what a session wants: by its URL, or by tokens, the longest known prefix
// first.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "streamer/download.h"
#include "streamer/manifest.h"
#include "streamer/signature.h"

namespace kvcast::streamer {

// What is wanted. Either manifest_url, or store_url with tokens, layout and model.
struct Wanted {
    std::string manifest_url;
    std::string store_url;
    std::vector<std::int32_t> token_ids;  // of the context; with a manifest URL optional
    std::string model;                    // the caller's; with a manifest URL, empty accepts any
    std::optional<Layout> layout;         // the caller's; with a manifest URL, none accepts any
    std::size_t chunk_tokens = 256;       // of the store, for a lookup by tokens
    std::string salt;
    std::size_t present_tokens = 0;  // leading ones of the context whose KV the caller has
};

// kBadArgument where it says neither a manifest nor tokens of a store, or has more tokens present than ids.
Status check_wanted(const Wanted& wanted);

struct Located {
    Manifest manifest;
    std::string manifest_url;
    std::string root;                     // URL of the store
    std::size_t chunks = 0;               // leading chunks that are of the wanted tokens
    std::size_t tokens = 0;               // that those have
    std::vector<std::int32_t> token_ids;  // the caller's, or else the manifest's where it has them
};

// On the loop's thread. Every byte is fetched with the same options. Only the constructor throws
// (std::bad_alloc).
class Locator final : public DownloadObserver {
  public:
    struct Environment {
        EventLoop& loop;
        Transport& transport;
        DownloadOptions download;
        std::vector<PublicKey> trusted;
        std::int64_t wall_clock = 0;  // seconds since 1970, for the expiry
        std::uint64_t seed = 0;
    };
    // Called once; may destroy the locator. Failures: those of Download, kNotStored (no prefix of the
    // tokens), kBadManifest, kUnsigned, kBadSignature, kExpired, kForeign (another model or layout, other
    // tokens), kBadArgument. Throws nothing.
    using Done = std::function<void(Result<Located>)>;
    // Latency of a first byte. Throws nothing.
    using Heard = std::function<void(Duration)>;

    // `wanted` passed check_wanted().
    Locator(const Environment& environment, Wanted wanted, Heard heard, Done done);
    ~Locator() override { environment_.loop.cancel(nothing_stored_); }
    Locator(const Locator&) = delete;
    Locator& operator=(const Locator&) = delete;

  private:
    void on_first_byte(Duration latency) override { heard_(latency); }
    void on_bytes(std::size_t) override {}
    void on_finished(Result<std::vector<std::uint8_t>> object, int http_status) override;

    void go_on(Result<std::vector<std::uint8_t>> object, int http_status);
    void fetch(std::string url, std::uint64_t limit);
    void probe();
    void end(Result<Located> located);
    void on_pointer(Result<std::vector<std::uint8_t>> object, int http_status);
    void on_manifest(std::span<const std::uint8_t> document);
    Result<Located> check(std::string_view document) const;

    Environment environment_;
    const Wanted wanted_;
    Heard heard_;
    Done done_;
    std::string manifest_url_;  // empty: still looking
    std::vector<Hash> chains_;  // of the wanted tokens' whole chunks
    std::size_t known_ = 0;     // chunks that are stored, for certain
    std::size_t unknown_ = 0;   // at most this many are
    std::string found_;         // name of a manifest that has them
    bool refused_ = false;      // a pointer: 403, which stores also answer for what they have not
    EventLoop::TimerId nothing_stored_ = 0;
    std::unique_ptr<Download> download_;
};

}  // namespace kvcast::streamer
