// Recompute from the front while loading from the back, until the two meet (Cake, arXiv 2410.03065), at as
// fine a level as the deadline allows, and no finer than needed.
//
// With load() of outlook.h at half of the robust throughput, c_i the prefill of chunk i, C what the engine
// has still to do, and T the time left:
//
//   text(p)    = C + sum over pending i < p of c_i
//   load(p, l) = load of all pending i >= p at level l, and of what is in flight
//
// The plan is the finest l for which some p has load(p, l) <= T - 10 ms and text(p) <= 0.97 T, and for it the
// p with the least max(load(p, l), text(p)): where the two meet. load(p, l) falls with p and text(p) grows,
// so that whether l fits at all is asked at the largest p that text allows, and one walk from the front finds
// the meeting point. If no level fits, it is the coarsest. Without a deadline there is no hurry, and no text.
//
// A level is fine enough if its KL is at most  max(0.02 K, 0.6 k),  with K that of the coarsest level and k
// the mean over the tokens that are loaded or on their way; l is never finer than the coarsest such level.
// The first term ends a session when more quality would hardly be noticed. The second keeps levels even: as
// the end comes nearer and the rate turns out to be more than half, ever finer levels fit, but the mean is
// that of the coarse chunks there are already, and bytes do least where they make fine chunks finer.
//
// The plan is made anew at every look:
//   text   The engine is given the plan's first chunk when it is about to be idle. Text that would itself be
//          late is not begun while loading could still be in time (within twice the time left).
//   load   The last pending chunk that is not text, at l; one step finer, if everything still fits and l was
//          not fine enough: so what lies between two levels is used up, chunk by chunk.
//          Where everything would be text, and all that is known of the link was said before, one chunk is
//          loaded that is fine enough: the link may be quicker by now. Not where the answer would come when a
//          third of the time is gone.
//   abandonment   As in abandon.h, where no plan is in time, once something was measured. With nothing
//          pending and the engine about to be idle, the first chunk in flight becomes text too where that
//          ends in half of the time that loading takes at the robust rate: a link that has gone quiet is not
//          waited for.
//
// Text is exact and needs no bytes: meeting, instead of recomputing only what must be, takes 60 % more
// recomputed tokens over the 3G traces of bench/abr, and 5 % off both the mean time and the mean KL. At 0.6
// of the rate, instead of half, Puffer's misses grow by 0.3 points.
//
// State read: time, deadline, every chunk's status, level, levels and bytes received; robust rate, whether it
// was measured, first byte, silence, the calibration's bytes; prefill and decode model, the engine's backlog;
// transfers in flight and how many there may be.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "streamer/rules/abandon.h"
#include "streamer/rules/outlook.h"
#include "streamer/rules/rules.h"

namespace kvcast::streamer {
namespace {

constexpr double kRateMargin = 0.5;     // of the robust rate
constexpr double kTextMargin = 0.97;    // of the time left
constexpr Seconds kGuard = 0.01;        // before the deadline
constexpr Seconds kEngineAhead = 0.03;  // the engine is given more when less than this is left for it
constexpr double kTakeOver = 0.5;       // of the time that what is in flight takes
constexpr double kEnough = 0.02;        // of the coarsest level's KL
constexpr double kEvenly = 0.6;         // of the mean KL so far
constexpr double kProbeWaits = 3;  // waits for a first byte that fit into the time left, where one is tried
constexpr unsigned kCoarsest = 255;

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
    explicit Planner(const RuleState& state) : s_(state), outlook_(state), finest_(fine_enough()) {}

    const Outlook& outlook() const { return outlook_; }
    double careful_rate() const { return kRateMargin * s_.network.robust; }
    unsigned finest() const { return finest_; }  // no plan's level is finer

    Plan best() const {
        const std::size_t reach =
            std::min(text_reach(kTextMargin * outlook_.left()), outlook_.last_pending());
        const LevelLoads loads = loads_from(s_, reach);
        for (std::size_t j = 0; j < loads.count; ++j) {
            if (loads.level[j] < finest_) continue;
            const Load load = {loads.bytes[j], loads.tokens, next_bytes(loads.level[j])};
            if (outlook_.load_time(load, careful_rate()) <= load_left())
                return meeting(loads.level[j], careful_rate());
        }
        return meeting(coarsest(), careful_rate());
    }
    // Of the chunk that is requested next.
    unsigned coarsest() const {
        if (!outlook_.any_pending()) return kCoarsest;
        const ChunkView& c = s_.chunks[outlook_.last_pending()];
        const std::size_t i = coarsest_level(c);
        return i == kNoLevel ? kCoarsest : c.levels[i].level;
    }

    // The least text with which everything at this level is in time; else the one whose later end is
    // earliest.
    Plan meeting(unsigned level, double rate) const {
        const std::size_t hint = index_of(level);
        Load load;
        load.next_bytes = next_bytes(level);
        for (const ChunkView& c : s_.chunks) {
            if (c.status != ChunkStatus::kPending) continue;
            load.bytes += bytes_at(c, level, hint);
            load.tokens += c.tokens;
        }
        Plan best, here;
        here.level = level;
        here.text = s_.compute_busy;
        for (std::size_t p = 0;; ++p) {
            here.text_end = p;
            here.load = outlook_.load_time(load, rate);
            here.in_time = here.load <= load_left() && (p == 0 || here.text <= kTextMargin * outlook_.left());
            if (p == 0 || here.later() < best.later()) best = here;
            const bool met =
                here.text > here.load || !s_.compute->can_recompute() || std::isinf(outlook_.left());
            if (met || p == s_.chunks.size()) return best;
            const ChunkView& c = s_.chunks[p];
            if (c.status != ChunkStatus::kPending) continue;
            load.bytes -= bytes_at(c, level, hint);
            load.tokens -= c.tokens;
            here.text += s_.compute->prefill_time(c);
        }
    }

    // Pending chunks before this index can be recomputed within `budget`.
    std::size_t text_reach(Seconds budget) const {
        if (!s_.compute->can_recompute()) return 0;
        Seconds text = s_.compute_busy;
        for (std::size_t p = 0; p < s_.chunks.size(); ++p) {
            const ChunkView& c = s_.chunks[p];
            if (c.status == ChunkStatus::kPending) text += s_.compute->prefill_time(c);
            if (text > budget) return p;
        }
        return s_.chunks.size();
    }

    Seconds load_left() const { return outlook_.left() - kGuard; }

  private:
    // The coarsest level of the next chunk that is fine enough; 0 where none is, and without a deadline.
    unsigned fine_enough() const {
        if (!outlook_.any_pending() || std::isinf(outlook_.left())) return 0;
        const ChunkView& c = s_.chunks[outlook_.last_pending()];
        const std::size_t coarsest = coarsest_level(c);
        if (coarsest == kNoLevel) return 0;
        const double enough = std::max(kEnough * c.levels[coarsest].kl, kEvenly * mean_kl());
        for (std::size_t i = coarsest + 1; i-- > 0;) {
            if (c.levels[i].usable && c.levels[i].kl <= enough) return c.levels[i].level;
        }
        return 0;
    }
    // Of the tokens that are loaded or on their way; 0 where there are none.
    double mean_kl() const {
        double kl = 0, tokens = 0;
        for (const ChunkView& c : s_.chunks) {
            const bool loaded = c.status == ChunkStatus::kLoading || c.status == ChunkStatus::kDecoding ||
                                c.status == ChunkStatus::kReady;
            if (!loaded) continue;
            kl += c.levels[c.choice].kl * static_cast<double>(c.tokens);
            tokens += static_cast<double>(c.tokens);
        }
        return tokens > 0 ? kl / tokens : 0;
    }

    double next_bytes(unsigned level) const {
        return outlook_.any_pending() ? bytes_at(s_.chunks[outlook_.last_pending()], level, kNoLevel) : 0;
    }
    // In the chunk that is requested next; most others have the same levels.
    std::size_t index_of(unsigned level) const {
        return outlook_.any_pending() ? nearest_level(s_.chunks[outlook_.last_pending()], level) : kNoLevel;
    }

    const RuleState& s_;
    Outlook outlook_;
    unsigned finest_ = 0;
};

class TwoPointer final : public Rule {
  public:
    const char* name() const override { return "two-pointer"; }

    Decision decide(const RuleState& state) const override {
        const Planner planner(state);
        const Plan plan = planner.best();
        if (!plan.in_time && planner.outlook().any_in_flight() && !is_hearsay(state)) {
            const Plan frank = planner.meeting(planner.coarsest(), state.network.robust);
            if (auto d = abandon(state, {frank.load, frank.text})) return *d;
        }
        if (!planner.outlook().any_pending()) return take_over(state, planner).value_or(Decision{});
        if (auto d = next_text(state, planner, plan)) return *d;
        if (!planner.outlook().wants_transfer()) return {};
        return next_load(state, planner, plan);
    }

  private:
    static std::optional<Decision> next_text(const RuleState& state, const Planner& planner,
                                             const Plan& plan) {
        const std::size_t chunk = planner.outlook().first_pending();
        const Seconds left = planner.outlook().left();
        std::size_t end = plan.text_end;
        if (plan.later() <= kHope * left) end = std::min(end, planner.text_reach(left));
        if (chunk >= end || engine_is_fed(state, chunk)) return std::nullopt;
        return Decision{
            Decision::Kind::kText, chunk, 0,
            fmt::format("chunks before {} recomputed in {:.0f} ms, the others loaded in {:.0f}, {}",
                        plan.text_end, plan.text * 1e3, plan.load * 1e3, what_is_left(left))};
    }

    static std::optional<Decision> take_over(const RuleState& state, const Planner& planner) {
        const auto c = std::ranges::find(state.chunks, ChunkStatus::kLoading, &ChunkView::status);
        const Seconds left = planner.outlook().left();
        if (c == state.chunks.end() || !state.compute->can_recompute() || std::isinf(left))
            return std::nullopt;
        const auto chunk = static_cast<std::size_t>(c - state.chunks.begin());
        const Seconds load = planner.outlook().load_time({}, state.network.robust);
        const Seconds text = state.compute_busy + state.compute->prefill_time(*c);
        if (text > kTakeOver * load || engine_is_fed(state, chunk)) return std::nullopt;
        return Decision{Decision::Kind::kText, chunk, 0,
                        fmt::format("what is in flight takes {:.0f} ms: recomputed in {:.0f}, {}", load * 1e3,
                                    text * 1e3, what_is_left(left))};
    }

    // Everything would be text: one chunk shows whether the link is as slow as it was said to be.
    static Decision probe(const RuleState& state, const Planner& planner, std::size_t chunk) {
        const std::size_t choice = nearest_level(state.chunks[chunk], planner.finest());
        const auto behind = state.chunks.subspan(chunk + 1);
        const bool tried = std::ranges::any_of(
            behind, [](const ChunkView& c) { return c.status == ChunkStatus::kText && !c.levels.empty(); });
        const bool needless =
            !is_hearsay(state) || planner.outlook().any_in_flight() || state.other_bytes > 0;
        const bool risky = kProbeWaits * state.network.first_byte > planner.outlook().left();
        if (tried || needless || risky || choice == kNoLevel) return {};
        return {Decision::Kind::kLoad, chunk, choice, "one chunk, to see what the link brings"};
    }

    // Text behind that chunk does not keep the engine busy: it waits for the chunk itself.
    static bool engine_is_fed(const RuleState& state, std::size_t chunk) {
        const auto before = state.chunks.first(chunk);
        const bool text = std::ranges::find(before, ChunkStatus::kText, &ChunkView::status) != before.end();
        return text && state.compute_busy > kEngineAhead;
    }

    // All that is known of the link is what was said of it before.
    static bool is_hearsay(const RuleState& state) {
        return !state.network.measured && state.network.silence == 0;
    }

    static Decision next_load(const RuleState& state, const Planner& planner, const Plan& plan) {
        const bool from_the_back = state.compute->can_recompute();
        const std::size_t chunk =
            from_the_back ? planner.outlook().last_pending() : planner.outlook().first_pending();
        const ChunkView& c = state.chunks[chunk];
        if (chunk < plan.text_end) return probe(state, planner, chunk);
        std::size_t choice = nearest_level(c, plan.level);
        if (choice == kNoLevel) return {Decision::Kind::kText, chunk, 0, "no level can be had"};
        Seconds load = plan.load;
        if (plan.in_time && choice > 0 && c.levels[choice - 1].usable &&
            c.levels[choice - 1].level >= planner.finest()) {
            const auto more = static_cast<double>(c.levels[choice - 1].bytes - c.levels[choice].bytes);
            const Seconds finer = plan.load + more / planner.careful_rate();
            if (finer <= planner.load_left()) {
                --choice;
                load = finer;
            }
        }
        return {Decision::Kind::kLoad, chunk, choice,
                fmt::format("{} {:.0f} ms at {:.1f} MB/s, {}{}",
                            plan.text_end == 0 ? "all loaded in" : "all but text loaded in", load * 1e3,
                            planner.careful_rate() / 1e6, what_is_left(planner.outlook().left()),
                            plan.in_time ? "" : ": late")};
    }
};

}  // namespace

std::unique_ptr<Rule> two_pointer_rule() {
    return std::make_unique<TwoPointer>();
}

}  // namespace kvcast::streamer
