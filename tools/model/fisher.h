// Gradients whose second moments are the Fisher information of a model's predictions with respect to its KV
// cache.
//
// For a small error x_t of token t in a plane, KL ~ 1/2 sum_t x_t' E[g_t g_t'] x_t, with g the gradient of
// sum_ij sqrt(p_ij) z_ij log p_ij, z random signs and p the model's prediction (Hutchinson's estimator):
// behind the softmax this has the second moments of diag(p) - p p', for all positions in one backward pass.
// Tokens sampled from p would have the same mean; both need about ten passes per context before the metric
// stops getting better.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <random>
#include <span>

#include "tools/model/runner.h"

namespace kvcast::model {

// Calls `sink` with the gradients of each draw in turn. Deterministic for the state of `random` on one
// machine.
void fisher_gradients(const Runner& runner, const Context& context,
                      std::span<const std::int32_t> continuation, std::size_t draws, std::mt19937_64& random,
                      const std::function<void(KvGradients)>& sink);

}  // namespace kvcast::model
