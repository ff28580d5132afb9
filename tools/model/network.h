// The decoder-only transformer itself, on libtorch tensors. Internal to kvcast::model.
//
// Shapes: T tokens; a hidden state is [T, hidden]; queries, keys and values are [heads, T, head_dim].
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "tools/model/config.h"
#include "tools/model/weights.h"

namespace kvcast::model {

struct Linear {
    at::Tensor weight;  // [outputs, inputs]
    at::Tensor bias;    // [outputs], or undefined

    at::Tensor operator()(const at::Tensor& x) const { return at::linear(x, weight, bias); }
};

struct Layer {
    at::Tensor attention_norm, mlp_norm;  // [hidden]
    Linear q, k, v, o;
    at::Tensor q_norm, k_norm;  // [head_dim], or undefined
    Linear gate, up, down;
};

// Turns by position: cosines and sines [T, head_dim / 2], fp32.
struct Rotation {
    at::Tensor cosine, sine;
};

using KeysValues = std::pair<at::Tensor, at::Tensor>;

// Called once per layer with the new tokens' keys (after RoPE) and values; returns those of all tokens, the
// context's first.
using ExtendKv = std::function<KeysValues(std::size_t layer, const KeysValues& added)>;

class Network {
  public:
    Network(const ModelConfig& config, const WeightFiles& weights, const at::TensorOptions& options);

    const ModelConfig& config() const { return config_; }
    const at::TensorOptions& options() const { return options_; }  // type and device of weights

    // Hidden states after the last norm, [T, hidden]. `ids` is int64 [T], on the network's device.
    at::Tensor forward(const at::Tensor& ids, std::uint64_t first_position, const ExtendKv& extend) const;

    // fp32 logits [rows, vocabulary] of hidden states [rows, hidden].
    at::Tensor logits(const at::Tensor& hidden) const;

    at::Tensor embed(const at::Tensor& ids) const;

    // Pure rotations by RoPE's angles, without yarn's attention factor.
    Rotation rotation(std::uint64_t first_position, std::int64_t tokens) const;

  private:
    Linear load_linear(const WeightFiles& weights, const std::string& name, std::size_t outputs,
                       std::size_t inputs, bool bias) const;
    at::Tensor load_norm(const WeightFiles& weights, const std::string& name, std::size_t size) const;
    Layer load_layer(const WeightFiles& weights, std::size_t index) const;
    at::Tensor norm(const at::Tensor& x, const at::Tensor& weight) const;
    at::Tensor attend(const Layer& layer, std::size_t index, const at::Tensor& x, const Rotation& rotation,
                      const ExtendKv& extend) const;

    ModelConfig config_;
    at::TensorOptions options_;
    at::Tensor frequencies_;  // fp32 [head_dim / 2]
    at::Tensor embedding_;    // [vocabulary, hidden]
    at::Tensor last_norm_;
    at::Tensor output_;  // [vocabulary, hidden]; the embedding where tied
    std::vector<Layer> layers_;
};

// x [..., T, head_dim] with channels i and i + head_dim / 2 turned as a pair; sine negated turns back.
at::Tensor rotate(const at::Tensor& x, const Rotation& rotation);

}  // namespace kvcast::model
