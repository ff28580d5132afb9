#include "codec/delta/levels.h"

#include <fmt/format.h>

#include <cmath>

namespace kvcast {

LayerSteps thirds(std::size_t layers, std::size_t planes) {
    LayerSteps steps(layers * planes);
    double log_sum = 0;
    for (std::size_t l = 0; l < layers; ++l) {
        const std::size_t index = l * 3 / layers;
        const auto third = static_cast<double>(index);
        for (std::size_t p = 0; p < planes; ++p) steps[l * planes + p] = third + 1;
        log_sum += std::log(third + 1);
    }
    const double mean = std::exp(log_sum / static_cast<double>(layers));
    for (double& s : steps) s /= mean;
    return steps;
}

Status check_layer_steps(const LayerSteps& steps, const Layout& layout) {
    const std::size_t wanted = layout.layers * layout.planes.size();
    if (steps.size() != wanted) {
        return {ErrorCode::kBadArgument,
                fmt::format("{} step multipliers, the layout has {} planes", steps.size(), wanted)};
    }
    for (const double s : steps) {
        if (!(s >= 1.0 / 64 && s <= 64)) {
            return {ErrorCode::kBadArgument, fmt::format("a step multiplier of {}, 1/64 to 64 allowed", s)};
        }
    }
    return {};
}

}  // namespace kvcast
