// For engines that accept only a loaded prefix: what is recomputed is a suffix, and begins when all before it
// is in place.
//
// With load() of outlook.h at 0.6 of the robust rate, c_i the prefill of chunk i and T the time left, loading
// m more chunks and recomputing the others takes
//
//   time(m) = load(m) + sum over missing i >= m of c_i
//
// Attention makes c_i grow with i, so that time(m) is concave: its least value is at an end, loading
// everything or nothing more. Hence two plans:
//
//   load   The next pending chunk in order, at the finest level at which everything is in time, or one step
//          finer if that still fits.
//   text   Everything that is missing, if no level is in time at the full rate either, and text is: at the
//          last moment for it (0.97 T), or at once where loading takes more than twice the time left. Where
//          both are late, text if it takes half as long as loading.
//
// Late transfers start over at a coarser level (abandon.h); a single one of them never becomes text. Once a
// chunk is text, for whatever reason, all behind it are.
//
// Source: the layout of prefix caches (vLLM, arXiv 2309.06180; CacheGen's loader, arXiv 2310.07240), which
// hold a context from its start and nothing behind a gap.
//
// State read: time, deadline, every chunk's status, levels and bytes received; robust rate, first byte,
// silence; prefill and decode model, the engine's backlog; transfers in flight.
#include <fmt/format.h>

#include <algorithm>

#include "streamer/rules/abandon.h"
#include "streamer/rules/outlook.h"
#include "streamer/rules/rules.h"

namespace kvcast::streamer {
namespace {

constexpr double kRateMargin = 0.6;   // of the robust rate
constexpr double kTextMargin = 0.97;  // of the time left
constexpr Seconds kGuard = 0.01;      // before the deadline

bool is_text(const ChunkView& c) {
    return c.status == ChunkStatus::kText || c.status == ChunkStatus::kRecomputed;
}

class PrefixOnly final : public Rule {
  public:
    const char* name() const override { return "prefix-only"; }

    Decision decide(const RuleState& state) const override {
        const auto next = std::ranges::find_if(state.chunks, is_missing);
        if (next == state.chunks.end()) return {};
        const auto text = std::ranges::find_if(state.chunks, is_text);
        if (const auto behind = std::find_if(text, state.chunks.end(), is_missing);
            behind != state.chunks.end())
            return {Decision::Kind::kText, index(state, behind), 0, "behind text: only a prefix is loaded"};
        const Outlook outlook(state);
        const LevelLoads loads = loads_from(state, 0);
        for (std::size_t j = 0; j < loads.count; ++j) {
            const Seconds time = load_time(state, outlook, loads, j, kRateMargin);
            if (time <= outlook.left() - kGuard) return load(state, outlook, loads.level[j], time);
        }
        const Seconds coarsest = loads.count == 0 ? outlook.load_time({}, state.network.robust)
                                                  : load_time(state, outlook, loads, loads.count - 1, 1);
        if (const Seconds time = text_time(state); text_is_due(coarsest, time, outlook.left(), kTextMargin)) {
            return {Decision::Kind::kText, index(state, next), 0,
                    fmt::format("loading takes {:.0f} ms, recomputing the rest {:.0f}, {}", coarsest * 1e3,
                                time * 1e3, what_is_left(outlook.left()))};
        }
        constexpr Seconds kNoText = std::numeric_limits<Seconds>::infinity();
        if (auto d = abandon(state, {coarsest, kNoText})) return *d;
        return load(state, outlook, loads.count == 0 ? 255 : loads.level[loads.count - 1], coarsest);
    }

  private:
    static std::size_t index(const RuleState& state, std::span<const ChunkView>::iterator c) {
        return static_cast<std::size_t>(c - state.chunks.begin());
    }

    static Seconds load_time(const RuleState& state, const Outlook& outlook, const LevelLoads& loads,
                             std::size_t j, double margin) {
        const double next = bytes_at(state.chunks[outlook.first_pending()], loads.level[j], j);
        return outlook.load_time({loads.bytes[j], loads.tokens, next}, margin * state.network.robust);
    }

    static Decision load(const RuleState& state, const Outlook& outlook, unsigned level, Seconds time) {
        if (!outlook.any_pending() || !outlook.wants_transfer()) return {};
        const std::size_t chunk = outlook.first_pending();
        const ChunkView& c = state.chunks[chunk];
        std::size_t choice = nearest_level(c, level);
        if (choice == kNoLevel) return {Decision::Kind::kText, chunk, 0, "no level can be had"};
        if (choice > 0 && c.levels[choice - 1].usable) {
            const auto more = static_cast<double>(c.levels[choice - 1].bytes - c.levels[choice].bytes);
            const Seconds finer = time + more / std::max(kRateMargin * state.network.robust, 1.0);
            if (finer <= outlook.left() - kGuard) --choice;
        }
        return {Decision::Kind::kLoad, chunk, choice,
                fmt::format("everything loaded in {:.0f} ms at level {}, {}", time * 1e3, level,
                            what_is_left(outlook.left()))};
    }
};

}  // namespace

std::unique_ptr<Rule> prefix_only_rule() {
    return std::make_unique<PrefixOnly>();
}

}  // namespace kvcast::streamer
