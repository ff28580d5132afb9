// Tiles of stored bits, channel by channel, and the values that they stand for. A tile is [head][channel]
// [body token], rows of EncodePlaneTask::tile_stride elements of the plane's type, in another order where the
// body is short (is_short()), which TileValues does not know. Turning back is cheaper
// than floats in memory: these kernels wait for memory, not for arithmetic.
#pragma once

#include "kernels/cuda/encode_tasks.h"
#include "kernels/cuda/platform.cuh"
#include "kernels/cuda/rows.cuh"
#include "kernels/cuda/warp_rans.cuh"

namespace kvcast::kernels::cuda {

// task_of() by a whole warp, whose lanes look at 32 tasks at once.
template <auto First, typename Task>
__device__ __forceinline__ std::uint32_t task_of_warp(const Task* tasks, std::uint32_t count,
                                                      std::uint32_t item) {
    std::uint32_t low = 0;  // it is one of the `count` tasks from here on
    while (count > 1) {
        const std::uint32_t stride = div_up(count, kLanes), at = lane_id() * stride;
        const bool begun = at < count && tasks[low + at].*First <= item;
        const auto lanes = static_cast<std::uint32_t>(__popc(__ballot_sync(kFullWarp, begun ? 1 : 0)));
        const std::uint32_t passed = (lanes - 1) * stride;
        low += passed;
        count = count - passed < stride ? count - passed : stride;
    }
    return low;
}

// The integer nearest to x, |x| <= 2^22, as round_even() has it, without the slow conversion: the difference
// of a float's bits near 1.5 * 2^23 and of that itself.
inline constexpr float kNearZeroFloat = 12582912.0f;
inline constexpr std::uint32_t kNearZero = std::bit_cast<std::uint32_t>(kNearZeroFloat);
__device__ __forceinline__ std::uint32_t near_bits(float x) {
    return std::bit_cast<std::uint32_t>(x + kNearZeroFloat);
}
__device__ __forceinline__ std::int32_t nearest_integer(float x) {
    return static_cast<std::int32_t>(near_bits(x) - kNearZero);
}

// sum + |a - b|
__device__ __forceinline__ std::uint32_t plus_distance(std::uint32_t sum, std::uint32_t a, std::uint32_t b) {
#ifdef KVCAST_SIMT
    return sum + (a < b ? b - a : a - b);
#else
    return __usad(a, b, sum);
#endif
}

// The same for integers of 16 bits on their way to floats.
__device__ __forceinline__ float float_of(std::int16_t v) {
    const std::uint32_t above = static_cast<std::uint16_t>(v) ^ 0x8000u;  // v + 2^15
    return std::bit_cast<float>(0x4b000000u | above) - 8421376.0f;
}

// Of an integer of 16 bits in the lower half.
__device__ __forceinline__ float float_of_low(std::uint32_t bits) {
    return std::bit_cast<float>((bits & 0xffffu) ^ 0x4b008000u) - 8421376.0f;
}

// What a warp that walks through a plane channel by channel takes in turn: neighbours share a slot, so that
// they find each other's row in the cache.
struct TileChannel {
    std::uint32_t channel;
    std::uint32_t partner;  // of a channel that is turned
    std::uint32_t pair;     // or kNone
    bool second;            // of its pair
};

__device__ __forceinline__ TileChannel tile_channel(std::uint32_t index, const RotationTask* r) {
    if (r == nullptr) return {index, 0, kNone, false};
    if (index >= 2 * r->pairs) return {slot_of(index - r->pairs, r).first, 0, kNone, false};
    const Slot slot = slot_of(index / 2, r);
    const bool second = index % 2 != 0;
    return {second ? slot.second : slot.first, second ? slot.first : slot.second, index / 2, second};
}

__device__ __forceinline__ std::byte* tile_row(Memory memory, const EncodePlaneTask& p, std::uint32_t head,
                                               std::uint32_t channel) {
    return memory.workspace + p.tile +
           (std::uint64_t{head} * p.channels + channel) * p.tile_stride * dtype_bytes(p.source);
}

__device__ __forceinline__ std::uint32_t tile_bits(const std::byte* row, Dtype dtype, std::uint32_t i) {
    return element_of(reinterpret_cast<const std::uint8_t*>(row), dtype, i);
}

// Asks for the beginning of a row, up to 1 KB of it, so that a loop that waits for each load waits once.
__device__ __forceinline__ void expect_row(const std::byte* row, std::uint32_t bytes) {
    constexpr std::uint32_t kSector = 32;
    const std::uint32_t at = threadIdx.x % kLanes * kSector;
#ifndef KVCAST_SIMT
    if (at < bytes) asm volatile("prefetch.global.L1 [%0];" ::"l"(row + at));
#else
    (void)(at < bytes ? row + at : row);
#endif
}

// A channel's values, turned back.
class TileValues {
  public:
    __device__ TileValues(Memory memory, const EncodePlaneTask& p, const RotationTask* r, std::uint32_t head,
                          TileChannel c)
        : own_(tile_row(memory, p, head, c.channel)), dtype_(p.source), sign_(c.second ? 0x80000000u : 0) {
        if (c.pair == kNone) return;
        partner_ = tile_row(memory, p, head, c.partner);
        angles_ = reinterpret_cast<const SinCos*>(memory.workspace + r->table) +
                  std::uint64_t{c.pair} * r->columns + p.exact_rows;
    }

    // As turned_back() has it.
    __device__ float operator()(std::uint32_t i) const {
        const float own = value(own_, i);
        if (angles_ == nullptr) return own;
        constexpr float unit = 1.0f / (1 << kTrigBits);
        const SinCos angle = angles_[i];
        const float sin = std::bit_cast<float>(std::bit_cast<std::uint32_t>(float_of(angle.sin)) ^ sign_);
        return (own * float_of(angle.cos) + value(partner_, i) * sin) * unit;
    }

  private:
    __device__ float value(const std::byte* row, std::uint32_t i) const {
        return from_bits(dtype_, tile_bits(row, dtype_, i));
    }

    const std::byte* own_;
    const std::byte* partner_ = nullptr;
    const SinCos* angles_ = nullptr;
    Dtype dtype_;
    std::uint32_t sign_;  // of the sine
};

}  // namespace kvcast::kernels::cuda
