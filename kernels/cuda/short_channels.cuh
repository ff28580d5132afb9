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
class DuoSource {
  public:
    __device__ __forceinline__ DuoSource(Memory memory, const EncodePlaneTask& p, const RotationTask* r,
                                         const Duo& duo)
        : head_pieces_(std::uint64_t{p.channels} * (kBatchValues / kBatchGroups)),
          turned_(uniform(duo.pair != kNone ? 1 : 0) != 0) {
        KVCAST_UNROLL(2)
        for (unsigned c = 0; c < 2; ++c)
            rows_[c] = reinterpret_cast<const uint4*>(tile_row(memory, p, 0, duo.channel[c])) + lane_id();
        if (turned_)
            load_angles(reinterpret_cast<const SinCos*>(memory.workspace + r->table) +
                        std::uint64_t{duo.pair} * r->columns + p.exact_rows);
    }

    // Stored bits of both channels: the lane's values 2 k and 2 k + 1 are word k. Zeros behind the last.
    struct Stored {
        uint4 of[2];
    };
    __device__ __forceinline__ Stored stored(std::uint32_t head) const {
        return {{__ldg(rows_[0] + head * head_pieces_), __ldg(rows_[1] + head * head_pieces_)}};
    }

    // Values lane, lane + 32, ... of both channels, turned back, times kTurnedUnit where turned(); zeros
    // behind the last.
    struct Values {
        float of[2][kBatchGroups];
    };
    static constexpr float kTurnedUnit = 1 << kTrigBits;
    __device__ __forceinline__ bool turned() const { return turned_; }
    __device__ __forceinline__ Values long_values(const Stored& stored) const {
        Values v;
        KVCAST_UNROLL(2)
        for (unsigned c = 0; c < 2; ++c) {
            const std::uint32_t pairs[] = {stored.of[c].x, stored.of[c].y, stored.of[c].z, stored.of[c].w};
            KVCAST_UNROLL(4)
            for (std::uint32_t k = 0; k < kBatchGroups / 2; ++k) {
                v.of[c][2 * k] = std::bit_cast<float>(pairs[k] << 16);
                v.of[c][2 * k + 1] = std::bit_cast<float>(pairs[k] & 0xffff0000u);
            }
        }
        if (turned_) turn_back(v);
        return v;
    }

    // The values themselves.
    __device__ __forceinline__ Values values(const Stored& stored) const {
        Values v = long_values(stored);
        if (!turned_) return v;
        KVCAST_UNROLL(8)
        for (std::uint32_t g = 0; g < kBatchGroups; ++g) {
            v.of[0][g] *= 1 / kTurnedUnit;
            v.of[1][g] *= 1 / kTurnedUnit;
        }
        return v;
    }

  private:
    // Some may lie behind the last: they turn zeros.
    __device__ __forceinline__ void load_angles(const SinCos* angles) {
        const auto* both = reinterpret_cast<const std::uint32_t*>(angles) + lane_id();
        KVCAST_UNROLL(8)
        for (std::uint32_t g = 0; g < kBatchGroups; ++g) angles_[g] = __ldg(both + g * kLanes);
    }

    // As turned_back() has it, but for its unit.
    __device__ __forceinline__ void turn_back(Values& v) const {
        KVCAST_UNROLL(8)
        for (std::uint32_t g = 0; g < kBatchGroups; ++g) {
            const float x = v.of[0][g], y = v.of[1][g];
            const float cos = float_of_low(angles_[g]), sin = float_of_low(angles_[g] >> 16);
            v.of[0][g] = x * cos + y * sin;
            v.of[1][g] = y * cos - x * sin;
        }
    }

    const uint4* rows_[2];  // of head 0, at the lane's first value
    std::uint64_t head_pieces_;
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
