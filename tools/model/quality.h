// What a changed KV cache costs a model: its predictions over a continuation, against those with the exact
// cache.
//
// KL is the mean Kullback-Leibler divergence D(exact || changed) of the next-token distribution over all
// positions of the continuation, in nats. Perplexity is that of the continuation's tokens after the first.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "tools/model/runner.h"

namespace kvcast::model {

struct Quality {
    double kl = 0;                                // nats per token
    double perplexity_change = 0;                 // changed / exact - 1
    double greedy_agreement = 0;                  // share of positions whose most likely token is the same
    std::optional<std::size_t> first_divergence;  // first position whose most likely token is another
};

// Holds the exact predictions, vocabulary floats per position. Thread-safe like the runner.
class QualityProbe {
  public:
    // The runner must outlive the probe. `continuation` follows `exact`; at least two tokens.
    QualityProbe(const Runner& runner, const Context& exact, std::span<const std::int32_t> continuation);

    // `changed` has as many tokens as `exact` had.
    Quality measure(const Context& changed) const;

    double perplexity() const;  // with the exact cache

  private:
    std::vector<float> log_probabilities(const Context& context) const;
    double log_likelihood(const std::vector<float>& log_p) const;

    const Runner& runner_;
    std::vector<std::int32_t> continuation_;
    std::vector<float> exact_;  // log probabilities [positions, vocabulary]
};

}  // namespace kvcast::model
