#include "tools/model/sensitivity.h"

#include <algorithm>
#include <cmath>
#include <random>

#include "tools/model/fisher.h"
#include "tools/model/kv.h"
#include "tools/model/quality.h"

namespace kvcast::model {
namespace {

constexpr double kExponent = -0.4;
constexpr double kLargestStep = 64;

// Both planes of a cache as floats, K before RoPE.
std::vector<std::vector<float>> plain_planes(const tools::KvCache& cache) {
    std::vector<std::vector<float>> planes = {plane_floats(cache, 0), plane_floats(cache, 1)};
    turn(planes[0], cache.layout, cache.base_position, -1);
    return planes;
}

// One layer of a plane, sinks left out.
std::span<float> layer_of(std::vector<float>& plane, const tools::KvCache& cache, std::size_t layer,
                          std::size_t sinks) {
    const std::size_t size = plane.size() / cache.layout.layers, skip = sinks * (size / cache.tokens());
    return std::span(plane).subspan(layer * size + skip, size - skip);
}

// Of what is left when every channel's mean is taken away, as the delta profile sees it.
double standard_deviation(std::span<const float> rows, std::size_t width) {
    double sum = 0;
    for (std::size_t c = 0; c < width; ++c) {
        double first = 0, second = 0;
        for (std::size_t i = c; i < rows.size(); i += width) {
            first += rows[i];
            second += static_cast<double>(rows[i]) * rows[i];
        }
        const std::size_t tokens = rows.size() / width;
        const auto n = static_cast<double>(tokens);
        sum += std::max(0.0, second / n - first / n * (first / n));
    }
    return std::sqrt(sum / static_cast<double>(width));
}

// The cache with one plane of one layer rounded.
tools::KvCache with_rounded(const tools::KvCache& exact, const std::vector<std::vector<float>>& plain,
                            std::size_t layer, std::size_t plane, double step, std::size_t sinks) {
    std::vector<float> changed = plain[plane];
    const std::span<float> rows = layer_of(changed, exact, layer, sinks);
    const double size = step * standard_deviation(rows, exact.layout.planes[plane].width());
    if (size > 0) {
        for (float& x : rows) x = static_cast<float>(std::nearbyint(x / size) * size);
    }
    if (plane == 0) turn(changed, exact.layout, exact.base_position, 1);
    tools::KvCache out = exact;
    const std::size_t bytes = out.planes[plane].size() / exact.layout.layers;
    const auto begin = static_cast<std::ptrdiff_t>(layer * bytes);
    set_plane(out, plane, changed);
    // Turning there and back is not exact: what was not rounded is taken from the original.
    const auto kept = static_cast<std::ptrdiff_t>(sinks * exact.row_bytes(plane));
    const auto end = begin + static_cast<std::ptrdiff_t>(bytes);
    const std::vector<std::byte>& source = exact.planes[plane];
    std::copy(source.begin(), source.begin() + begin + kept, out.planes[plane].begin());
    std::copy(source.begin() + end, source.end(), out.planes[plane].begin() + end);
    return out;
}

}  // namespace

std::vector<double> measured_sensitivity(const Runner& runner, std::span<const Sample> samples, double step,
                                         std::size_t sinks, const Tick& tick) {
    const std::size_t layers = runner.config().layers;
    std::vector<double> out(layers * 2);
    for (const Sample& sample : samples) {
        const QualityProbe probe(runner, context_of(*sample.context, runner.config()), sample.continuation);
        const auto plain = plain_planes(*sample.context);
        for (std::size_t i = 0; i < out.size(); ++i) {
            const tools::KvCache changed = with_rounded(*sample.context, plain, i / 2, i % 2, step, sinks);
            out[i] += probe.measure(context_of(changed, runner.config())).kl / (step * step);
            tick();
        }
    }
    return out;
}

std::vector<double> fisher_sensitivity(const Runner& runner, std::span<const Sample> samples,
                                       std::size_t draws, std::uint64_t seed, std::size_t sinks,
                                       const Tick& tick) {
    const std::size_t layers = runner.config().layers;
    std::vector<double> out(layers * 2);
    std::mt19937_64 random(seed);
    for (const Sample& sample : samples) {
        const tools::KvCache& cache = *sample.context;
        const auto add = [&](KvGradients gradients) {
            auto plain = plain_planes(cache);
            std::vector<float>* of_plane[] = {&gradients.k, &gradients.v};
            for (std::size_t i = 0; i < out.size(); ++i) {
                double energy = 0;
                for (const float g : layer_of(*of_plane[i % 2], cache, i / 2, sinks))
                    energy += static_cast<double>(g) * g;
                const std::size_t width = cache.layout.planes[i % 2].width();
                const double deviation =
                    standard_deviation(layer_of(plain[i % 2], cache, i / 2, sinks), width);
                out[i] += energy * deviation * deviation;
            }
            tick();
        };
        fisher_gradients(runner, context_of(cache, runner.config()), sample.continuation, draws, random, add);
    }
    return out;
}

LayerSteps steps_of(const std::vector<double>& sensitivity) {
    LayerSteps steps;
    double log_sum = 0;
    for (const double c : sensitivity) {
        steps.push_back(std::pow(std::max(c, 1e-12), kExponent));
        log_sum += std::log(steps.back());
    }
    const double centre = std::exp(log_sum / static_cast<double>(steps.size()));
    for (double& s : steps) s = std::clamp(s / centre, 1 / kLargestStep, kLargestStep);
    return steps;
}

}  // namespace kvcast::model
