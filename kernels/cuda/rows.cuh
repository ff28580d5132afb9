// Rows of a plane, contiguous or paged, and the slots that a head's channels form.
#pragma once

#include "kernels/cuda/platform.cuh"
#include "kernels/cuda/tasks.h"

namespace kvcast::kernels::cuda {

// Token `token` of the chunk, head 0.
__device__ __forceinline__ std::uint8_t* row_of(const RowsAt& out, std::uint32_t token) {
    if (out.pages == nullptr) return out.rows + token * out.row_bytes;
    const std::uint32_t s = out.slot + token;
    return out.rows + static_cast<std::uint64_t>(out.pages[s / out.page_tokens]) * out.page_bytes +
           s % out.page_tokens * out.row_bytes;
}

// An element of a row, in the low bits.
__device__ __forceinline__ std::uint32_t element_of(const std::uint8_t* row, Dtype dtype,
                                                    std::uint32_t channel) {
    if (dtype == Dtype::kF32) return reinterpret_cast<const std::uint32_t*>(row)[channel];
    return reinterpret_cast<const std::uint16_t*>(row)[channel];
}

// The channels of a slot: pairs first, then the channels that are not turned.
struct Slot {
    std::uint32_t first;
    std::uint32_t second;  // of a pair
    bool pair;
};

__device__ __forceinline__ Slot slot_of(std::uint32_t index, const RotationTask* r) {
    if (r == nullptr) return {index, 0, false};
    if (index < r->pairs) {
        const std::uint32_t first = r->first_channel + index * r->pair_step;
        return {first, first + r->partner, true};
    }
    const std::uint32_t single = index - r->pairs;
    return {single < r->first_channel ? single : single + 2 * r->pairs, 0, false};
}

// A pair of elements before RoPE turned them: products first, every operation rounded, as CPUs do it.
struct TurnedBack {
    float a;
    float b;
};

__device__ __forceinline__ TurnedBack turned_back(float x, float y, SinCos angle) {
    constexpr float unit = 1.0f / (1 << kTrigBits);
    const auto cos = static_cast<float>(angle.cos), sin = static_cast<float>(angle.sin);
    return {(x * cos + y * sin) * unit, (y * cos - x * sin) * unit};
}

}  // namespace kvcast::kernels::cuda
