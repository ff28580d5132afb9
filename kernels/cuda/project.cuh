// Products of features and matrices on the tensor cores, as a block of threads makes them: some tiles of 16
// tokens x 192 outputs, a warp 24 of the outputs, inputs by steps of 32. FORMAT.md, section 11.3.
//
// What is multiplied lies in shared memory, features in one limb of 8 bits, coefficients in two: as
// fragments, or as rows, whose 16-bit integers a warp splits into limbs as it loads them. Matrices come from
// global memory in the order of their fragments (kernels/cuda/limbs.h), each to one warp, some slots ahead of
// their use. Sums are exact: limb by limb in 32 bits, together modulo 2^32, and the calibration's reader
// bounds every row's norm so that the whole fits.
#pragma once

#include "kernels/cuda/copy.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/platform.cuh"
#include "kernels/cuda/warp_rans.cuh"

namespace kvcast::kernels::cuda {

inline constexpr std::uint32_t kOutputTiles = kWarpOutputs / kOutputTile;
inline constexpr std::uint32_t kProjectThreads = kProjectOutputs / kWarpOutputs * kLanes;

// Where a warp's products lie in the block's.
struct WarpPlace {
    std::uint32_t output;

    // Of the token tile m, output tile n, sum i of this lane.
    __device__ std::uint32_t token_of(std::uint32_t m, std::uint32_t i) const {
        return kTokenTile * m + lane_id() / 4 + i / 2 * 8;
    }
    __device__ std::uint32_t output_of(std::uint32_t n, std::uint32_t i) const {
        return output + kOutputTile * n + lane_id() % 4 * 2 + i % 2;
    }
};

// A token tile x 32 features, limb by limb, the lowest first.
template <std::uint32_t Limbs>
struct Features {
    FragmentA limbs[Limbs];
};

// Sums of products are kept in places that count 1, 2^8 and 2^16; that of the lowest limbs of both sides is
// added at kLowest. Features of one limb count kFeatureWeight times.
static_assert(kFeatureWeight == 1 << 8);

// Eight neighbouring 16-bit integers of two tokens, 8 tokens apart, as a lane holds them in fragments.
__device__ __forceinline__ Features<2> split(const uint4& token, const uint4& later) {
    const auto limb = [&](std::uint32_t bytes) {
        return FragmentA{{__byte_perm(token.x, token.y, bytes), __byte_perm(later.x, later.y, bytes),
                          __byte_perm(token.z, token.w, bytes), __byte_perm(later.z, later.w, bytes)}};
    };
    return {{limb(0x6420), limb(0x7531)}};
}

// 16-bit integers in shared memory, `pitch` bytes from token to token.
struct WideRows {
    static constexpr std::uint32_t kLimbs = 2, kLowest = 0;
    const std::byte* rows;
    std::uint32_t pitch;

    __device__ Features<2> load(std::uint32_t tile, std::uint32_t step) const {
        const std::byte* at = rows + (kTokenTile * tile + lane_id() / 4) * pitch +
                              (step * kUnitStep + lane_id() % 4 * 8) * sizeof(std::int16_t);
        return split(*reinterpret_cast<const uint4*>(at), *reinterpret_cast<const uint4*>(at + 8 * pitch));
    }
};

// Features in shared memory, in the same way.
struct ByteRows {
    static constexpr std::uint32_t kLimbs = 1, kLowest = 1;
    const std::byte* rows;
    std::uint32_t pitch;

    __device__ Features<1> load(std::uint32_t tile, std::uint32_t step) const {
        const std::byte* at =
            rows + (kTokenTile * tile + lane_id() / 4) * pitch + step * kUnitStep + lane_id() % 4 * 8;
        const uint2 token = *reinterpret_cast<const uint2*>(at);
        const uint2 later = *reinterpret_cast<const uint2*>(at + 8 * pitch);
        return {{{{token.x, later.x, token.y, later.y}}}};
    }
};

// A fragment of features in shared memory: 16 bytes of each lane. Their order lets whole fragments, and one
// word of every fourth lane, lie in different banks.
inline constexpr std::uint32_t kFeatureBytes = kLanes * 16;
__device__ __forceinline__ std::uint32_t fragment_slot(std::uint32_t lane) {
    return (lane ^ lane / 8) * 16;
}
__device__ __forceinline__ FragmentA load_fragment(const std::byte* fragment) {
    const uint4 v = *reinterpret_cast<const uint4*>(fragment + fragment_slot(lane_id()));
    return {{v.x, v.y, v.z, v.w}};
}

// 16-bit integers that lie in shared memory as fragments, [step][token tile][limb].
template <std::uint32_t Tiles>
struct SplitRows {
    static constexpr std::uint32_t kLimbs = 2, kLowest = 0;
    const std::byte* fragments;

    __device__ Features<2> load(std::uint32_t tile, std::uint32_t step) const {
        const std::byte* at = fragments + (step * Tiles + tile) * 2 * kFeatureBytes;
        return {{load_fragment(at), load_fragment(at + kFeatureBytes)}};
    }
};

// Features as fragments, [step][token tile].
template <std::uint32_t Tiles>
struct NarrowRows {
    static constexpr std::uint32_t kLimbs = 1, kLowest = 1;
    const std::byte* fragments;

    __device__ Features<1> load(std::uint32_t tile, std::uint32_t step) const {
        return {{load_fragment(fragments + (step * Tiles + tile) * kFeatureBytes)}};
    }

    static __device__ void put(std::byte* fragments, std::uint32_t token, std::uint32_t feature,
                               std::int8_t value) {
        const std::uint32_t index = feature / kUnitStep * Tiles + token / kTokenTile;
        const std::uint32_t lane = token % 8 * 4 + feature % kUnitStep / 8;
        const std::uint32_t word = token % kTokenTile / 8 + feature % 8 / 4 * 2;
        fragments[index * kFeatureBytes + fragment_slot(lane) + word * 4 + feature % 4] =
            static_cast<std::byte>(value);
    }
};

// What a lane holds of a slot (kernels/cuda/tasks.h).
struct MatrixSlot {
    std::uint32_t words[kOutputTiles][4];

    __device__ FragmentB half(std::uint32_t n, std::uint32_t i) const {
        return {{words[n][2 * i], words[n][2 * i + 1]}};
    }
};

// A lane's bytes of a warp's slots, the first of them that begins with step `first`.
__device__ __forceinline__ const std::uint8_t* slots_at(const ProjectionTerm& term, std::uint32_t output,
                                                        std::uint32_t first) {
    const std::uint64_t slot = output / kWarpOutputs * term.slots + first / slot_steps(term.limbs);
    return term.matrix + slot * kSlotBytes + lane_id() * 16;
}

// What there is once for each output, of this lane's outputs; `values` go on to the end of a warp's.
struct Shifts {
    std::uint32_t pairs[kOutputTiles] = {};  // side by side: few registers for a long time

    __device__ __forceinline__ void load(const std::uint8_t* values, std::uint32_t output) {
        const auto* from = reinterpret_cast<const std::uint16_t*>(values + output) + lane_id() % 4;
        for (std::uint32_t n = 0; n < kOutputTiles; ++n) pairs[n] = __ldg(from + n * kOutputTile / 2);
    }

    // For the sum i of output tile n.
    __device__ std::uint32_t of(std::uint32_t n, std::uint32_t i) const {
        return pairs[n] >> i % 2 * 8 & 255;
    }
};

// Work on all of a lane's sums.
template <std::uint32_t Tiles, typename Work>
__device__ __forceinline__ void for_all_sums(Work work) {
    KVCAST_UNROLL(Tiles)  // so that sums lie in registers
    for (std::uint32_t m = 0; m < Tiles; ++m) {
        KVCAST_UNROLL(kOutputTiles)
        for (std::uint32_t n = 0; n < kOutputTiles; ++n) {
            KVCAST_UNROLL(4)
            for (std::uint32_t i = 0; i < 4; ++i) work(m, n, i);
        }
    }
}

// The half that rounds a sum.
__device__ __forceinline__ std::int32_t half_of(const Shifts& shifts, std::uint32_t n, std::uint32_t i) {
    return static_cast<std::int32_t>(1u << shifts.of(n, i) >> 1);
}

// A warp's sums of limb products of one term, and the half that rounds them.
template <std::uint32_t Tiles>
struct LimbSums {
    Sums of[3][Tiles][kOutputTiles];  // count 1, 2^8 and 2^16

    __device__ __forceinline__ void start(const Shifts& shifts) {
        for_all_sums<Tiles>([&](std::uint32_t m, std::uint32_t n, std::uint32_t i) {
            of[0][m][n].r[i] = half_of(shifts, n, i);
            of[1][m][n].r[i] = of[2][m][n].r[i] = 0;
        });
    }

    // Those that no product with so many limbs of a matrix adds to, as they begin.
    template <typename Rows, std::uint32_t Limbs>
    __device__ __forceinline__ void begin_unused(const Shifts& shifts) {
        constexpr std::uint32_t end = Rows::kLowest + Rows::kLimbs + Limbs - 1;
        for_all_sums<Tiles>([&](std::uint32_t m, std::uint32_t n, std::uint32_t i) {
            if (Rows::kLowest == 1) of[0][m][n].r[i] = half_of(shifts, n, i);
            if (end < 3) of[2][m][n].r[i] = 0;
            if (end < 2) of[1][m][n].r[i] = 0;
        });
    }

    __device__ std::int32_t total(std::uint32_t m, std::uint32_t n, std::uint32_t i) const {
        const auto sum = [&](std::uint32_t k) { return static_cast<std::uint32_t>(of[k][m][n].r[i]); };
        return static_cast<std::int32_t>((((sum(2) << 8) + sum(1)) << 8) + sum(0));
    }
};

// One step, its matrix from half `first` of a slot on. A step that begins sums has them follow from nothing
// but the halves. The highest limb of a number is signed.
template <bool Begins, std::uint32_t Limbs, std::uint32_t Tiles, typename Rows>
__device__ __forceinline__ void multiply_step(const Rows& rows, std::uint32_t step, const MatrixSlot& matrix,
                                              std::uint32_t first, const Shifts& shifts,
                                              LimbSums<Tiles>& sums) {
    KVCAST_UNROLL(Tiles)  // so that sums lie in registers
    for (std::uint32_t m = 0; m < Tiles; ++m) {
        const auto f = rows.load(m, step);
        KVCAST_UNROLL(2)
        for (std::uint32_t i = 0; i < Rows::kLimbs; ++i) {
            KVCAST_UNROLL(2)
            for (std::uint32_t k = 0; k < Limbs; ++k) {
                const bool begins = Begins && (i == 0 || k + 1 == Limbs);  // those that count as much
                KVCAST_UNROLL(kOutputTiles)
                for (std::uint32_t n = 0; n < kOutputTiles; ++n) {
                    const std::uint32_t place = Rows::kLowest + i + k;
                    Sums& sum = sums.of[place][m][n];
                    for (std::uint32_t j = 0; begins && j < 4; ++j)
                        sum.r[j] = place == 0 ? half_of(shifts, n, j) : 0;
                    multiply_add(sum, f.limbs[i], matrix.half(n, first + k), i + 1 == Rows::kLimbs,
                                 k + 1 == Limbs);
                }
            }
        }
    }
}

// A slot from step `step` on, as far as there are steps.
template <bool Begins, std::uint32_t Limbs, std::uint32_t Tiles, typename Rows>
__device__ __forceinline__ void multiply_slot(const Rows& rows, std::uint32_t step, std::uint32_t steps,
                                              const MatrixSlot& matrix, const Shifts& shifts,
                                              LimbSums<Tiles>& sums) {
    multiply_step<Begins, Limbs>(rows, step, matrix, 0, shifts, sums);
    if constexpr (Limbs == 1) {
        if (step + 1 < steps) multiply_step<false, Limbs>(rows, step + 1, matrix, 1, shifts, sums);
    }
}

// A unit's sums, 32 bits each, of a warp.
template <std::uint32_t Tiles>
struct Totals {
    std::int32_t v[Tiles][kOutputTiles][4];

    // A term's sums, which are rounded already, shifted.
    __device__ __forceinline__ void add(const LimbSums<Tiles>& sums, const Shifts& shifts) {
        for_all_sums<Tiles>([&](std::uint32_t m, std::uint32_t n, std::uint32_t i) {
            v[m][n][i] += sums.total(m, n, i) >> shifts.of(n, i);
        });
    }
};

// The steps of so many inputs up to the last one that any token of a tile has a coefficient in, as far as the
// tokens' masks know: see UnitTask::masks.
__device__ __forceinline__ std::uint32_t coded_steps(std::uint32_t masks, std::uint32_t inputs) {
    constexpr std::uint32_t known = 32;
    const std::uint32_t all = div_up(inputs, kUnitStep);
    return all > known ? all
                       : lesser(all, known - static_cast<std::uint32_t>(__clz(static_cast<int>(masks))));
}

}  // namespace kvcast::kernels::cuda
