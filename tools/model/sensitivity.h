// How much each plane of a model's KV cache matters, and the quantisation steps that follow.
//
// An error of variance s^2 in a plane costs about c s^2 nats, with one c per plane as long as s is small.
// With c known, the best steps fall with a power of c; -1/2 would be right for a codec that spends the same
// bits on every plane's shape, and flatter is safer where c is a noisy estimate.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "codec/delta/levels.h"
#include "tools/common/kv_cache.h"
#include "tools/model/runner.h"

namespace kvcast::model {

struct Sample {
    const tools::KvCache* context = nullptr;
    std::span<const std::int32_t> continuation;
};

// Called after each piece of work.
using Tick = std::function<void()>;

// c of every [layer][plane], in nats per squared step, steps in units of the plane's standard deviation. One
// plane at a time is rounded to `step`, K before RoPE, its first `sinks` tokens and everything else left
// exact. Ticks once per sample and plane.
std::vector<double> measured_sensitivity(const Runner& runner, std::span<const Sample> samples, double step,
                                         std::size_t sinks, const Tick& tick);

// The same up to a common factor from the trace of the Fisher information of the model's own predictions:
// gradients of log p(y), y drawn from p, with random signs so that one backward pass serves all positions
// (Hutchinson's estimator). Deterministic for a seed. Ticks once per sample and draw.
std::vector<double> fisher_sensitivity(const Runner& runner, std::span<const Sample> samples,
                                       std::size_t draws, std::uint64_t seed, std::size_t sinks,
                                       const Tick& tick);

// Multipliers proportional to c^-0.4, geometric mean 1.
LayerSteps steps_of(const std::vector<double>& sensitivity);

}  // namespace kvcast::model
