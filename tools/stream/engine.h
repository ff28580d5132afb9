// The model behind kvfetch: recomputes text and goes on where the KV ends. Only in builds with libtorch.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "streamer/rules/rule.h"
#include "tools/common/kv_cache.h"

namespace kvcast::tools {

class Engine {
  public:
    virtual ~Engine() = default;

    // KV of `token_ids` on top of `context`; the planes hold the new tokens only. Throws Error.
    virtual KvCache recompute(const KvCache& context, std::span<const std::int32_t> token_ids) = 0;

    // Tokens per second of a short prefill, measured now.
    virtual std::vector<streamer::PrefillSpeed> measure_prefill() = 0;

    // The likeliest continuation of a cache's tokens.
    virtual std::vector<std::int32_t> greedy(const KvCache& cache, std::size_t count) = 0;

    // A cache without rows, as the model would compute it of `token_ids`.
    virtual KvCache blank(std::span<const std::int32_t> token_ids) = 0;
};

// To be called before anything is done for a model, see tools/model/process.h; does nothing in builds without
// libtorch.
void prepare_for_engine(char** argv);

// Loads a Hugging Face directory. Throws Error, also where this build has no libtorch.
std::unique_ptr<Engine> load_engine(const std::string& folder, int threads);

}  // namespace kvcast::tools
