// One level for all that is left, as fine as the deadline allows.
//
// With r the robust throughput, B what is still to come of transfers in flight and of the calibration, b_i(l)
// the bytes of pending chunk i at level l, w the wait for a first byte, and d the time to decode the last
// chunk (earlier ones are decoded while later ones travel, unless decoding is the slower of the two):
//
//   load(l) = max(w + (B + sum_i b_i(l)) / r, decode of all) + d
//   text    = prefill of everything that is not there yet
//
// The next pending chunk is loaded at the finest l with load(l) <= 0.9 x time left. If not even the coarsest
// level fits, everything that is missing is recomputed if that fits; if neither does, the quicker of the two
// is done. While transfers are in flight, the same comparison is made at the coarsest level: a transfer is
// abandoned for text when loading will miss, recomputing will not, and by the next look it might.
#include <fmt/format.h>

#include <algorithm>

#include "streamer/rules/rules.h"

namespace kvcast::streamer {
namespace {

constexpr double kMargin = 0.9;         // of the time left
constexpr Seconds kNextLook = 0.03;     // until a rule is asked again at the latest
constexpr double kTextAdvantage = 0.5;  // where both are late: text only if it takes half as long

bool missing(const ChunkView& c) {
    return c.status == ChunkStatus::kPending || c.status == ChunkStatus::kLoading;
}

class Deadline final : public Rule {
  public:
    const char* name() const override { return "deadline"; }

    Decision decide(const RuleState& state) const override {
        const auto next = std::ranges::find_if(state.chunks, missing);
        if (next == state.chunks.end()) return {};
        const Seconds left = state.deadline - state.now;
        const Seconds text = text_time(state);
        const Seconds coarsest = load_time(state, 255);
        if (text_is_due(coarsest, text, left)) {
            return {Decision::Kind::kText, static_cast<std::size_t>(next - state.chunks.begin()), 0,
                    fmt::format("loading takes {:.0f} ms, recomputing {:.0f}, {:.0f} are left",
                                coarsest * 1e3, text * 1e3, left * 1e3)};
        }
        if (state.transfers >= state.most_transfers) return {};
        return next_load(state, left);
    }

  private:
    static bool text_is_due(Seconds load, Seconds text, Seconds left) {
        if (load <= left) return false;
        if (text <= left) return text + kNextLook >= left * kMargin || load > 2 * left;
        return text < kTextAdvantage * load;
    }

    static Decision next_load(const RuleState& state, Seconds left) {
        const auto next = std::ranges::find(state.chunks, ChunkStatus::kPending, &ChunkView::status);
        if (next == state.chunks.end()) return {};
        const auto chunk = static_cast<std::size_t>(next - state.chunks.begin());
        for (std::size_t i = 0; i < next->levels.size(); ++i) {
            if (!next->levels[i].usable) continue;
            const Seconds load = load_time(state, next->levels[i].level);
            if (load <= kMargin * left) {
                return {
                    Decision::Kind::kLoad, chunk, i,
                    fmt::format("all at level {} takes {:.0f} ms at {:.1f} MB/s, {:.0f} are left",
                                next->levels[i].level, load * 1e3, state.network.robust / 1e6, left * 1e3)};
            }
        }
        const std::size_t choice = coarsest_level(*next);
        if (choice == kNoLevel) return {Decision::Kind::kText, chunk, 0, "no level can be had"};
        return {Decision::Kind::kLoad, chunk, choice,
                fmt::format("late at every level ({:.0f} ms are left): the coarsest", left * 1e3)};
    }

    static Seconds load_time(const RuleState& state, unsigned level) {
        double bytes = static_cast<double>(state.other_bytes);
        std::size_t tokens = 0, last = 0;
        bool pending = false;
        for (const ChunkView& c : state.chunks) {
            if (c.status == ChunkStatus::kDecoding) tokens += c.tokens;
            if (!missing(c)) continue;
            tokens += c.tokens;
            last = c.tokens;
            if (c.status == ChunkStatus::kLoading) {
                bytes += static_cast<double>(c.levels[c.choice].bytes - c.received);
            } else if (const std::size_t i = nearest_level(c, level); i != kNoLevel) {
                bytes += static_cast<double>(c.levels[i].bytes);
                pending = true;
            }
        }
        const Seconds wait = pending || state.network.silence > 0 ? state.network.first_byte : 0;
        const Seconds network = wait + bytes / std::max(state.network.robust, 1.0);
        return std::max(network, state.compute->decode_time(tokens - last)) +
               state.compute->decode_time(last);
    }

    static Seconds text_time(const RuleState& state) {
        Seconds time = state.compute_busy;
        for (const ChunkView& c : state.chunks) {
            if (missing(c)) time += state.compute->prefill_time(c.first_token, c.tokens);
        }
        return time;
    }
};

}  // namespace

std::unique_ptr<Rule> deadline_rule() {
    return std::make_unique<Deadline>();
}

}  // namespace kvcast::streamer
