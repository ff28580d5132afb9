// A transformer on top of a KV cache: prefill, greedy decoding, and gradients with respect to the cache.
//
// Loads Llama, Mistral, Qwen2 and Qwen3 models from Hugging Face directories. This header speaks plain
// buffers; the framework behind it (libtorch) stays inside the library kvcast::model.
//
// Shapes: a KV cache is K and V, each dense row-major [layers, tokens, kv_heads, head_dim]. K is as engines
// store it, after RoPE, unless said otherwise. Positions count tokens from the start of the sequence.
//
// Errors: every function throws tools::Error with one sentence. Thread-safety: a Runner is immutable once
// loaded, and its const functions may run concurrently; each of them already uses all threads it may.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "tools/model/config.h"

namespace kvcast::model {

enum class Element : std::uint8_t { kF32, kBf16, kF16 };

std::size_t element_bytes(Element element);

// A KV cache in the caller's memory, aligned to its elements. Not owned; must outlive the call that it is
// given to.
struct KvView {
    std::span<const std::byte> k;
    std::span<const std::byte> v;
    std::size_t tokens = 0;
    Element element = Element::kF32;
};

// A KV cache that owns its memory.
struct KvBuffer {
    std::vector<std::byte> k;
    std::vector<std::byte> v;
    std::size_t tokens = 0;
    Element element = Element::kF32;

    KvView view() const { return {k, v, tokens, element}; }
};

// A KV cache and where its first token stands.
struct Context {
    KvView kv;
    std::uint64_t first_position = 0;

    std::uint64_t next_position() const { return first_position + kv.tokens; }
};

struct LoadOptions {
    std::string device = "cpu";       // "cpu", "cuda" or "cuda:N"
    Element compute = Element::kF32;  // type of weights and activations; norms, softmax and logits are fp32
    int threads = 0;                  // of the CPU, process-wide; 0: one per core
};

enum class LogitRows : std::uint8_t { kNone, kLast, kAll };

struct PrefillOptions {
    LogitRows logits = LogitRows::kLast;
    bool keep_kv = true;
    Element kv_element = Element::kF32;  // rounded to nearest even
};

struct PrefillResult {
    std::vector<float>
        logits;   // [rows, vocabulary]; row i predicts the token after the i-th (or last) one given
    KvBuffer kv;  // of the new tokens only; empty without keep_kv
};

// Chooses the weights of one sum over the continuation, sum_ij weights[i, j] * log p(j | context,
// continuation[0..i]), given those log p. Both are [tokens, vocabulary]; the weights come as zeros.
using LogProbabilityWeights =
    std::function<void(std::size_t draw, std::span<const float> log_p, std::span<float> weights)>;

// Derivatives of such a sum, [layers, context tokens, kv_heads, head_dim]; k with respect to K before RoPE.
struct KvGradients {
    std::vector<float> k;
    std::vector<float> v;
};

class Runner {
  public:
    // Loads `folder`: config.json, and model.safetensors or the shards that model.safetensors.index.json
    // lists, in bf16, fp16 or fp32.
    static Runner load(const std::string& folder, const LoadOptions& options = {});

    ~Runner();
    Runner(Runner&&) noexcept;
    Runner& operator=(Runner&&) noexcept;
    Runner(const Runner&) = delete;
    Runner& operator=(const Runner&) = delete;

    const ModelConfig& config() const;

    // Runs `token_ids` (at least one) on top of `context`, which may be empty. The first of them stands at
    // context.next_position().
    PrefillResult prefill(std::span<const std::int32_t> token_ids, const Context& context = {},
                          const PrefillOptions& options = {}) const;

    // The `count` most likely tokens one after another, after `prompt` (at least one token) on top of
    // `context`. The lowest id wins a tie; no token ends it early.
    std::vector<std::int32_t> greedy(std::span<const std::int32_t> prompt, std::size_t count,
                                     const Context& context = {}) const;

    // One forward pass of `continuation` on top of `context`, then `draws` backward passes. `sink` gets the
    // draw's index and its gradients, in order.
    void kv_gradients(const Context& context, std::span<const std::int32_t> continuation, std::size_t draws,
                      const LogProbabilityWeights& weigh,
                      const std::function<void(std::size_t, KvGradients)>& sink) const;

    // Rows of the input embedding, [tokens, hidden].
    std::vector<float> embeddings(std::span<const std::int32_t> token_ids) const;

  private:
    struct Impl;
    explicit Runner(std::unique_ptr<Impl> impl);

    std::unique_ptr<Impl> impl_;
};

}  // namespace kvcast::model
