#include "tools/model/quality.h"

#include <algorithm>
#include <cmath>

#include "tools/common/file.h"

namespace kvcast::model {
namespace {

void log_softmax(std::span<float> row) {
    const float top = *std::max_element(row.begin(), row.end());
    double sum = 0;
    for (const float x : row) sum += std::exp(x - top);
    const float shift = top + static_cast<float>(std::log(sum));
    for (float& x : row) x -= shift;
}

double divergence(std::span<const float> p, std::span<const float> q) {
    double sum = 0;
    for (std::size_t i = 0; i < p.size(); ++i) sum += std::exp(p[i]) * (p[i] - q[i]);
    return sum;
}

std::size_t most_likely(std::span<const float> row) {
    return static_cast<std::size_t>(std::max_element(row.begin(), row.end()) - row.begin());
}

}  // namespace

QualityProbe::QualityProbe(const Runner& runner, const Context& exact,
                           std::span<const std::int32_t> continuation)
    : runner_(runner), continuation_(continuation.begin(), continuation.end()) {
    if (continuation.size() < 2) throw tools::Error("a continuation needs at least two tokens");
    exact_ = log_probabilities(exact);
}

std::vector<float> QualityProbe::log_probabilities(const Context& context) const {
    PrefillOptions options;
    options.logits = LogitRows::kAll;
    options.keep_kv = false;
    std::vector<float> rows = runner_.prefill(continuation_, context, options).logits;
    const std::size_t vocabulary = rows.size() / continuation_.size();
    for (std::size_t i = 0; i < continuation_.size(); ++i)
        log_softmax(std::span(rows).subspan(i * vocabulary, vocabulary));
    return rows;
}

double QualityProbe::log_likelihood(const std::vector<float>& log_p) const {
    const std::size_t vocabulary = log_p.size() / continuation_.size();
    double sum = 0;
    for (std::size_t i = 0; i + 1 < continuation_.size(); ++i)
        sum += log_p[i * vocabulary + static_cast<std::size_t>(continuation_[i + 1])];
    return sum / static_cast<double>(continuation_.size() - 1);
}

double QualityProbe::perplexity() const {
    return std::exp(-log_likelihood(exact_));
}

Quality QualityProbe::measure(const Context& changed) const {
    const std::vector<float> got = log_probabilities(changed);
    const std::size_t n = continuation_.size(), vocabulary = got.size() / n;
    Quality quality;
    std::size_t same = 0;
    for (std::size_t i = 0; i < n; ++i) {
        const auto p = std::span(exact_).subspan(i * vocabulary, vocabulary);
        const auto q = std::span(got).subspan(i * vocabulary, vocabulary);
        quality.kl += divergence(p, q) / static_cast<double>(n);
        const bool agrees = most_likely(p) == most_likely(q);
        same += agrees ? 1 : 0;
        if (!agrees && !quality.first_divergence) quality.first_divergence = i;
    }
    quality.perplexity_change = std::expm1(log_likelihood(exact_) - log_likelihood(got));
    quality.greedy_agreement = static_cast<double>(same) / static_cast<double>(n);
    return quality;
}

}  // namespace kvcast::model
