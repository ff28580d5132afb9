// What a Hugging Face config.json says of a model: shapes, options, RoPE. No framework in here.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace kvcast::model {

enum class Architecture { kLlama, kMistral, kQwen2, kQwen3 };

// Rotary position embedding, every scaling scheme reduced to numbers. Channels i and i + head_dim / 2 of a
// head form pair i; it turns by position * frequencies[i].
struct RopeParameters {
    std::vector<double> frequencies;  // radians per token, one per pair
    double theta = 0;                 // base of the unscaled series
    bool scaled = false;              // the frequencies are not the unscaled series of theta
    double attention_factor = 1;      // what rotated queries and keys are multiplied by (yarn)
};

struct ModelConfig {
    Architecture architecture = Architecture::kLlama;
    std::string name;  // `_name_or_path`, else the folder's name
    std::size_t layers = 0;
    std::size_t hidden = 0;        // channels of the residual stream
    std::size_t intermediate = 0;  // channels inside the MLP
    std::size_t query_heads = 0;
    std::size_t kv_heads = 0;
    std::size_t head_dim = 0;
    std::size_t vocabulary = 0;
    double rms_norm_eps = 0;
    bool tied_embeddings = false;
    bool qkv_bias = false;
    bool output_bias = false;
    bool mlp_bias = false;
    bool qk_norm = false;            // RMS norm of each query and key head before RoPE
    std::size_t sliding_window = 0;  // tokens that attention reaches back; 0: all of them
    RopeParameters rope;
};

// Reads and checks `folder`/config.json. Throws tools::Error: a missing or malformed file or key, an
// architecture or an option that is not implemented.
ModelConfig read_config(const std::string& folder);

}  // namespace kvcast::model
