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

// As little text from the front, and as fine a level for what is loaded from the back, as the deadline
// allows.
std::unique_ptr<Rule> two_pointer_rule();

// By name: "two-pointer", "deadline", "cachegen", "fixed:N". kBadArgument lists the names.
Result<std::unique_ptr<Rule>> rule_by_name(std::string_view name);

}  // namespace kvcast::streamer
