// The rules there are. Each lives in a file of its own, with its equations.
#pragma once

#include <memory>
#include <string_view>

#include "codec/format/error.h"
#include "streamer/rules/rule.h"

namespace kvcast::streamer {

// Every chunk at one level, in order; where a chunk lacks it, the next coarser one.
std::unique_ptr<Rule> fixed_level_rule(unsigned level);

// CacheGen's streaming adaptation (arXiv 2310.07240).
std::unique_ptr<Rule> cachegen_rule();

// The finest level whose remaining bytes, and what follows them, fit before the deadline.
std::unique_ptr<Rule> deadline_rule();

// Text from the front and loading from the back until they meet, at as fine a level as the deadline allows.
std::unique_ptr<Rule> two_pointer_rule();

// Robust model predictive control: the least KL that is in time at a rate discounted by its worst recent
// error.
std::unique_ptr<Rule> mpc_rule();

// For engines that accept only a loaded prefix: text is a suffix, all of it or none.
std::unique_ptr<Rule> prefix_only_rule();

// By name: one of kRuleNames, with a level for LEVEL. kBadArgument lists the names.
Result<std::unique_ptr<Rule>> rule_by_name(std::string_view name);
inline constexpr const char* kRuleNames = "two-pointer, mpc, prefix-only, deadline, cachegen or fixed:LEVEL";

}  // namespace kvcast::streamer
