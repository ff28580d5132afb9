// The usual case in registers: bf16, bodies of up to 256 tokens, predicted from the mean. A warp takes two
// channels of a head at once, the two of a pair or two that are not turned, so that all their loads are under
// way together, and the same two of several heads one after another.
#pragma once

#include "kernels/cuda/compiler.cuh"
#include "kernels/cuda/strip_list.h"
#include "kernels/cuda/tile_values.cuh"
#include "kernels/cuda/warp_rans.cuh"

namespace kvcast::kernels::cuda {

// Whether a lane's value of group g is one of a channel's. Of most bodies, all groups but the last are whole:
// kMost says that this one is such.
template <bool kMost>
__device__ __forceinline__ bool is_inside(std::uint32_t g, std::uint32_t tokens) {
    return (kMost && g + 1 < kBatchGroups) || g * kLanes + lane_id() < tokens;
}
__device__ __forceinline__ bool is_most_of_a_batch(std::uint32_t tokens) {
    return tokens > kBatchValues - kLanes;
}

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

// Which duo a warp has, and of which heads.
struct DuoRun {
    std::uint32_t index;
    std::uint32_t first_head;
    std::uint32_t end_head;

    __device__ DuoRun(const EncodePlaneTask& p, std::uint32_t item)
        : index(item % duos_of(p)), first_head(item / duos_of(p) * kRunHeads) {
        end_head = first_head + kRunHeads < p.heads ? first_head + kRunHeads : p.heads;
    }
};

// Where a duo's values are, and the angles by which they are turned, which are those of all heads.
template <bool kMost>
class DuoSource {
  public:
    __device__ __forceinline__ DuoSource(Memory memory, const EncodePlaneTask& p, const RotationTask* r,
                                         const Duo& duo)
        : tokens_(p.body_tokens),
          head_stride_(std::uint64_t{p.channels} * p.tile_stride),
          turned_(duo.pair != kNone) {
        KVCAST_UNROLL(2)
        for (unsigned c = 0; c < 2; ++c) {
            rows_[c] =
                reinterpret_cast<const std::uint16_t*>(tile_row(memory, p, 0, duo.channel[c])) + lane_id();
        }
        if (turned_)
            load_angles(reinterpret_cast<const SinCos*>(memory.workspace + r->table) +
                        std::uint64_t{duo.pair} * r->columns + p.exact_rows);
    }

    // Values lane, lane + 32, ... of both channels, turned back; zeros behind the last.
    struct Values {
        float of[2][kBatchGroups];
    };
    __device__ __forceinline__ Values values(std::uint32_t head) const {
        Values v;
        KVCAST_UNROLL(2)
        for (unsigned c = 0; c < 2; ++c) {
            const std::uint16_t* row = rows_[c] + head * head_stride_;
            KVCAST_UNROLL(8)
            for (std::uint32_t g = 0; g < kBatchGroups; ++g) {
                const std::uint32_t bits = is_inside<kMost>(g, tokens_) ? row[g * kLanes] : 0;
                v.of[c][g] = std::bit_cast<float>(bits << 16);
            }
        }
        if (turned_) turn_back(v);
        return v;
    }

  private:
    __device__ __forceinline__ void load_angles(const SinCos* angles) {
        const auto* both = reinterpret_cast<const std::uint32_t*>(angles) + lane_id();
        KVCAST_UNROLL(8)
        for (std::uint32_t g = 0; g < kBatchGroups; ++g)
            angles_[g] = is_inside<kMost>(g, tokens_) ? both[g * kLanes] : 0;
    }

    // As turned_back() has it.
    __device__ __forceinline__ void turn_back(Values& v) const {
        constexpr float unit = 1.0f / (1 << kTrigBits);
        KVCAST_UNROLL(8)
        for (std::uint32_t g = 0; g < kBatchGroups; ++g) {
            const float x = v.of[0][g], y = v.of[1][g];
            const float cos = float_of_low(angles_[g]), sin = float_of_low(angles_[g] >> 16);
            v.of[0][g] = (x * cos + y * sin) * unit;
            v.of[1][g] = (y * cos - x * sin) * unit;
        }
    }

    const std::uint16_t* rows_[2];  // of head 0, at the lane's first value
    std::uint32_t tokens_;
    std::uint64_t head_stride_;
    bool turned_;
    std::uint32_t angles_[kBatchGroups];  // SinCos: the cosine below
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
