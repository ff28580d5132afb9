// When a request that failed is tried again. Pure.
#pragma once

#include <cstddef>
#include <optional>
#include <random>

#include "streamer/transport.h"

namespace kvcast::streamer {

struct RetryPolicy {
    std::size_t attempts = 5;                              // in all, since bytes last came in quantity
    Duration first_delay = std::chrono::milliseconds(50);  // doubles each time
    Duration longest_delay = std::chrono::seconds(2);
    Duration longest_retry_after = std::chrono::seconds(30);  // a server that asks for more is given up
};

// Whether another attempt at the same URL may end differently.
bool worth_retrying(const HttpResult& result);

// How long to wait before attempt number `attempt` (1: the first repetition): exponential with full jitter in
// its upper half, or what the server asked for; nothing where it is not worth it.
std::optional<Duration> retry_delay(const RetryPolicy& policy, std::size_t attempt, const HttpResult& failure,
                                    std::mt19937_64& random);

}  // namespace kvcast::streamer
