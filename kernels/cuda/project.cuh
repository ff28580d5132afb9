// Products of features and matrices on the tensor cores, as a block of threads makes them: 64 tokens x 192
// outputs, a warp 24 of the outputs, inputs by steps of 32. FORMAT.md, section 11.3.
//
// Features lie in shared memory: as fragments in limbs of 8 bits, or as rows that a warp splits into limbs as
// it loads them. Matrices come from global memory in the order of their fragments (kernels/cuda/limbs.h),
// each to one warp, some steps ahead of their use. Sums are exact: limb by limb in 32 bits, together modulo
// 2^32, and the calibration's reader bounds every row's norm so that the whole fits.
#pragma once

#include "kernels/cuda/copy.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/platform.cuh"
#include "kernels/cuda/warp_rans.cuh"

namespace kvcast::kernels::cuda {

inline constexpr std::uint32_t kTokenTiles = kProjectTokens / 16;
inline constexpr std::uint32_t kOutputTiles = kWarpOutputs / 8;
inline constexpr std::uint32_t kProjectThreads = kProjectOutputs / kWarpOutputs * kLanes;
inline constexpr std::uint32_t kStepsAhead = 3;

// Where a warp's products lie in the block's.
struct WarpPlace {
    std::uint32_t output;

    // Of the token tile m, output tile n, sum i of this lane.
    __device__ std::uint32_t token_of(std::uint32_t m, std::uint32_t i) const {
        return 16 * m + lane_id() / 4 + i / 2 * 8;
    }
    __device__ std::uint32_t output_of(std::uint32_t n, std::uint32_t i) const {
        return output + 8 * n + lane_id() % 4 * 2 + i % 2;
    }
};

__device__ __forceinline__ WarpPlace warp_place() {
    return {threadIdx.x / kLanes * kWarpOutputs};
}

// 16 tokens x 32 features, limb by limb.
struct Features {
    FragmentA high;
    FragmentA low;
};

// 16-bit features in shared memory. The pitch in bytes is 32 or 96 modulo 128, so that a fragment's words lie
// in all banks.
struct WideRows {
    static constexpr bool kTwoLimbs = true;
    const std::byte* rows;
    std::uint32_t pitch;  // bytes

    __device__ Features load(std::uint32_t token, std::uint32_t step) const {
        Features f;
        for (std::uint32_t i = 0; i < 4; ++i) {
            const std::byte* at = rows + (token + lane_id() / 4 + i % 2 * 8) * pitch +
                                  (step * kUnitStep + i / 2 * 16 + lane_id() % 4 * 4) * sizeof(std::int16_t);
            const auto four = *reinterpret_cast<const unsigned long long*>(at);
            const auto first = static_cast<std::uint32_t>(four),
                       second = static_cast<std::uint32_t>(four >> 32);
            f.high.r[i] = __byte_perm(first, second, 0x7531);
            f.low.r[i] = __byte_perm(first, second, 0x6420);
        }
        return f;
    }
};

// 16 bytes that a lane takes at once: its part of a fragment of 16 tokens x 32 features.
__device__ __forceinline__ FragmentA load_fragment(const std::byte* fragments, std::uint32_t index) {
    const uint4 v = *reinterpret_cast<const uint4*>(fragments + (index * kLanes + lane_id()) * sizeof(uint4));
    return {{v.x, v.y, v.z, v.w}};
}

// 16-bit features that lie in shared memory as fragments, [token / 16][step][limb].
struct SplitRows {
    static constexpr bool kTwoLimbs = true;
    const std::byte* fragments;
    std::uint32_t steps;

    __device__ Features load(std::uint32_t token, std::uint32_t step) const {
        const std::uint32_t index = (token / 16 * steps + step) * 2;
        return {load_fragment(fragments, index), load_fragment(fragments, index + 1)};
    }

    // Two neighbouring features of a token, the first one's number being even.
    static __device__ void put(std::byte* fragments, std::uint32_t steps, std::uint32_t token,
                               std::uint32_t feature, std::uint32_t pair) {
        std::byte* at = fragments + (token / 16 * steps + feature / kUnitStep) * 2 * kLanes * sizeof(uint4) +
                        fragment_place(token, feature);
        *reinterpret_cast<std::uint16_t*>(at + kLanes * sizeof(uint4)) =
            static_cast<std::uint16_t>(__byte_perm(pair, 0, 0x4420));
        *reinterpret_cast<std::uint16_t*>(at) = static_cast<std::uint16_t>(__byte_perm(pair, 0, 0x4431));
    }

    // Where a feature's byte is in its fragment.
    static __device__ std::uint32_t fragment_place(std::uint32_t token, std::uint32_t feature) {
        const std::uint32_t lane = token % 8 * 4 + feature % 16 / 4;
        return lane * 16 + (token % 16 / 8 + feature % kUnitStep / 16 * 2) * 4 + feature % 4;
    }
};

// Features of 8 bits as fragments, [token / 16][step].
struct NarrowRows {
    static constexpr bool kTwoLimbs = false;
    const std::byte* fragments;
    std::uint32_t steps;

    __device__ Features load(std::uint32_t token, std::uint32_t step) const {
        return {{}, load_fragment(fragments, token / 16 * steps + step)};
    }

    static __device__ void put(std::byte* fragments, std::uint32_t steps, std::uint32_t token,
                               std::uint32_t feature, std::int16_t value) {
        fragments[(token / 16 * steps + feature / kUnitStep) * kLanes * sizeof(uint4) +
                  SplitRows::fragment_place(token, feature)] = static_cast<std::byte>(value);
    }
};

// One limb of a matrix, as a warp reads it: the fragments of its outputs.
struct LimbFragments {
    const std::uint8_t* first;  // of the warp's first output tile at step 0, this lane's bytes
    std::uint32_t tile_bytes;   // from output tile to output tile
    std::uint32_t step_bytes;   // from step to step

    __device__ LimbFragments(const ProjectionTerm& term, std::uint32_t limb, std::uint32_t width,
                             std::uint32_t output)
        : tile_bytes(term.limbs * kFragmentBytes), step_bytes(limb_tiles(width) * tile_bytes) {
        first = term.matrix + output / 8 * tile_bytes + limb * kFragmentBytes + lane_id() * 8;
    }

    struct Step {
        FragmentB tiles[kOutputTiles];
    };
    __device__ Step load(std::uint32_t step) const {
        Step s;
        for (std::uint32_t n = 0; n < kOutputTiles; ++n) {
            const auto bytes = __ldg(reinterpret_cast<const unsigned long long*>(
                first + std::uint64_t{step} * step_bytes + n * tile_bytes));
            s.tiles[n] = {{static_cast<std::uint32_t>(bytes), static_cast<std::uint32_t>(bytes >> 32)}};
        }
        return s;
    }
};

// One value for each of a warp's outputs.
template <typename T>
struct ByOutput {
    T v[kOutputTiles][2];

    __device__ ByOutput(const T* values, const WarpPlace& at, std::uint32_t first_output,
                        std::uint32_t width) {
        for (std::uint32_t n = 0; n < kOutputTiles; ++n) {
            for (std::uint32_t i = 0; i < 2; ++i) {
                const std::uint32_t output = first_output + at.output_of(n, i);
                v[n][i] = output < width ? __ldg(values + output) : T{4};
            }
        }
    }
};
using Shifts = ByOutput<std::uint8_t>;

// A warp's sums of limb products of one term, and the half that rounds them.
struct LimbSums {
    Sums high[kTokenTiles][kOutputTiles];  // count 2^8
    Sums low[kTokenTiles][kOutputTiles];

    // Before the only limb of a matrix; before the first one of two, `rounded` is false.
    __device__ LimbSums(const Shifts& shifts, bool rounded) {
        for_all([&](std::uint32_t m, std::uint32_t n, std::uint32_t i) {
            high[m][n].r[i] = 0;
            low[m][n].r[i] = rounded ? half(shifts, n, i) : 0;
        });
    }

    // What there is now counts 2^8: it was the matrix's higher limb.
    __device__ void fold(const Shifts& shifts) {
        for_all([&](std::uint32_t m, std::uint32_t n, std::uint32_t i) {
            high[m][n].r[i] = total(m, n, i);
            low[m][n].r[i] = half(shifts, n, i);
        });
    }
    __device__ std::int32_t total(std::uint32_t m, std::uint32_t n, std::uint32_t i) const {
        return static_cast<std::int32_t>((static_cast<std::uint32_t>(high[m][n].r[i]) << 8) +
                                         static_cast<std::uint32_t>(low[m][n].r[i]));
    }

  private:
    static __device__ std::int32_t half(const Shifts& shifts, std::uint32_t n, std::uint32_t i) {
        return 1 << (shifts.v[n][i % 2] - 1);
    }
    template <typename Work>
    static __device__ __forceinline__ void for_all(Work work) {
        for (std::uint32_t m = 0; m < kTokenTiles; ++m) {
            for (std::uint32_t n = 0; n < kOutputTiles; ++n) {
                for (std::uint32_t i = 0; i < 4; ++i) work(m, n, i);
            }
        }
    }
};

template <bool SignedMatrix, bool TwoLimbs>
__device__ __forceinline__ void multiply_step(const Features& f, const LimbFragments::Step& matrix,
                                              std::uint32_t m, LimbSums& sums) {
    for (std::uint32_t n = 0; n < kOutputTiles; ++n) {
        if constexpr (TwoLimbs) {
            multiply_add<true, SignedMatrix>(sums.high[m][n], f.high, matrix.tiles[n]);
            multiply_add<false, SignedMatrix>(sums.low[m][n], f.low, matrix.tiles[n]);
        } else {
            multiply_add<true, SignedMatrix>(sums.low[m][n], f.low, matrix.tiles[n]);
        }
    }
}

// Takes the lowest bit out.
__device__ __forceinline__ std::uint32_t take_bit(std::uint32_t& bits) {
    const std::uint32_t lowest = static_cast<std::uint32_t>(__ffs(static_cast<int>(bits))) - 1;
    bits &= bits - 1;
    return lowest;
}

// The steps of `todo`, bit by bit, of one limb of a matrix; step 0 of the rows is its step `first_step`. Made
// well before it is used, its first loads are no wait; it loads on while it is used.
class MatrixSteps {
  public:
    __device__ MatrixSteps(const LimbFragments& matrix, std::uint32_t first_step, std::uint32_t todo)
        : matrix_(matrix), first_step_(first_step), todo_(todo), to_load_(todo) {
        KVCAST_UNROLL(kStepsAhead)
        for (std::uint32_t i = 0; i < kStepsAhead; ++i) load(ahead_[i]);
    }

    template <bool SignedMatrix, typename Rows>
    __device__ __forceinline__ void multiply(const Rows& rows, LimbSums& sums) {
        while (todo_ != 0) {
            KVCAST_UNROLL(kStepsAhead)  // so that ahead_ lies in registers
            for (std::uint32_t i = 0; i < kStepsAhead; ++i) {
                if (todo_ == 0) break;
                const std::uint32_t step = take_bit(todo_);
                for (std::uint32_t m = 0; m < kTokenTiles; ++m)
                    multiply_step<SignedMatrix, Rows::kTwoLimbs>(rows.load(16 * m, step), ahead_[i], m, sums);
                load(ahead_[i]);
            }
        }
    }

  private:
    // Behind the last step it loads that one again: a load that may be left out would go to other registers,
    // and be waited for where it is copied.
    __device__ __forceinline__ void load(LimbFragments::Step& s) {
        if (to_load_ != 0) last_ = take_bit(to_load_);
        s = matrix_.load(first_step_ + last_);
    }

    LimbFragments matrix_;
    std::uint32_t first_step_;
    std::uint32_t todo_;
    std::uint32_t to_load_;
    std::uint32_t last_ = 0;
    LimbFragments::Step ahead_[kStepsAhead];
};

// Bits for `steps` steps, at most 32.
__device__ __forceinline__ std::uint32_t all_steps(std::uint32_t steps) {
    return steps >= 32 ? 0xffffffffu : (1u << steps) - 1;
}

// A unit's sums, 32 bits each, of a warp.
struct Totals {
    std::int32_t v[kTokenTiles][kOutputTiles][4];

    template <typename Work>
    __device__ __forceinline__ void for_all(Work work) {
        for (std::uint32_t m = 0; m < kTokenTiles; ++m) {
            for (std::uint32_t n = 0; n < kOutputTiles; ++n) {
                for (std::uint32_t i = 0; i < 4; ++i) work(m, n, i, v[m][n][i]);
            }
        }
    }

    // A term's sums, which are rounded already, shifted.
    __device__ void add(const LimbSums& sums, const Shifts& shifts) {
        for_all([&](std::uint32_t m, std::uint32_t n, std::uint32_t i, std::int32_t& total) {
            total += sums.total(m, n, i) >> shifts.v[n][i % 2];
        });
    }
};

// Rows of 16-bit elements on their way to shared memory: `tokens` rows of `inputs` elements, by all threads.
// Elements beyond them are left alone: they meet zeros of the matrix, or tokens that nobody asks for.
__device__ __forceinline__ void stage_rows(std::byte* to, std::uint32_t pitch, const std::int16_t* from,
                                           std::uint64_t stride, std::uint32_t tokens, std::uint32_t inputs) {
    constexpr std::uint32_t unit = 8;  // elements of a copy
    const bool aligned = reinterpret_cast<std::uintptr_t>(from) % 16 == 0 && stride % unit == 0;
    const std::uint32_t pieces = div_up(inputs, unit);
    for (std::uint32_t i = threadIdx.x; i < tokens * pieces; i += blockDim.x) {
        const std::uint32_t t = i / pieces, first = i % pieces * unit;
        const std::int16_t* source = from + t * stride + first;
        auto* target = reinterpret_cast<std::int16_t*>(to + t * pitch) + first;
        if (aligned && first + unit <= inputs) {
            copy_16(target, source);
        } else {
            for (std::uint32_t k = 0; k < unit && first + k < inputs; ++k) target[k] = source[k];
        }
    }
}

// Bits of the groups of coefficients that any token of a tile has.
__device__ __forceinline__ std::uint32_t coded_groups(const std::uint32_t* masks, std::uint32_t first_token,
                                                      std::uint32_t tokens) {
    std::uint32_t coded = 0;
    for (std::uint32_t t = lane_id(); t < kProjectTokens; t += kLanes)
        coded |= first_token + t < tokens ? masks[first_token + t] : 0u;
    return __reduce_or_sync(kFullWarp, coded);
}

}  // namespace kvcast::kernels::cuda
