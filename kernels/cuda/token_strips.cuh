// Token strips (FORMAT.md, section 11.2) of one unit, by one warp.
#pragma once

#include "kernels/cuda/compiler.cuh"
#include "kernels/cuda/platform.cuh"
#include "kernels/cuda/tasks.h"

namespace kvcast::kernels::cuda {

inline constexpr std::int32_t kGainLimit = 15;

// Where tokens of a key go: by level and falling gain, and behind them those that are left out.
inline constexpr std::uint32_t kStripKeys = 2 * kLanes;
inline constexpr std::uint32_t kGains = 2 * kGainLimit + 1;
inline constexpr std::uint32_t kLeftOut = kStripKeys - 1;

__device__ inline std::uint32_t strip_key(std::int16_t gain, bool in_tail) {
    return (in_tail ? kGains : 0) + static_cast<std::uint32_t>(kGainLimit - gain);
}

// The sum over the lanes before this one.
__device__ inline std::uint32_t sum_before(std::uint32_t v) {
    std::uint32_t sum = v;
    for (unsigned step = 1; step < kLanes; step *= 2) {
        const std::uint32_t other = __shfl_up_sync(kFullWarp, sum, step);
        if (lane_id() >= step) sum += other;
    }
    return sum - v;
}

// The lanes that have this lane's key.
__device__ inline unsigned lanes_alike(std::uint32_t key) {
    unsigned alike = kFullWarp;
    for (std::uint32_t bit = 1; bit < kStripKeys; bit *= 2) {
        const unsigned set = __ballot_sync(kFullWarp, (key & bit) != 0);
        alike &= (key & bit) != 0 ? set : ~set;
    }
    return alike;
}

// Tokens in the order of their strips. Strips do not cross the end of the first `main` tokens.
struct StripOrder {
    const std::uint32_t* tokens;
    std::uint32_t main;
    std::uint32_t count;
};

// Sorts tokens 0 .. count - 1 by key(token), equal ones in order. `places` is shared memory of the warp for
// kStripKeys numbers, `order` has room for all tokens.
template <typename Key>
__device__ StripOrder sort_tokens(std::uint32_t count, Key key, std::uint32_t* places, std::uint32_t* order) {
    __syncwarp();  // the places of tokens before have been read
    places[lane_id()] = 0;
    places[kLanes + lane_id()] = 0;
    __syncwarp();
    KVCAST_UNROLL(4)
    for (std::uint32_t t = lane_id(); t < count; t += kLanes) atomicAdd(places + key(t), 1u);
    __syncwarp();
    const std::uint32_t even = places[2 * lane_id()], odd = places[2 * lane_id() + 1];
    const std::uint32_t before = sum_before(even + odd);
    __syncwarp();
    places[2 * lane_id()] = before;
    places[2 * lane_id() + 1] = before + even;
    __syncwarp();
    const auto key_of = [&](std::uint32_t token) { return token < count ? key(token) : kLeftOut; };
    std::uint32_t next = key_of(lane_id());
    KVCAST_UNROLL(1)
    for (std::uint32_t first = 0; first < count; first += kLanes) {
        const std::uint32_t token = first + lane_id(), own = next;
        next = key_of(token + kLanes);
        const unsigned alike = lanes_alike(own);
        const std::uint32_t rank = rank_in(alike), place = places[own];
        __syncwarp();  // all have read their places
        if (token < count) order[place + rank] = token;
        if (rank == 0) places[own] = place + static_cast<std::uint32_t>(__popc(alike));
        __syncwarp();
    }
    return {order, places[kGains - 1], places[2 * kGains - 1]};  // where the last of their keys end
}

// A strip: tokens first .. first + count - 1 of the order.
struct StripRange {
    std::uint32_t first;
    std::uint32_t count;
};

__device__ inline StripRange strip_from(const StripOrder& order, std::uint32_t first) {
    const std::uint32_t end = first < order.main ? order.main : order.count;
    return {first, lesser(kLanes, end - first)};
}

// The strip that ends before `end`, which is not 0.
__device__ inline StripRange strip_before(const StripOrder& order, std::uint32_t end) {
    const std::uint32_t begin = end > order.main ? order.main : 0;
    const std::uint32_t first = begin + (end - begin - 1) / kLanes * kLanes;
    return {first, end - first};
}

}  // namespace kvcast::kernels::cuda
