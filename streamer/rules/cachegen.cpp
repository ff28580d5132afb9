// CacheGen's published streaming adaptation (arXiv 2310.07240), taken at its word:
//
//   throughput = of the previous chunk
//   if prefill of the remaining tokens fits into the remaining time: text
//   else: the finest level with  remaining bytes at that level <= throughput * remaining time
//
// Chunks go one after another, in order; nothing is reconsidered; where no level fits, the coarsest is sent.
// The next chunk is requested when the one before it is whole: its wait for a first byte is in the open, as
// it is in the throughput of the last chunk.
//
// State read: time, deadline, every chunk's status and levels; the last whole transfer's throughput; the
// prefill model and the engine's backlog; transfers in flight.
#include <fmt/format.h>

#include <algorithm>

#include "streamer/rules/rules.h"

namespace kvcast::streamer {
namespace {

class CacheGen final : public Rule {
  public:
    const char* name() const override { return "cachegen"; }

    Decision decide(const RuleState& state) const override {
        if (state.transfers > 0) return {};
        const auto next = std::ranges::find(state.chunks, ChunkStatus::kPending, &ChunkView::status);
        if (next == state.chunks.end()) return {};
        const auto chunk = static_cast<std::size_t>(next - state.chunks.begin());
        const Seconds left = state.deadline - state.now;
        const std::size_t first = next->first_token + next->present;
        const std::size_t tokens = state.chunks.back().first_token + state.chunks.back().tokens - first;
        const Seconds recompute = state.compute->prefill_time(first, tokens) + state.compute_busy;
        if (recompute <= left && state.compute->can_recompute() && left < 1e9) {
            return {Decision::Kind::kText, chunk, 0,
                    fmt::format("recomputing the last {} tokens takes {:.0f} ms, {:.0f} are left", tokens,
                                recompute * 1e3, left * 1e3)};
        }
        const double capacity = state.network.last * std::max(left, 0.0);
        for (std::size_t i = 0; i < next->levels.size(); ++i) {
            if (!next->levels[i].usable) continue;
            const auto bytes = static_cast<double>(remaining_bytes(state, chunk, next->levels[i].level));
            if (bytes <= capacity) {
                return {Decision::Kind::kLoad, chunk, i,
                        fmt::format("{:.0f} kB at level {} fit into {:.0f} ms at {:.1f} MB/s", bytes / 1e3,
                                    next->levels[i].level, left * 1e3, state.network.last / 1e6)};
            }
        }
        const std::size_t choice = coarsest_level(*next);
        if (choice == kNoLevel) return {Decision::Kind::kText, chunk, 0, "no level can be had"};
        return {Decision::Kind::kLoad, chunk, choice, "no level fits: the coarsest"};
    }

  private:
    static std::uint64_t remaining_bytes(const RuleState& state, std::size_t chunk, unsigned level) {
        std::uint64_t bytes = 0;
        for (const ChunkView& c : state.chunks.subspan(chunk)) {
            const std::size_t i = nearest_level(c, level);
            if (c.status == ChunkStatus::kPending && i != kNoLevel) bytes += c.levels[i].bytes;
        }
        return bytes;
    }
};

}  // namespace

std::unique_ptr<Rule> cachegen_rule() {
    return std::make_unique<CacheGen>();
}

}  // namespace kvcast::streamer
