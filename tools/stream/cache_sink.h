// A sink that puts a session's KV together in memory.
#pragma once

#include <chrono>
#include <functional>
#include <mutex>
#include <vector>

#include "codec/once.h"
#include "streamer/session.h"
#include "tools/common/kv_cache.h"

namespace kvcast::tools {

// Computes KV of `token_ids` on top of a cache that holds the tokens before them; the planes of the result
// hold the new tokens only.
using Recompute = std::function<KvCache(const KvCache& context, std::span<const std::int32_t> token_ids)>;

class CacheSink final : public streamer::Sink {
  public:
    // Without `recompute`, text is noted and left out.
    explicit CacheSink(Recompute recompute) : recompute_(std::move(recompute)) {}

    void on_manifest(const streamer::Manifest& manifest, std::size_t chunks) override;
    void on_layer(std::size_t chunk, streamer::TokenRange tokens, std::size_t layer,
                  std::span<const streamer::DecodedPlane> planes) override;
    void on_recompute(streamer::TokenRange tokens, std::span<const std::int32_t> token_ids) override;
    void on_decision(const streamer::DecisionRecord& record) override { decisions_.push_back(record); }

    // The model, layout and tokens when there is no manifest to say so: all of it will be text.
    void expect(KvCache blank);

    // After the session's end.
    const KvCache& cache() const { return cache_; }
    std::size_t complete_tokens() const;  // leading tokens that are all there
    const std::vector<streamer::TokenRange>& left_out() const { return left_out_; }
    const std::vector<streamer::DecisionRecord>& decisions() const { return decisions_; }
    double recompute_seconds() const { return recompute_seconds_; }
    const std::string& error() const { return error_; }  // of recomputing

    // At any time, from any thread.
    std::size_t tokens_there() const;

  private:
    void make_room();
    void mark(streamer::TokenRange tokens);

    Recompute recompute_;
    KvCache cache_;
    Once room_;  // of the cache's planes: made by who first has something to put there
    std::vector<streamer::TokenRange> left_out_;
    std::vector<streamer::DecisionRecord> decisions_;
    double recompute_seconds_ = 0;
    std::string error_;
    mutable std::mutex mutex_;
    std::vector<bool> there_;  // [token], guarded by mutex_
};

}  // namespace kvcast::tools
