// One level for all that is left, as fine as the deadline allows.
//
// With r the robust throughput, B what is still to come of transfers in flight and of the calibration, b_i(l)
// the bytes of pending chunk i at level l, w the wait for a first byte, and d the time to decode the last
// chunk (earlier ones are decoded while later ones travel, unless decoding is the slower of the two):
//
//   load(l) = max(w + (B + sum_i b_i(l)) / r, decode of all) + d
//   text    = prefill of everything that is not there yet
//
// The next pending chunk is loaded at the finest l with load(l) <= 0.9 x time left. When what is in flight
// will miss the deadline, a transfer starts over at the finest level that fits, if that has fewer bytes than
// are left of it. If not even the coarsest level fits, with transfers starting over, everything that is
// missing is recomputed if that fits, before it is too late for it; if neither fits, the quicker of the two
// is done. Of the rules here it recomputes least.
//
// State read: time, deadline, every chunk's status, levels and bytes received; robust rate, first byte,
// silence; prefill and decode model, the engine's backlog; the calibration's bytes; transfers in flight.
//
// Source: the deadline in place of a playback buffer in throughput-based rules (dash.js's ThroughputRule).
#include <fmt/format.h>

#include <algorithm>
#include <optional>

#include "streamer/rules/outlook.h"
#include "streamer/rules/rules.h"

namespace kvcast::streamer {
namespace {

constexpr double kMargin = 0.9;  // of the time left
constexpr unsigned kCoarsest = 255;

class Deadline final : public Rule {
  public:
    const char* name() const override { return "deadline"; }

    Decision decide(const RuleState& state) const override {
        const auto next = std::ranges::find_if(state.chunks, is_missing);
        if (next == state.chunks.end()) return {};
        const Seconds left = state.deadline - state.now;
        const Seconds text = text_time(state);
        const Seconds coarsest = load_time(state, kCoarsest, true);
        if (text_is_due(coarsest, text, left, kMargin)) {
            return {Decision::Kind::kText, static_cast<std::size_t>(next - state.chunks.begin()), 0,
                    fmt::format("loading takes {:.0f} ms, recomputing {:.0f}, {}", coarsest * 1e3, text * 1e3,
                                what_is_left(left))};
        }
        const Seconds as_it_is = load_time(state, kCoarsest, false);
        if (as_it_is > left) {
            if (auto again = start_over(state, as_it_is, left)) return *again;
        }
        if (!Outlook(state).wants_transfer()) return {};
        return next_load(state, left);
    }

  private:
    // The chunk in flight that gains most from starting over.
    static std::optional<Decision> start_over(const RuleState& state, Seconds as_it_is, Seconds left) {
        const unsigned level = finest_in_time(state, left).value_or(kCoarsest);
        const double toll = state.network.first_byte * state.network.robust;
        std::optional<Decision> best;
        double most = 0;
        for (std::size_t i = 0; i < state.chunks.size(); ++i) {
            const ChunkView& c = state.chunks[i];
            const std::size_t choice = nearest_level(c, level);
            if (c.status != ChunkStatus::kLoading || choice == kNoLevel || choice == c.choice) continue;
            const double gain = bytes_to_come(c) - static_cast<double>(c.levels[choice].bytes) - toll;
            if (gain <= most) continue;
            most = gain;
            best = {Decision::Kind::kLoad, i, choice,
                    fmt::format("level {} would take {:.0f} ms at {:.1f} MB/s, {}: over again at level {}",
                                c.levels[c.choice].level, as_it_is * 1e3, state.network.robust / 1e6,
                                what_is_left(left), c.levels[choice].level)};
        }
        return best;
    }

    // The finest level at which everything would be in time if transfers started over.
    static std::optional<unsigned> finest_in_time(const RuleState& state, Seconds left) {
        const auto any = std::ranges::find_if(state.chunks, is_missing);
        for (const LevelView& l : any->levels) {
            if (l.usable && load_time(state, l.level, true) <= kMargin * left) return l.level;
        }
        return std::nullopt;
    }

    static Decision next_load(const RuleState& state, Seconds left) {
        const auto next = std::ranges::find(state.chunks, ChunkStatus::kPending, &ChunkView::status);
        if (next == state.chunks.end()) return {};
        const auto chunk = static_cast<std::size_t>(next - state.chunks.begin());
        for (std::size_t i = 0; i < next->levels.size(); ++i) {
            if (!next->levels[i].usable) continue;
            const Seconds load = load_time(state, next->levels[i].level, false);
            if (load <= kMargin * left) {
                return {
                    Decision::Kind::kLoad, chunk, i,
                    fmt::format("all at level {} takes {:.0f} ms at {:.1f} MB/s, {}", next->levels[i].level,
                                load * 1e3, state.network.robust / 1e6, what_is_left(left))};
            }
        }
        const std::size_t choice = coarsest_level(*next);
        if (choice == kNoLevel) return {Decision::Kind::kText, chunk, 0, "no level can be had"};
        return {Decision::Kind::kLoad, chunk, choice,
                fmt::format("late at every level ({}): the coarsest", what_is_left(left))};
    }

    // Transfers in flight go on, or start over where that leaves fewer bytes to come.
    static Seconds load_time(const RuleState& state, unsigned level, bool may_start_over) {
        double bytes = static_cast<double>(state.other_bytes);
        std::size_t tokens = 0, last = 0;
        bool requests = state.network.silence > 0;
        for (const ChunkView& c : state.chunks) {
            if (c.status == ChunkStatus::kDecoding) tokens += c.tokens;
            if (!is_missing(c)) continue;
            tokens += c.tokens;
            last = c.tokens;
            const std::size_t i = nearest_level(c, level);
            const double at_level = i == kNoLevel ? 0 : static_cast<double>(c.levels[i].bytes);
            const bool loading = c.status == ChunkStatus::kLoading;
            const double to_come = loading ? bytes_to_come(c) : at_level;
            const bool over = loading && may_start_over && i != kNoLevel && at_level < to_come;
            bytes += over ? at_level : to_come;
            requests |= over || !loading;
        }
        const Seconds wait = requests ? state.network.first_byte : 0;
        const Seconds network = wait + bytes / std::max(state.network.robust, 1.0);
        return std::max(network, state.compute->decode_time(tokens - last)) +
               state.compute->decode_time(last);
    }
};

}  // namespace

std::unique_ptr<Rule> deadline_rule() {
    return std::make_unique<Deadline>();
}

}  // namespace kvcast::streamer
