// Between the model runner and KV caches as the codec knows them.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "tools/common/kv_cache.h"
#include "tools/model/runner.h"

namespace kvcast::model {

Element element_of(Dtype dtype);

// The layout of the caches that a model computes.
Layout layout_of(const ModelConfig& config, Dtype dtype);

// A cache as context for the runner; points into it. Throws tools::Error where the cache is not this model's.
Context context_of(const tools::KvCache& cache, const ModelConfig& config);

// Prefill of `token_ids` from `base_position` on.
tools::KvCache prefilled(const Runner& runner, std::span<const std::int32_t> token_ids, Dtype dtype,
                         std::uint64_t base_position = 0);

// Turns K [layers, tokens, heads, head_dim] by RoPE, in floats: +1 as engines store it, -1 back.
void turn(std::vector<float>& k, const Layout& layout, std::uint64_t base_position, int direction);

}  // namespace kvcast::model
