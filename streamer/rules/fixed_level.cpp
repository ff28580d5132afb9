// Every chunk at one level, in order; where a chunk lacks it, at the nearest coarser one, else at its
// coarsest. What people ask for who know what they want, and a baseline.
//
// State read: every chunk's status and levels; robust rate, first byte and transfers in flight, for whether
// another one may start.
#include <fmt/format.h>

#include <algorithm>

#include "streamer/rules/outlook.h"
#include "streamer/rules/rules.h"

namespace kvcast::streamer {
namespace {

class FixedLevel final : public Rule {
  public:
    explicit FixedLevel(unsigned level) : level_(level) {}
    const char* name() const override { return "fixed"; }

    Decision decide(const RuleState& state) const override {
        if (!Outlook(state).wants_transfer()) return {};
        const auto next = std::ranges::find(state.chunks, ChunkStatus::kPending, &ChunkView::status);
        if (next == state.chunks.end()) return {};
        const auto chunk = static_cast<std::size_t>(next - state.chunks.begin());
        const std::size_t choice = nearest_level(*next, level_);
        if (choice == kNoLevel) return {Decision::Kind::kText, chunk, 0, "no level can be had"};
        return {Decision::Kind::kLoad, chunk, choice, fmt::format("level {} was asked for", level_)};
    }
    bool may_load(const ChunkView& chunk, std::size_t choice, Seconds) const override {
        return choice == nearest_level(chunk, level_);
    }

  private:
    unsigned level_;
};

}  // namespace

std::unique_ptr<Rule> fixed_level_rule(unsigned level) {
    return std::make_unique<FixedLevel>(level);
}

}  // namespace kvcast::streamer
