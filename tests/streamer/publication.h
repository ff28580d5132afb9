// A small synthetic publication in a folder, and a sink that checks what a session does with it.
#pragma once

#include <gtest/gtest.h>

#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "streamer/publisher.h"
#include "streamer/session.h"
#include "streamer/signature.h"
#include "tests/tools/scratch.h"

namespace kvcast::test {

struct PublicationOptions {
    std::size_t tokens = 256;
    std::size_t chunk_tokens = 64;
    std::vector<unsigned> levels = {0, 2, 6};
    bool klt = false;  // levels above 0 with a synthetic calibration
    std::uint64_t seed = 1;
    std::string model = "synthetic";
    std::string salt;
    std::string session;
    std::optional<std::int64_t> ttl;
    std::int64_t now = 1'800'000'000;
    bool with_tokens = true;
    const streamer::PrivateKey* key = nullptr;
};

// Decoded rows of one chunk at one level, [layer][plane].
using Planes = std::vector<std::vector<std::byte>>;

struct Published {
    std::string name;  // of the manifest, in the store
    streamer::Manifest manifest;
    std::vector<std::int32_t> token_ids;
    std::map<std::pair<std::size_t, unsigned>, Planes> expected;  // [chunk, level]
    streamer::PublishedBytes bytes;
};

// Encodes a synthetic cache and publishes it. Fails the test on any error.
Published publish(streamer::Destination& destination, const PublicationOptions& options = {});

// Checks the order of a session's calls, and every byte against `published`.
class CheckingSink : public streamer::Sink {
  public:
    explicit CheckingSink(const Published& published) : published_(published) {}

    void on_manifest(const streamer::Manifest& manifest, std::size_t chunks) override;
    void on_layer(std::size_t chunk, streamer::TokenRange tokens, std::size_t layer,
                  std::span<const streamer::DecodedPlane> planes) override;
    void on_recompute(streamer::TokenRange tokens, std::span<const std::int32_t> token_ids) override;
    void on_decision(const streamer::DecisionRecord& record) override;
    void on_finish(const streamer::Summary& summary) override;

    // After the end: every token is loaded, recomputed or present, once, and the summary says the same. A
    // chunk that is loaded brings present ones of its tokens again.
    void expect_complete(const streamer::Summary& summary, std::size_t tokens) const;

    std::vector<streamer::TokenRange> recomputed() const;
    std::size_t chunks_loaded() const;
    std::vector<streamer::DecisionRecord> decisions() const;
    bool finished() const;

    std::size_t present = 0;  // leading tokens, of the session's Wanted

    // Called in the middle of a chunk, for tests that interfere.
    std::function<void(std::size_t chunk, std::size_t layer)> in_layer;

  private:
    const Published& published_;
    mutable std::mutex mutex_;
    std::map<std::size_t, std::vector<std::vector<std::byte>>> loading_;  // [chunk]: [layer * plane]
    std::map<std::size_t, Planes> loaded_;
    std::vector<streamer::TokenRange> recomputed_;
    std::vector<streamer::DecisionRecord> decisions_;
    bool finished_ = false;
};

}  // namespace kvcast::test
