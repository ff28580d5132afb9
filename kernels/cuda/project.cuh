// Products of features and matrices on the tensor cores, as a block of threads makes them: some tiles of 16
// tokens x 192 outputs, a warp 24 of the outputs, inputs by steps of 32. FORMAT.md, section 11.3.
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

inline constexpr std::uint32_t kOutputTiles = kWarpOutputs / kOutputTile;
inline constexpr std::uint32_t kProjectThreads = kProjectOutputs / kWarpOutputs * kLanes;

// How many steps of a matrix are on their way: the more, the fewer the products of a step.
KVCAST_HD constexpr std::uint32_t steps_ahead(std::uint32_t token_tiles) {
    constexpr std::uint32_t steps[] = {6, 4, 3, 2};
    return steps[token_tiles - 1];
}

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

// Eight neighbouring 16-bit features of two tokens, 8 tokens apart, as a lane holds them in fragments.
__device__ __forceinline__ Features<2> split(const uint4& token, const uint4& later) {
    const auto limb = [&](std::uint32_t bytes) {
        return FragmentA{{__byte_perm(token.x, token.y, bytes), __byte_perm(later.x, later.y, bytes),
                          __byte_perm(token.z, token.w, bytes), __byte_perm(later.z, later.w, bytes)}};
    };
    return {{limb(0x6420), limb(0x7531)}};
}

// 16-bit features in shared memory, `pitch` bytes from token to token.
struct WideRows {
    static constexpr std::uint32_t kLimbs = 2;
    const std::byte* rows;
    std::uint32_t pitch;

    __device__ Features<2> load(std::uint32_t tile, std::uint32_t step) const {
        const std::byte* at = rows + (kTokenTile * tile + lane_id() / 4) * pitch +
                              (step * kUnitStep + lane_id() % 4 * 8) * sizeof(std::int16_t);
        return split(*reinterpret_cast<const uint4*>(at), *reinterpret_cast<const uint4*>(at + 8 * pitch));
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

// 16-bit features that lie in shared memory as fragments, [step][token tile][limb].
template <std::uint32_t Tiles>
struct SplitRows {
    static constexpr std::uint32_t kLimbs = 2;
    const std::byte* fragments;

    __device__ Features<2> load(std::uint32_t tile, std::uint32_t step) const {
        const std::byte* at = fragments + (step * Tiles + tile) * 2 * kFeatureBytes;
        return {{load_fragment(at), load_fragment(at + kFeatureBytes)}};
    }
};

// Features of 8 bits as fragments, [step][token tile].
template <std::uint32_t Tiles>
struct NarrowRows {
    static constexpr std::uint32_t kLimbs = 1;
    const std::byte* fragments;

    __device__ Features<1> load(std::uint32_t tile, std::uint32_t step) const {
        return {{load_fragment(fragments + (step * Tiles + tile) * kFeatureBytes)}};
    }

    static __device__ void put(std::byte* fragments, std::uint32_t token, std::uint32_t feature,
                               std::int16_t value) {
        const std::uint32_t index = feature / kUnitStep * Tiles + token / kTokenTile;
        const std::uint32_t lane = token % 8 * 4 + feature % kUnitStep / 8;
        const std::uint32_t word = token % kTokenTile / 8 + feature % 8 / 4 * 2;
        fragments[index * kFeatureBytes + fragment_slot(lane) + word * 4 + feature % 4] =
            static_cast<std::byte>(value);
    }
};

// A warp's outputs x 32 inputs of a matrix, of each output tile the lower limb and, where there are two, the
// higher one.
struct MatrixStep {
    std::uint32_t words[kOutputTiles][4];

    __device__ FragmentB limb(std::uint32_t n, std::uint32_t i) const {
        return {{words[n][2 * i], words[n][2 * i + 1]}};
    }
};

#ifdef KVCAST_SIMT

template <std::uint32_t Limbs>
void load_limbs(std::uint32_t (&words)[4], const std::uint8_t* from, bool wanted) {
    if (wanted) std::memcpy(words, from, Limbs * 8);
}

#else

// Loads where it is wanted, and to the same registers in any case: those of a branch that is not always taken
// would be copied, and waited for at that place. Nobody else on the multiprocessor wants these bytes.
template <std::uint32_t Limbs>
__device__ __forceinline__ void load_limbs(std::uint32_t (&words)[4], const std::uint8_t* from, bool wanted) {
    if constexpr (Limbs == 2) {
        asm volatile(
            "{\n.reg .pred p;\nsetp.ne.u32 p, %5, 0;\n"
            "@p ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
            : "+r"(words[0]), "+r"(words[1]), "+r"(words[2]), "+r"(words[3])
            : "l"(from), "r"(static_cast<std::uint32_t>(wanted)));
    } else {
        asm volatile(
            "{\n.reg .pred p;\nsetp.ne.u32 p, %3, 0;\n"
            "@p ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];\n}"
            : "+r"(words[0]), "+r"(words[1])
            : "l"(from), "r"(static_cast<std::uint32_t>(wanted)));
    }
}

#endif

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
struct Biases {
    std::int32_t v[kOutputTiles][2] = {};

    __device__ __forceinline__ void load(const std::int32_t* values, std::uint32_t output) {
        const auto* pairs = reinterpret_cast<const int2*>(values + output) + lane_id() % 4;
        for (std::uint32_t n = 0; n < kOutputTiles; ++n) {
            const int2 pair = __ldg(pairs + n * kOutputTile / 2);
            v[n][0] = pair.x;
            v[n][1] = pair.y;
        }
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

    __device__ std::int32_t total(std::uint32_t m, std::uint32_t n, std::uint32_t i) const {
        const auto sum = [&](std::uint32_t k) { return static_cast<std::uint32_t>(of[k][m][n].r[i]); };
        return static_cast<std::int32_t>((((sum(2) << 8) + sum(1)) << 8) + sum(0));
    }
};

// The steps of a matrix one after another, some of them on their way. Begun well before its steps are used,
// it makes nobody wait.
template <std::uint32_t Tiles>
class MatrixSteps {
  public:
    // Steps from `first` on; of no use before the last ones are used up.
    __device__ __forceinline__ void begin(const ProjectionTerm& term, std::uint32_t width,
                                          std::uint32_t output, std::uint32_t first, std::uint32_t steps) {
        const std::uint32_t tile_bytes = term.limbs * kFragmentBytes;
        step_bytes_ = limb_tiles(width) * tile_bytes;
        steps_ = steps;
        next_ = term.matrix + std::uint64_t{first} * step_bytes_ + output / kOutputTile * tile_bytes +
                lane_id() * term.limbs * 8;
        if (term.limbs == 2) {
            load_first<2>();
        } else {
            load_first<1>();
        }
    }

    __device__ std::uint32_t steps() const { return steps_; }

    // Adds all steps of a matrix of so many limbs, on rows whose step 0 is the first one.
    template <std::uint32_t Limbs, typename Rows>
    __device__ __forceinline__ void multiply(const Rows& rows, LimbSums<Tiles>& sums) {
        multiply_from<0, Limbs>(rows, sums);
    }

    // The same of a term's first steps, at least one: what sums begin with is no work of its own.
    template <std::uint32_t Limbs, typename Rows>
    __device__ __forceinline__ void multiply_first(const Rows& rows, const Shifts& shifts,
                                                   LimbSums<Tiles>& sums) {
        for_all_sums<Tiles>([&](std::uint32_t m, std::uint32_t n, std::uint32_t i) {
            if (Rows::kLimbs + Limbs < 4) sums.of[2][m][n].r[i] = 0;
            if (Rows::kLimbs + Limbs < 3) sums.of[1][m][n].r[i] = 0;
        });
        multiply_step<true, Limbs>(rows, 0, ahead_[0], shifts, sums);
        multiply_from<1, Limbs>(rows, sums);
    }

  private:
    static constexpr std::uint32_t kAhead = steps_ahead(Tiles);

    template <std::uint32_t Limbs>
    __device__ __forceinline__ void load_first() {
        KVCAST_UNROLL(kAhead)
        for (std::uint32_t i = 0; i < kAhead; ++i) {
            load<Limbs>(ahead_[i], i < steps_);
            next_ += step_bytes_;
        }
    }

    template <std::uint32_t Limbs>
    __device__ __forceinline__ void load(MatrixStep& s, bool wanted) {
        for (std::uint32_t n = 0; n < kOutputTiles; ++n)
            load_limbs<Limbs>(s.words[n], next_ + n * Limbs * kFragmentBytes, wanted);
    }

    // From step First on, which is among the first ones.
    template <std::uint32_t First, std::uint32_t Limbs, typename Rows>
    __device__ __forceinline__ void multiply_from(const Rows& rows, LimbSums<Tiles>& sums) {
        KVCAST_UNROLL(1)
        for (std::uint32_t first = First; first < steps_; first += kAhead) {
            KVCAST_UNROLL(kAhead)  // so that ahead_ lies in registers
            for (std::uint32_t i = 0; i < kAhead; ++i) {
                if (i != 0 && first + i >= steps_) break;
                multiply_step<false, Limbs>(rows, first + i, ahead_[(First + i) % kAhead], {}, sums);
            }
        }
    }

    // One step, and the load of that which takes its place. A step that begins sums has them follow from
    // nothing but the halves. The highest limb of a number is signed.
    template <bool Begins, std::uint32_t Limbs, typename Rows>
    __device__ __forceinline__ void multiply_step(const Rows& rows, std::uint32_t step, MatrixStep& matrix,
                                                  const Shifts& shifts, LimbSums<Tiles>& sums) {
        KVCAST_UNROLL(Tiles)  // so that sums lie in registers
        for (std::uint32_t m = 0; m < Tiles; ++m) {
            const auto f = rows.load(m, step);
            KVCAST_UNROLL(2)
            for (std::uint32_t i = 0; i < Rows::kLimbs; ++i) {
                KVCAST_UNROLL(2)
                for (std::uint32_t k = 0; k < Limbs; ++k) {
                    const bool first = i == 0 || k + 1 == Limbs;  // of those that count as much
                    KVCAST_UNROLL(kOutputTiles)
                    for (std::uint32_t n = 0; n < kOutputTiles; ++n) {
                        Sums& sum = sums.of[i + k][m][n];
                        for (std::uint32_t j = 0; Begins && first && j < 4; ++j)
                            sum.r[j] = i + k == 0 ? half_of(shifts, n, j) : 0;
                        multiply_add(sum, f.limbs[i], matrix.limb(n, k), i + 1 == Rows::kLimbs,
                                     k + 1 == Limbs);
                    }
                }
            }
        }
        load<Limbs>(matrix, step + kAhead < steps_);
        next_ += step_bytes_;
    }

    const std::uint8_t* next_ = nullptr;  // this lane's bytes of the first step that is not on its way
    std::uint32_t step_bytes_ = 0;
    std::uint32_t steps_ = 0;
    MatrixStep ahead_[kAhead] = {};
};

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
