#include "tools/model/network.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace kvcast::model {
namespace {

// Rows of queries that attend at once: scores stay in the cache, and the half of them that causality forbids
// is mostly never computed.
constexpr std::int64_t kQueryBlock = 64;

std::int64_t signed_of(std::size_t n) {
    return static_cast<std::int64_t>(n);
}

// [T, heads * head_dim] as [heads, T, head_dim].
at::Tensor split_heads(const at::Tensor& x, std::size_t heads) {
    return x.view({x.size(0), signed_of(heads), -1}).transpose(0, 1);
}

// -infinity where a query of a block of n would see a later key of the same block.
at::Tensor causal_mask(std::int64_t n, const at::TensorOptions& options) {
    return at::full({n, n}, -std::numeric_limits<float>::infinity(), options).triu(1);
}

// One block of queries [kv_heads, group, n, head_dim], whose last row sees every key given.
at::Tensor attend_block(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
    const std::int64_t kv_heads = q.size(0), group = q.size(1), n = q.size(2), keys = k.size(1);
    at::Tensor scores = at::bmm(q.reshape({kv_heads, group * n, -1}), k.transpose(1, 2)).to(at::kFloat);
    if (n > 1) {
        scores.view({kv_heads, group, n, keys}).narrow(3, keys - n, n).add_(causal_mask(n, scores.options()));
    }
    return at::bmm(scores.softmax(-1).to(v.scalar_type()), v).view({kv_heads, group, n, -1});
}

// Causal grouped-query attention: queries [query_heads, T, head_dim] are the last T of all tokens that k and
// v [kv_heads, tokens, head_dim] hold. Returns [T, query_heads * head_dim].
at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
    const std::int64_t tokens = q.size(1), before = k.size(1) - tokens, head_dim = q.size(2);
    const double scale = 1 / std::sqrt(static_cast<double>(head_dim));
    const at::Tensor grouped = (q * scale).reshape({k.size(0), -1, tokens, head_dim});
    std::vector<at::Tensor> blocks;
    for (std::int64_t begin = 0; begin < tokens; begin += kQueryBlock) {
        const std::int64_t n = std::min(kQueryBlock, tokens - begin);
        const std::int64_t seen = before + begin + n;
        blocks.push_back(
            attend_block(grouped.narrow(2, begin, n), k.narrow(1, 0, seen), v.narrow(1, 0, seen)));
    }
    return at::cat(blocks, 2).permute({2, 0, 1, 3}).reshape({tokens, -1});
}

std::vector<float> rounded(const std::vector<double>& values) {
    return {values.begin(), values.end()};
}

}  // namespace

at::Tensor rotate(const at::Tensor& x, const Rotation& rotation) {
    const auto halves = x.to(at::kFloat).chunk(2, -1);
    const at::Tensor& c = rotation.cosine;
    const at::Tensor& s = rotation.sine;
    return at::cat({halves[0] * c - halves[1] * s, halves[1] * c + halves[0] * s}, -1).to(x.scalar_type());
}

Network::Network(const ModelConfig& config, const WeightFiles& weights, const at::TensorOptions& options)
    : config_(config), options_(options) {
    const std::vector<float> frequencies = rounded(config.rope.frequencies);
    frequencies_ = at::tensor(frequencies, at::TensorOptions(at::kFloat)).to(options.device());
    const std::vector<std::int64_t> table = {signed_of(config.vocabulary), signed_of(config.hidden)};
    embedding_ = weights.load("model.embed_tokens.weight", table, options);
    output_ = config.tied_embeddings ? embedding_ : weights.load("lm_head.weight", table, options);
    last_norm_ = load_norm(weights, "model.norm", config.hidden);
    for (std::size_t i = 0; i < config.layers; ++i) layers_.push_back(load_layer(weights, i));
}

Linear Network::load_linear(const WeightFiles& weights, const std::string& name, std::size_t outputs,
                            std::size_t inputs, bool bias) const {
    Linear linear;
    linear.weight = weights.load(name + ".weight", {signed_of(outputs), signed_of(inputs)}, options_);
    if (bias) linear.bias = weights.load(name + ".bias", {signed_of(outputs)}, options_);
    return linear;
}

at::Tensor Network::load_norm(const WeightFiles& weights, const std::string& name, std::size_t size) const {
    return weights.load(name + ".weight", {signed_of(size)}, options_);
}

Layer Network::load_layer(const WeightFiles& weights, std::size_t index) const {
    const ModelConfig& c = config_;
    const std::string at = fmt::format("model.layers.{}.", index);
    const std::size_t q_width = c.query_heads * c.head_dim, kv_width = c.kv_heads * c.head_dim;
    Layer layer;
    layer.attention_norm = load_norm(weights, at + "input_layernorm", c.hidden);
    layer.mlp_norm = load_norm(weights, at + "post_attention_layernorm", c.hidden);
    layer.q = load_linear(weights, at + "self_attn.q_proj", q_width, c.hidden, c.qkv_bias);
    layer.k = load_linear(weights, at + "self_attn.k_proj", kv_width, c.hidden, c.qkv_bias);
    layer.v = load_linear(weights, at + "self_attn.v_proj", kv_width, c.hidden, c.qkv_bias);
    layer.o = load_linear(weights, at + "self_attn.o_proj", c.hidden, q_width, c.output_bias);
    if (c.qk_norm) {
        layer.q_norm = load_norm(weights, at + "self_attn.q_norm", c.head_dim);
        layer.k_norm = load_norm(weights, at + "self_attn.k_norm", c.head_dim);
    }
    layer.gate = load_linear(weights, at + "mlp.gate_proj", c.intermediate, c.hidden, c.mlp_bias);
    layer.up = load_linear(weights, at + "mlp.up_proj", c.intermediate, c.hidden, c.mlp_bias);
    layer.down = load_linear(weights, at + "mlp.down_proj", c.hidden, c.intermediate, c.mlp_bias);
    return layer;
}

// Angles are fp32 products, as in the engines that K comes from: at position 10^5 an exact product would
// differ by up to 0.004 radians from what those engines store.
Rotation Network::rotation(std::uint64_t first_position, std::int64_t tokens) const {
    const auto first = static_cast<std::int64_t>(first_position);
    const auto on_device = at::TensorOptions(at::kFloat).device(options_.device());
    const at::Tensor positions = at::arange(first, first + tokens, on_device.dtype(at::kLong)).to(at::kFloat);
    const at::Tensor angles = at::outer(positions, frequencies_);
    return {angles.cos(), angles.sin()};
}

at::Tensor Network::norm(const at::Tensor& x, const at::Tensor& weight) const {
    const at::Tensor wide = x.to(at::kFloat);
    const at::Tensor mean_square = wide.square().mean(-1, true);
    return (wide * at::rsqrt(mean_square + config_.rms_norm_eps)).to(x.scalar_type()) * weight;
}

at::Tensor Network::attend(const Layer& layer, std::size_t index, const at::Tensor& x,
                           const Rotation& rotation, const ExtendKv& extend) const {
    at::Tensor q = split_heads(layer.q(x), config_.query_heads);
    at::Tensor k = split_heads(layer.k(x), config_.kv_heads);
    const at::Tensor v = split_heads(layer.v(x), config_.kv_heads);
    if (config_.qk_norm) {
        q = norm(q, layer.q_norm);
        k = norm(k, layer.k_norm);
    }
    const auto [keys, values] = extend(index, {rotate(k, rotation), v});
    return layer.o(attention(rotate(q, rotation), keys, values));
}

at::Tensor Network::forward(const at::Tensor& ids, std::uint64_t first_position,
                            const ExtendKv& extend) const {
    Rotation turned = rotation(first_position, ids.size(0));
    turned.cosine = turned.cosine * config_.rope.attention_factor;
    turned.sine = turned.sine * config_.rope.attention_factor;
    at::Tensor x = embed(ids);
    for (std::size_t i = 0; i < layers_.size(); ++i) {
        const Layer& layer = layers_[i];
        x = x + attend(layer, i, norm(x, layer.attention_norm), turned, extend);
        const at::Tensor y = norm(x, layer.mlp_norm);
        x = x + layer.down(at::silu(layer.gate(y)) * layer.up(y));
    }
    return norm(x, last_norm_);
}

at::Tensor Network::logits(const at::Tensor& hidden) const {
    return at::linear(hidden, output_).to(at::kFloat);
}

at::Tensor Network::embed(const at::Tensor& ids) const {
    return embedding_.index_select(0, ids);
}

}  // namespace kvcast::model
