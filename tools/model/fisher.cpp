#include "tools/model/fisher.h"

#include <algorithm>
#include <cmath>

namespace kvcast::model {
namespace {

// An id drawn from softmax(logits).
std::int32_t sample(std::span<const float> logits, std::mt19937_64& random) {
    const float top = *std::max_element(logits.begin(), logits.end());
    double total = 0;
    for (const float x : logits) total += std::exp(x - top);
    double left = std::uniform_real_distribution<double>(0, total)(random);
    for (std::size_t i = 0; i < logits.size(); ++i) {
        left -= std::exp(logits[i] - top);
        if (left <= 0) return static_cast<std::int32_t>(i);
    }
    return static_cast<std::int32_t>(logits.size() - 1);
}

}  // namespace

void fisher_gradients(const Runner& runner, const Context& context,
                      std::span<const std::int32_t> continuation, std::size_t draws, std::mt19937_64& random,
                      const std::function<void(KvGradients)>& sink) {
    PrefillOptions options;
    options.logits = LogitRows::kAll;
    options.keep_kv = false;
    const std::vector<float> logits = runner.prefill(continuation, context, options).logits;
    const std::size_t n = continuation.size(), vocabulary = logits.size() / n;
    std::vector<std::vector<std::int32_t>> targets(draws);
    std::vector<std::vector<float>> signs(draws);
    std::vector<GradientDraw> views;
    for (std::size_t d = 0; d < draws; ++d) {
        for (std::size_t i = 0; i < n; ++i) {
            targets[d].push_back(sample(std::span(logits).subspan(i * vocabulary, vocabulary), random));
            signs[d].push_back((random() & 1) != 0 ? 1.0f : -1.0f);
        }
        views.push_back({targets[d], signs[d]});
    }
    runner.kv_gradients(context, continuation, views,
                        [&](std::size_t, KvGradients gradients) { sink(std::move(gradients)); });
}

}  // namespace kvcast::model
