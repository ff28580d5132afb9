// Our own profiles: real bytes of all chunk objects.
#include <fmt/format.h>

#include "bench/rate_distortion/point.h"
#include "tools/common/calibration_file.h"
#include "tools/common/layer_steps.h"

namespace kvcast::bench {
namespace {

Coded code(const tools::KvCache& cache, const Setup& setup, const EncodeOptions& options) {
    tools::RoundTrip trip = round_trip(cache, options, setup.chunk_tokens, *setup.executor);
    return {std::move(trip.decoded), 8.0 * static_cast<double>(trip.bytes)};
}

Point lossless() {
    return {"lossless", "kvcast", true,
            [](const tools::KvCache& cache, const Setup& setup) {
                EncodeOptions options;
                options.profile = Profile::kLossless;
                return code(cache, setup, options);
            },
            0};
}

Point delta(const std::string& family, unsigned level, bool quick, const std::string& steps) {
    return {family, fmt::format("level {}", level), quick,
            [level, steps](const tools::KvCache& cache, const Setup& setup) {
                EncodeOptions options;
                options.level = level;
                options.layer_steps = tools::choose_layer_steps(steps, cache.layout);
                return code(cache, setup, options);
            },
            level};
}

// Levels of a calibration; every other one is enough to show the order.
std::vector<Point> klt(const std::string& path) {
    std::vector<Point> out;
    if (path.empty()) return out;
    const auto calibration = tools::load_calibration(path);
    for (unsigned level = 1; level <= calibration->data().levels.size(); ++level) {
        out.push_back({"kvcast klt", fmt::format("level {}", level), level % 2 == 1,
                       [level, calibration](const tools::KvCache& cache, const Setup& setup) {
                           EncodeOptions options;
                           options.profile = Profile::kKlt;
                           options.level = level;
                           options.sinks = kKltSinks;
                           options.calibration = calibration;
                           return code(cache, setup, options);
                       },
                       level});
    }
    return out;
}

std::vector<Point> points(const Setup& setup) {
    std::vector<Point> out = {lossless()};
    for (unsigned level = 1; level <= kDeltaLevels; ++level) {
        out.push_back(delta("kvcast delta, flat steps", level, level == 3 || level == 5, "flat"));
        if (!setup.layer_steps.empty()) {
            out.push_back(
                delta("kvcast delta, measured steps", level, level >= 3 && level != 4, setup.layer_steps));
        }
    }
    for (Point& point : klt(setup.calibration)) out.push_back(std::move(point));
    return out;
}

const Registration registration(points);

}  // namespace
}  // namespace kvcast::bench
