#include "streamer/rules/abandon.h"

#include <fmt/format.h>

#include <algorithm>

#include "streamer/rules/outlook.h"

namespace kvcast::streamer {
namespace {

constexpr double kMargin = 0.6;  // of the time left: whoever was wrong once is careful

struct Restart {
    std::size_t choice = kNoLevel;
    double gain = 0;  // bytes
};

// The finest level that would be in time, else the coarsest; kNoLevel where starting over gains nothing.
Restart best_restart(const RuleState& state, const ChunkView& c, Seconds load, double to_come) {
    const double rate = std::max(state.network.robust, 1.0);
    const Seconds left = state.deadline - state.now;
    const std::size_t coarsest = coarsest_level(c);
    for (std::size_t l = c.choice + 1; l < c.levels.size(); ++l) {
        if (!c.levels[l].usable) continue;
        const double gain =
            to_come - static_cast<double>(c.levels[l].bytes) - state.network.first_byte * rate;
        if (load - gain / rate > kMargin * left && l != coarsest) continue;
        return gain > 0 ? Restart{l, gain} : Restart{};
    }
    return {};
}

}  // namespace

std::optional<Decision> abandon(const RuleState& state, const Prospect& prospect) {
    const Seconds left = state.deadline - state.now;
    if (prospect.load <= left) return std::nullopt;
    std::optional<Decision> best;
    double most = 0;
    for (std::size_t i = 0; i < state.chunks.size(); ++i) {
        const ChunkView& c = state.chunks[i];
        if (c.status != ChunkStatus::kLoading) continue;
        const double to_come = bytes_to_come(c);
        const Seconds text = prospect.text + state.compute->prefill_time(c);
        if (text < left && text < to_come / std::max(state.network.robust, 1.0)) {
            return Decision{Decision::Kind::kText, i, 0,
                            fmt::format("what is in flight takes {:.0f} ms, {}: recomputed by {:.0f}",
                                        prospect.load * 1e3, what_is_left(left), text * 1e3)};
        }
        const Restart restart = best_restart(state, c, prospect.load, to_come);
        if (restart.gain <= most) continue;
        most = restart.gain;
        best = Decision{Decision::Kind::kLoad, i, restart.choice,
                        fmt::format("what is in flight takes {:.0f} ms, {}: over again at level {}",
                                    prospect.load * 1e3, what_is_left(left), c.levels[restart.choice].level)};
    }
    return best;
}

}  // namespace kvcast::streamer
