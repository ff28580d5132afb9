#include "tools/model/rope.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numbers>

#include "tools/common/file.h"

namespace kvcast::model {
namespace {

constexpr double kDefaultTheta = 10000;

// Position interpolation (Chen et al., arXiv 2306.15595): positions shrink by the factor.
void scale_linear(RopeParameters& rope, const JsonObject& scaling) {
    const double factor = scaling.positive("factor");
    for (double& f : rope.frequencies) f /= factor;
}

// Llama 3.1: waves longer than the old context / low are interpolated, those shorter than the old context /
// high kept, and those between blended.
void scale_llama3(RopeParameters& rope, const JsonObject& scaling) {
    const double factor = scaling.positive("factor");
    const double low = scaling.positive("low_freq_factor");
    const double high = scaling.positive("high_freq_factor");
    const double old_tokens = scaling.positive("original_max_position_embeddings");
    if (!(high > low)) scaling.fail("high_freq_factor", "more than low_freq_factor");
    for (double& f : rope.frequencies) {
        const double turns = old_tokens * f / (2 * std::numbers::pi);  // within the old context
        const double kept = std::clamp((turns - low) / (high - low), 0.0, 1.0);
        f *= kept + (1 - kept) / factor;
    }
}

// 0.1 s ln(factor) + 1: what yarn multiplies queries and keys by, to keep the entropy of attention.
double yarn_temperature(double factor, double slope) {
    return factor <= 1 ? 1 : 0.1 * slope * std::log(factor) + 1;
}

double yarn_attention_factor(const JsonObject& scaling, double factor) {
    const bool two_slopes = scaling.find("mscale") != nullptr && scaling.find("mscale_all_dim") != nullptr;
    const double otherwise = !two_slopes ? yarn_temperature(factor, 1)
                                         : yarn_temperature(factor, scaling.positive("mscale")) /
                                               yarn_temperature(factor, scaling.positive("mscale_all_dim"));
    return scaling.positive("attention_factor", otherwise);
}

// YaRN (Peng et al., arXiv 2309.00071): pairs that turn more than beta_fast times in the old context are
// kept, those that turn less than beta_slow times interpolated, with a linear ramp over the pair's index
// between.
void scale_yarn(RopeParameters& rope, const JsonObject& scaling, double max_tokens) {
    const double old_tokens = scaling.positive("original_max_position_embeddings", max_tokens);
    const double factor = scaling.positive("factor", max_tokens / old_tokens);
    const double dim = 2 * static_cast<double>(rope.frequencies.size());
    const auto pair_that_turns = [&](double turns) {
        return dim * std::log(old_tokens / (turns * 2 * std::numbers::pi)) / (2 * std::log(rope.theta));
    };
    double first = pair_that_turns(scaling.positive("beta_fast", 32));
    double last = pair_that_turns(scaling.positive("beta_slow", 1));
    if (scaling.flag("truncate", true)) {
        first = std::floor(first);
        last = std::ceil(last);
    }
    first = std::max(first, 0.0);
    last = std::min(last, dim - 1);
    if (first == last) last += 0.001;  // a step instead of a division by zero
    for (std::size_t i = 0; i < rope.frequencies.size(); ++i) {
        const double ramp = std::clamp((static_cast<double>(i) - first) / (last - first), 0.0, 1.0);
        rope.frequencies[i] *= 1 - ramp + ramp / factor;
    }
    rope.attention_factor = yarn_attention_factor(scaling, factor);
}

void apply_scaling(RopeParameters& rope, const JsonObject& scaling, const JsonObject& config) {
    const std::string type = scaling.text("rope_type", scaling.text("type", "default"));
    if (type == "default") return;
    rope.scaled = true;
    if (type == "linear") return scale_linear(rope, scaling);
    if (type == "llama3") return scale_llama3(rope, scaling);
    if (type == "yarn") return scale_yarn(rope, scaling, config.positive("max_position_embeddings"));
    scaling.fail(scaling.find("rope_type") != nullptr ? "rope_type" : "type",
                 "default, linear, llama3 or yarn");
}

}  // namespace

RopeParameters rope_parameters(const JsonObject& config, std::size_t head_dim) {
    // Transformers 5 moved both keys into one object.
    const auto merged = config.object("rope_parameters");
    const auto scaling = merged ? merged : config.object("rope_scaling");
    const JsonObject& base = merged && merged->find("rope_theta") != nullptr ? *merged : config;
    RopeParameters rope;
    rope.theta = base.positive("rope_theta", kDefaultTheta);
    if (!(rope.theta > 1)) base.fail("rope_theta", "a number above 1");
    for (std::size_t i = 0; i < head_dim / 2; ++i) {
        const double exponent = -2 * static_cast<double>(i) / static_cast<double>(head_dim);
        rope.frequencies.push_back(std::pow(rope.theta, exponent));
    }
    if (scaling) apply_scaling(rope, *scaling, config);
    return rope;
}

}  // namespace kvcast::model
