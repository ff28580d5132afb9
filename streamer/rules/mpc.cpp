// Robust model predictive control (Yin et al., "A control-theoretic approach for dynamic adaptive video
// streaming over HTTP", SIGCOMM 2015), towards one deadline instead of along a playback buffer.
//
// With R the throughput's harmonic mean discounted by the largest of its last five errors, load() of
// outlook.h at 0.6 R, c_i the prefill of chunk i, C the engine's backlog, T the time left, and k(l) the
// expected KL of level l:
//
//   minimise over p, l_p ... l_n   sum over pending i >= p of tokens_i k(l_i)
//   subject to  load(p; l_p ... l_n) <= T - 10 ms,   C + sum over pending i < p of c_i <= 0.9 T
//
// Chunks of one publication have nearly the same sizes and the same k(l), so that for given p the optimum is
// the finest level that fits for all, and one step finer for as many chunks as fill up the time: the two
// neighbours on the convex hull of (bytes, KL). One pass over p from the back keeps the bytes of every level;
// the finest level that fits only gets coarser on the way, so that it costs O(chunks x levels) additions.
// Of equal plans the one with less text is taken. The first step of the plan is carried out, and the plan
// made anew at every look. If nothing fits: everything at the coarsest level, without text unless the link is
// beyond hope. Late transfers: abandon.h.
//
// Text is exact and counts as KL 0: unlike two_pointer.cpp, this rule recomputes as much as it may where that
// lets it load finer. The margins are ours: at R itself and 0.97 T, where the paper has seconds of buffer
// behind it, 30.6 instead of 26.4 % of deadlines are missed over the 3G traces of bench/abr.
//
// State read: time, deadline, every chunk's status, levels (bytes, KL) and bytes received; cautious rate,
// first byte, silence; prefill and decode model, the engine's backlog; transfers in flight.
#include <fmt/format.h>

#include <algorithm>

#include "streamer/rules/abandon.h"
#include "streamer/rules/outlook.h"
#include "streamer/rules/rules.h"

namespace kvcast::streamer {
namespace {

constexpr double kRateMargin = 0.6;     // of the cautious rate
constexpr double kTextMargin = 0.9;     // of the time left
constexpr Seconds kGuard = 0.01;        // before the deadline
constexpr Seconds kEngineAhead = 0.03;  // the engine is given more when less than this is left for it

double rate(const RuleState& state) {
    return std::max(kRateMargin * state.network.cautious, 1.0);
}

struct Plan {
    std::size_t text_end = 0;  // pending chunks before this index are recomputed
    std::size_t choice = 0;    // of LevelLoads::level
    double finer = 0;          // share of the loaded bytes' step to the next finer level that fits too
    double kl = std::numeric_limits<double>::infinity();  // sum over tokens
    Seconds load = 0;
    bool in_time = false;
};

class Planner {
  public:
    Planner(const RuleState& state, const Outlook& outlook)
        : s_(state), outlook_(outlook), sums_(loads_from(state, reach())) {}

    const LevelLoads& levels() const { return sums_; }

    // One pass over p, from the most text that is in time to none.
    Plan best() {
        Plan best;
        std::size_t finest = 0;
        for (std::size_t p = reach();; --p) {
            while (finest < sums_.count && !fits(finest)) ++finest;
            if (finest == sums_.count) break;
            const Plan here = at(p, finest);
            if (here.kl <= best.kl) best = here;
            if (p <= outlook_.first_pending()) break;
            take(s_.chunks[p - 1]);
        }
        return best;
    }

  private:
    // Behind the last chunk that text may have; one chunk at least is loaded.
    std::size_t reach() const {
        if (!s_.compute->can_recompute()) return outlook_.first_pending();
        Seconds text = s_.compute_busy;
        std::size_t p = outlook_.first_pending();
        for (; p < outlook_.last_pending(); ++p) {
            const ChunkView& c = s_.chunks[p];
            if (c.status == ChunkStatus::kPending) text += s_.compute->prefill_time(c);
            if (text > kTextMargin * outlook_.left()) break;
        }
        return p;
    }

    // The chunk is loaded too.
    void take(const ChunkView& c) {
        if (c.status != ChunkStatus::kPending) return;
        sums_.tokens += c.tokens;
        for (std::size_t j = 0; j < sums_.count; ++j) sums_.bytes[j] += bytes_at(c, sums_.level[j], j);
    }

    const ChunkView& next() const { return s_.chunks[outlook_.last_pending()]; }

    Seconds load_time(std::size_t j) const {
        return outlook_.load_time({sums_.bytes[j], sums_.tokens, bytes_at(next(), sums_.level[j], j)},
                                  rate(s_));
    }
    bool fits(std::size_t j) const { return load_time(j) <= outlook_.left() - kGuard; }

    Plan at(std::size_t p, std::size_t j) const {
        Plan plan;
        plan.text_end = p;
        plan.choice = j;
        plan.in_time = true;
        plan.load = load_time(j);
        const double kl = next().levels[nearest_level(next(), sums_.level[j])].kl;
        plan.kl = kl * static_cast<double>(sums_.tokens);
        if (j == 0) return plan;
        const double step = sums_.bytes[j - 1] - sums_.bytes[j];
        const double room = (outlook_.left() - kGuard - plan.load) * rate(s_);
        plan.finer = step > 0 ? std::clamp(room / step, 0.0, 1.0) : 1;
        const double finer_kl = next().levels[nearest_level(next(), sums_.level[j - 1])].kl;
        plan.kl -= plan.finer * (kl - finer_kl) * static_cast<double>(sums_.tokens);
        return plan;
    }

    const RuleState& s_;
    const Outlook& outlook_;
    LevelLoads sums_;
};

class Mpc final : public Rule {
  public:
    const char* name() const override { return "mpc"; }

    Decision decide(const RuleState& state) const override {
        const Outlook outlook(state);
        if (!outlook.any_pending()) return late(state, outlook, {}, state.compute_busy);
        if (const std::size_t last = outlook.last_pending(); coarsest_level(state.chunks[last]) == kNoLevel)
            return {Decision::Kind::kText, last, 0, "no level can be had"};
        Planner planner(state, outlook);
        const Plan plan = planner.best();
        if (!plan.in_time) return without_plan(state, outlook);
        const std::size_t first = outlook.first_pending();
        if (first < plan.text_end && state.compute_busy <= kEngineAhead) {
            return {Decision::Kind::kText, first, 0,
                    fmt::format("chunks before {} as text, the others loaded in {:.0f} ms, {}", plan.text_end,
                                plan.load * 1e3, what_is_left(outlook.left()))};
        }
        if (!outlook.wants_transfer()) return {};
        return load(state, outlook, planner.levels(), plan);
    }

  private:
    // The plan's first step: a chunk one level finer, if there is room for a whole one.
    static Decision load(const RuleState& state, const Outlook& outlook, const LevelLoads& levels,
                         const Plan& plan) {
        const std::size_t chunk = outlook.last_pending();
        const ChunkView& c = state.chunks[chunk];
        std::size_t choice = nearest_level(c, levels.level[plan.choice]);
        if (plan.choice > 0) {
            const std::size_t finer = nearest_level(c, levels.level[plan.choice - 1]);
            const auto more =
                static_cast<double>(c.levels[finer].bytes) - static_cast<double>(c.levels[choice].bytes);
            if (plan.load + more / rate(state) <= outlook.left() - kGuard) choice = finer;
        }
        return {Decision::Kind::kLoad, chunk, choice,
                fmt::format("{:.0f} % of the rest at a level finer than {}: {:.0f} ms at {:.1f} MB/s, {}",
                            plan.finer * 100, levels.level[plan.choice], plan.load * 1e3, rate(state) / 1e6,
                            what_is_left(outlook.left()))};
    }

    static Decision without_plan(const RuleState& state, const Outlook& outlook) {
        Load rest;
        for (const ChunkView& c : state.chunks) {
            if (c.status != ChunkStatus::kPending) continue;
            const std::size_t i = coarsest_level(c);
            rest.bytes += i == kNoLevel ? 0 : static_cast<double>(c.levels[i].bytes);
            rest.tokens += c.tokens;
        }
        const std::size_t first = outlook.first_pending();
        const ChunkView& front = state.chunks[first];
        const Seconds text = state.compute_busy + state.compute->prefill_time(front);
        Decision over = late(state, outlook, rest, state.compute_busy);
        if (over.kind != Decision::Kind::kWait) return over;
        if (state.compute_busy <= kEngineAhead &&
            text < std::max(outlook.left(), outlook.load_time(rest, state.network.robust))) {
            return {Decision::Kind::kText, first, 0,
                    fmt::format("late ({}): the front as text meanwhile", what_is_left(outlook.left()))};
        }
        if (!outlook.wants_transfer()) return {};
        const std::size_t chunk = outlook.last_pending();
        const std::size_t choice = coarsest_level(state.chunks[chunk]);
        return {Decision::Kind::kLoad, chunk, choice,
                fmt::format("late ({}): the coarsest", what_is_left(outlook.left()))};
    }

    static Decision late(const RuleState& state, const Outlook& outlook, const Load& rest, Seconds text) {
        const Prospect prospect = {outlook.load_time(rest, state.network.robust), text};
        return abandon(state, prospect).value_or(Decision{});
    }
};

}  // namespace

std::unique_ptr<Rule> mpc_rule() {
    return std::make_unique<Mpc>();
}

}  // namespace kvcast::streamer
