#include "streamer/retry.h"

#include <algorithm>

namespace kvcast::streamer {

bool worth_retrying(const HttpResult& result) {
    switch (result.status.code()) {
        case ErrorCode::kOk:
        case ErrorCode::kHttpStatus:
            return result.http_status == 408 || result.http_status == 425 || result.http_status == 429 ||
                   result.http_status == 500 || (result.http_status >= 502 && result.http_status <= 504);
        case ErrorCode::kNetwork:
        case ErrorCode::kTimeout:
        case ErrorCode::kProtocol:
            return true;
        default:
            return false;
    }
}

std::optional<Duration> retry_delay(const RetryPolicy& policy, std::size_t attempt, const HttpResult& failure,
                                    std::mt19937_64& random) {
    if (attempt >= policy.attempts || !worth_retrying(failure)) return std::nullopt;
    if (failure.retry_after) {
        if (*failure.retry_after > policy.longest_retry_after) return std::nullopt;
        return std::max(*failure.retry_after, policy.first_delay);
    }
    const std::size_t doublings = std::min<std::size_t>(attempt - 1, 30);
    const double ceiling =
        std::min(to_seconds(policy.first_delay) * static_cast<double>(std::uint64_t{1} << doublings),
                 to_seconds(policy.longest_delay));
    return from_seconds(ceiling * std::uniform_real_distribution<double>(0.5, 1)(random));
}

}  // namespace kvcast::streamer
