#include "tools/model/config.h"

#include <fmt/format.h>

#include <filesystem>

#include "tools/common/file.h"
#include "tools/model/json.h"
#include "tools/model/rope.h"

namespace kvcast::model {
namespace {

using tools::Error;

constexpr const char* kArchitectures = "llama, mistral, qwen2 or qwen3";

Architecture architecture_of(const JsonObject& config) {
    const std::string type = config.text("model_type", "");
    if (type == "llama") return Architecture::kLlama;
    if (type == "mistral") return Architecture::kMistral;
    if (type == "qwen2") return Architecture::kQwen2;
    if (type == "qwen3") return Architecture::kQwen3;
    config.fail("model_type", kArchitectures);
}

// Options whose absence from the code would give wrong numbers, not an error.
void refuse_what_is_not_implemented(const JsonObject& config) {
    if (config.find("quantization_config") != nullptr) {
        throw Error(fmt::format("{}: the weights are quantised, expected bf16, fp16 or fp32", config.name()));
    }
    const std::string activation = config.text("hidden_act", "silu");
    if (activation != "silu" && activation != "swish") config.fail("hidden_act", "silu");
    if (config.positive("partial_rotary_factor", 1) != 1) config.fail("partial_rotary_factor", "1");
}

// The published defaults of each architecture, where a config.json leaves a key out.
void read_options(ModelConfig& m, const JsonObject& config) {
    const bool qwen2 = m.architecture == Architecture::kQwen2;
    const bool bias = config.flag("attention_bias", false);
    m.qkv_bias = qwen2 || bias;
    m.output_bias = !qwen2 && bias;
    m.mlp_bias = config.flag("mlp_bias", false);
    m.qk_norm = m.architecture == Architecture::kQwen3;
    m.tied_embeddings = config.flag("tie_word_embeddings", false);
    const bool windowed =
        m.architecture == Architecture::kMistral || config.flag("use_sliding_window", false);
    if (windowed) m.sliding_window = config.count("sliding_window", 0);
}

void read_shapes(ModelConfig& m, const JsonObject& config) {
    m.layers = config.count("num_hidden_layers");
    m.hidden = config.count("hidden_size");
    m.intermediate = config.count("intermediate_size");
    m.query_heads = config.count("num_attention_heads");
    m.kv_heads = config.count("num_key_value_heads", m.query_heads);
    m.vocabulary = config.count("vocab_size");
    m.rms_norm_eps = config.positive("rms_norm_eps");
    if (m.query_heads % m.kv_heads != 0) {
        config.fail("num_key_value_heads", fmt::format("a divisor of the {} attention heads", m.query_heads));
    }
    if (config.find("head_dim") == nullptr && m.hidden % m.query_heads != 0) {
        config.fail("hidden_size", fmt::format("a multiple of the {} attention heads", m.query_heads));
    }
    m.head_dim = config.count("head_dim", m.hidden / m.query_heads);
    if (m.head_dim % 2 != 0) config.fail("head_dim", "an even number");
}

std::string name_of(const JsonObject& config, const std::string& folder) {
    std::string name = config.text("_name_or_path", "");
    if (!name.empty()) return name;
    const auto path = std::filesystem::absolute(folder).lexically_normal();
    return path.has_filename() ? path.filename().string() : path.parent_path().filename().string();
}

}  // namespace

ModelConfig read_config(const std::string& folder) {
    const std::string path = folder + "/config.json";
    const nlohmann::json parsed = parse_json_file(path);
    const JsonObject config(parsed, path);
    ModelConfig m;
    m.architecture = architecture_of(config);
    m.name = name_of(config, folder);
    refuse_what_is_not_implemented(config);
    read_shapes(m, config);
    read_options(m, config);
    m.rope = rope_parameters(config, m.head_dim);
    return m;
}

}  // namespace kvcast::model
