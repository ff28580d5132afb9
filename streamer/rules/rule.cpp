#include "streamer/rules/rule.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>

#include "streamer/rules/rules.h"

namespace kvcast::streamer {
namespace {

double speed_at(const std::vector<PrefillSpeed>& points, double position) {
    const auto above = std::ranges::find_if(
        points, [&](const PrefillSpeed& p) { return static_cast<double>(p.position) >= position; });
    if (above == points.begin()) return points.front().tokens_per_second;
    if (above == points.end()) return points.back().tokens_per_second;
    const PrefillSpeed& below = *(above - 1);
    const double part = (position - static_cast<double>(below.position)) /
                        static_cast<double>(above->position - below.position);
    return below.tokens_per_second + part * (above->tokens_per_second - below.tokens_per_second);
}

}  // namespace

// The speed at the middle of the range stands for all of it: exact where time per token grows linearly with
// position, as attention makes it.
Seconds ComputeModel::prefill_time(std::size_t first_token, std::size_t tokens) const {
    if (tokens == 0) return 0;
    if (prefill.empty()) return std::numeric_limits<Seconds>::infinity();
    const double count = static_cast<double>(tokens);
    return count / speed_at(prefill, static_cast<double>(first_token) + count / 2);
}

Seconds ComputeModel::decode_time(std::size_t tokens) const {
    return static_cast<double>(tokens * bytes_per_token) / decode_bytes_per_second;
}

std::size_t nearest_level(const ChunkView& chunk, unsigned level) {
    for (std::size_t i = 0; i < chunk.levels.size(); ++i) {
        if (chunk.levels[i].usable && chunk.levels[i].level >= level) return i;
    }
    return coarsest_level(chunk);
}

bool Rule::may_load(const ChunkView& chunk, std::size_t choice, Seconds deadline) const {
    return std::isinf(deadline) ? choice == nearest_level(chunk, 0) : chunk.levels[choice].usable;
}

std::size_t coarsest_level(const ChunkView& chunk) {
    for (std::size_t i = chunk.levels.size(); i-- > 0;) {
        if (chunk.levels[i].usable) return i;
    }
    return kNoLevel;
}

Result<std::unique_ptr<Rule>> rule_by_name(std::string_view name) {
    if (name == "two-pointer") return two_pointer_rule();
    if (name == "mpc") return mpc_rule();
    if (name == "prefix-only") return prefix_only_rule();
    if (name == "deadline") return deadline_rule();
    if (name == "cachegen") return cachegen_rule();
    if (name.starts_with("fixed:")) {
        unsigned level = 0;
        const std::string_view digits = name.substr(6);
        const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), level);
        if (error == std::errc() && end == digits.data() + digits.size() && level <= 255)
            return fixed_level_rule(level);
    }
    return Status(ErrorCode::kBadArgument, fmt::format("unknown policy '{}', expected {}", name, kRuleNames));
}

}  // namespace kvcast::streamer
