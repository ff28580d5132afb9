// The usual case in registers: bf16, bodies of up to 256 tokens, predicted from the mean. A warp takes two
// channels of a head at once, the two of a pair or two that are not turned, so that all their loads are under
// way together.
#pragma once

#include "kernels/cuda/compiler.cuh"
#include "kernels/cuda/strip_list.h"
#include "kernels/cuda/tile_values.cuh"
#include "kernels/cuda/warp_rans.cuh"

namespace kvcast::kernels::cuda {

__device__ __forceinline__ bool is_short(const EncodePlaneTask& p) {
    return p.source == Dtype::kBf16 && p.body_tokens <= kBatchValues && p.anchor_group == 0;
}

// The channels that duo `index` of a head has: one or two.
struct Duo {
    std::uint32_t channel[2];
    std::uint32_t count;
    std::uint32_t pair;  // that they are, or kNone
};

__device__ __forceinline__ Duo duo_of(const EncodePlaneTask& p, const RotationTask* r, std::uint32_t index) {
    const std::uint32_t pairs = r == nullptr ? 0 : r->pairs;
    if (index < pairs) {
        const Slot slot = slot_of(index, r);
        return {{slot.first, slot.second}, 2, index};
    }
    const std::uint32_t first = pairs + 2 * (index - pairs), slots = slots_of(p.channels, pairs);
    const std::uint32_t second = first + 1 < slots ? first + 1 : first;
    return {{slot_of(first, r).first, slot_of(second, r).first}, second - first + 1, kNone};
}

// Values lane, lane + 32, ... of both channels, turned back; zeros behind the last.
struct DuoValues {
    float of[2][kBatchGroups];

    __device__ __forceinline__ DuoValues(Memory memory, const EncodePlaneTask& p, const RotationTask* r,
                                         std::uint32_t head, const Duo& duo) {
        std::uint32_t bits[2][kBatchGroups];
        KVCAST_UNROLL(2)
        for (unsigned c = 0; c < 2; ++c) {
            const auto* row =
                reinterpret_cast<const std::uint16_t*>(tile_row(memory, p, head, duo.channel[c]));
            KVCAST_UNROLL(8)
            for (std::uint32_t g = 0; g < kBatchGroups; ++g) {
                const std::uint32_t i = g * kLanes + lane_id();
                bits[c][g] = i < p.body_tokens ? row[i] : 0;
            }
        }
        if (duo.pair != kNone) {
            turn_back(bits, p,
                      reinterpret_cast<const SinCos*>(memory.workspace + r->table) +
                          std::uint64_t{duo.pair} * r->columns + p.exact_rows);
            return;
        }
        KVCAST_UNROLL(8)
        for (std::uint32_t g = 0; g < kBatchGroups; ++g) {
            of[0][g] = std::bit_cast<float>(bits[0][g] << 16);
            of[1][g] = std::bit_cast<float>(bits[1][g] << 16);
        }
    }

  private:
    // As turned_back() has it.
    __device__ __forceinline__ void turn_back(const std::uint32_t (&bits)[2][kBatchGroups],
                                              const EncodePlaneTask& p, const SinCos* angles) {
        constexpr float unit = 1.0f / (1 << kTrigBits);
        SinCos angle[kBatchGroups];
        KVCAST_UNROLL(8)
        for (std::uint32_t g = 0; g < kBatchGroups; ++g) {
            const std::uint32_t i = g * kLanes + lane_id();
            angle[g] = i < p.body_tokens ? angles[i] : SinCos{0, 0};
        }
        KVCAST_UNROLL(8)
        for (std::uint32_t g = 0; g < kBatchGroups; ++g) {
            const float x = std::bit_cast<float>(bits[0][g] << 16),
                        y = std::bit_cast<float>(bits[1][g] << 16);
            const float cos = float_of(angle[g].cos), sin = float_of(angle[g].sin);
            of[0][g] = (x * cos + y * sin) * unit;
            of[1][g] = (y * cos - x * sin) * unit;
        }
    }
};

// The sum over all lanes of numbers below 2^48.
__device__ __forceinline__ std::uint64_t sum_of_long(std::uint64_t v) {
    const unsigned low = __reduce_add_sync(kFullWarp, static_cast<unsigned>(v & 0xffffffu));
    const unsigned high = __reduce_add_sync(kFullWarp, static_cast<unsigned>(v >> 24));
    return low + (std::uint64_t{high} << 24);
}

__device__ __forceinline__ std::int32_t sum_of_signed(std::int32_t v) {
    return static_cast<std::int32_t>(__reduce_add_sync(kFullWarp, static_cast<unsigned>(v)));
}

}  // namespace kvcast::kernels::cuda
