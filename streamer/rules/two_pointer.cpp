// Recompute from the front while loading from the back, until the two meet (Cake, arXiv 2410.03065), with as
// little text and as fine a level as the deadline allows.
//
// With r the robust throughput, B the bytes still to come of transfers in flight and of the calibration,
// b_i(l) the bytes of pending chunk i at level l, w the wait for a first byte, d the decoding of a chunk, c_i
// the prefill of chunk i, and C what the engine has still to do:
//
//   load(p, l) = max(w + (B + sum over pending i >= p of b_i(l)) / r, decode of all loaded) + d
//   text(p)    = C + sum over pending i < p of c_i
//
// The plan is the finest l, and for it the least p, with both within 0.9 of the time left. text(p) grows with
// p and load(p, l) falls, so that one pass over the chunks per level finds it. If no plan is in time, the
// coarsest level with the p that makes the later of the two earliest. The plan is made anew at every look:
// the engine is given a chunk at a time, the link as many transfers as it may have, and a transfer that is
// late by itself starts over at the plan's level or becomes text.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "streamer/rules/rules.h"

namespace kvcast::streamer {
namespace {

constexpr double kMargin = 0.9;         // of the time left
constexpr Seconds kEngineAhead = 0.03;  // the engine is given more when less than this is left for it

struct Plan {
    std::size_t text_end = 0;  // pending chunks before this index are recomputed
    unsigned level = 0;
    Seconds load = 0;
    Seconds text = 0;
    bool in_time = false;

    Seconds later() const { return std::max(load, text); }
};

class Planner {
  public:
    explicit Planner(const RuleState& state) : s_(state), left_(state.deadline - state.now) {
        fixed_bytes_ = static_cast<double>(s_.other_bytes);
        for (const ChunkView& c : s_.chunks) {
            if (c.status == ChunkStatus::kLoading) {
                fixed_bytes_ += static_cast<double>(c.levels[c.choice].bytes - c.received);
                in_flight_ = true;
            }
            if (c.status == ChunkStatus::kLoading || c.status == ChunkStatus::kDecoding)
                fixed_tokens_ += c.tokens;
            if (c.status == ChunkStatus::kPending) pending_ = &c;
        }
    }

    Seconds left() const { return left_; }
    bool any_pending() const { return pending_ != nullptr; }
    // What is in flight, alone.
    Seconds in_flight() const { return load_time(0, 0, false); }

    Plan best() const {
        std::optional<Plan> late;
        for (const LevelView& l : pending_->levels) {
            if (!l.usable) continue;
            const Plan plan = at_level(l.level);
            if (plan.in_time) return plan;
            if (!late || plan.later() <= late->later()) late = plan;
        }
        return late.value_or(at_level(255));
    }

  private:
    Seconds load_time(double bytes, std::size_t tokens, bool requests) const {
        const Seconds wait = requests || s_.network.silence > 0 ? s_.network.first_byte : 0;
        const Seconds network = wait + (fixed_bytes_ + bytes) / std::max(s_.network.robust, 1.0);
        const std::size_t last = pending_ != nullptr ? std::min(pending_->tokens, tokens + fixed_tokens_) : 0;
        const std::size_t others = tokens + fixed_tokens_ - last;
        return std::max(network, s_.compute->decode_time(others)) + s_.compute->decode_time(last);
    }

    // The least p that is in time; else the one whose later end is earliest.
    Plan at_level(unsigned level) const {
        double bytes = 0;
        std::size_t tokens = 0;
        for (const ChunkView& c : s_.chunks) {
            if (c.status != ChunkStatus::kPending) continue;
            const std::size_t i = nearest_level(c, level);
            bytes += i == kNoLevel ? 0 : static_cast<double>(c.levels[i].bytes);
            tokens += c.tokens;
        }
        Plan best, here;
        here.level = level;
        here.text = s_.compute_busy;
        best.load = best.text = std::numeric_limits<Seconds>::infinity();
        for (std::size_t p = 0;; ++p) {
            here.text_end = p;
            here.load = tokens > 0 || in_flight_ ? load_time(bytes, tokens, tokens > 0) : 0;
            here.in_time = here.later() <= kMargin * left_;
            if (here.in_time || here.later() < best.later()) best = here;
            if (here.in_time || p == s_.chunks.size() || here.text > here.load ||
                !s_.compute->can_recompute())
                break;
            const ChunkView& c = s_.chunks[p];
            if (c.status != ChunkStatus::kPending) continue;
            const std::size_t i = nearest_level(c, level);
            bytes -= i == kNoLevel ? 0 : static_cast<double>(c.levels[i].bytes);
            tokens -= c.tokens;
            here.text += s_.compute->prefill_time(c.first_token, c.tokens);
        }
        best.level = level;
        return best;
    }

    const RuleState& s_;
    Seconds left_;
    double fixed_bytes_ = 0;
    std::size_t fixed_tokens_ = 0;
    bool in_flight_ = false;
    const ChunkView* pending_ = nullptr;  // the last one
};

std::string what_is_left(Seconds left) {
    return std::isinf(left) ? "no deadline" : fmt::format("{:.0f} ms are left", left * 1e3);
}

class TwoPointer final : public Rule {
  public:
    const char* name() const override { return "two-pointer"; }

    Decision decide(const RuleState& state) const override {
        const Planner planner(state);
        const Seconds left = planner.left();
        if (const Seconds late = planner.in_flight(); late > left) {
            if (auto d = give_up(state, late, left)) return *d;
        }
        if (!planner.any_pending()) return {};
        const Plan plan = planner.best();
        if (auto d = next_text(state, plan, left)) return *d;
        if (state.transfers >= state.most_transfers) return {};
        return next_load(state, plan, left);
    }

  private:
    // The engine takes the first chunk of the plan's text when it is about to be idle.
    static std::optional<Decision> next_text(const RuleState& state, const Plan& plan, Seconds left) {
        const auto next = std::ranges::find(state.chunks, ChunkStatus::kPending, &ChunkView::status);
        const auto chunk = static_cast<std::size_t>(next - state.chunks.begin());
        if (chunk >= plan.text_end) return std::nullopt;
        // Text behind that chunk does not keep the engine busy: it waits for the chunk itself.
        const auto is_text = [](const ChunkView& c) { return c.status == ChunkStatus::kText; };
        const bool fed = std::find_if(state.chunks.begin(), next, is_text) != next;
        if (fed && state.compute_busy > kEngineAhead) return std::nullopt;
        return Decision{
            Decision::Kind::kText, chunk, 0,
            fmt::format(
                "chunks before {} recomputed in {:.0f} ms, the others loaded at level {} in {:.0f}, {}",
                plan.text_end, plan.text * 1e3, plan.level, plan.load * 1e3, what_is_left(left))};
    }

    static Decision next_load(const RuleState& state, const Plan& plan, Seconds left) {
        // From the back, where text could still meet it.
        std::size_t chunk = state.chunks.size();
        for (std::size_t i = plan.text_end; i < state.chunks.size(); ++i) {
            if (state.chunks[i].status != ChunkStatus::kPending) continue;
            chunk = i;
            if (!state.compute->can_recompute()) break;
        }
        if (chunk == state.chunks.size()) return {};
        const std::size_t choice = nearest_level(state.chunks[chunk], plan.level);
        if (choice == kNoLevel) return {Decision::Kind::kText, chunk, 0, "no level can be had"};
        return {Decision::Kind::kLoad, chunk, choice,
                fmt::format("{} at level {}: {:.0f} ms at {:.1f} MB/s, {}{}",
                            plan.text_end == 0 ? "all" : "all but text", plan.level, plan.load * 1e3,
                            state.network.robust / 1e6, what_is_left(left), plan.in_time ? "" : ": late")};
    }

    // Of transfers that will be late, the one with most to come: text if that is quicker, or the coarsest
    // level, if that leaves less to come.
    static std::optional<Decision> give_up(const RuleState& state, Seconds late, Seconds left) {
        const double rate = std::max(state.network.robust, 1.0);
        std::optional<Decision> best;
        double most = 0;
        for (std::size_t i = 0; i < state.chunks.size(); ++i) {
            const ChunkView& c = state.chunks[i];
            if (c.status != ChunkStatus::kLoading) continue;
            const double to_come = static_cast<double>(c.levels[c.choice].bytes - c.received);
            const Seconds text = state.compute_busy + state.compute->prefill_time(c.first_token, c.tokens);
            if (text < left && text < to_come / rate && to_come > most) {
                most = to_come;
                best = {Decision::Kind::kText, i, 0,
                        fmt::format("what is in flight takes {:.0f} ms, {}: recomputed in {:.0f}", late * 1e3,
                                    what_is_left(left), text * 1e3)};
                continue;
            }
            const std::size_t coarsest = coarsest_level(c);
            if (coarsest == kNoLevel || coarsest == c.choice) continue;
            const double gain =
                to_come - static_cast<double>(c.levels[coarsest].bytes) - state.network.first_byte * rate;
            if (gain <= most) continue;
            most = gain;
            best = {Decision::Kind::kLoad, i, coarsest,
                    fmt::format("what is in flight takes {:.0f} ms, {}: over again at level {}", late * 1e3,
                                what_is_left(left), c.levels[coarsest].level)};
        }
        return best;
    }
};

}  // namespace

std::unique_ptr<Rule> two_pointer_rule() {
    return std::make_unique<TwoPointer>();
}

}  // namespace kvcast::streamer
