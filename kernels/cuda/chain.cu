// States of all units of some tokens of a chunk, one unit after another, by one block of threads: what units
// are predicted from stays in shared memory, and no launch waits for another. FORMAT.md, section 11.3.
#include "kernels/cuda/project.cuh"

namespace kvcast::kernels::cuda {
namespace {

// Units are described by the time they are reached: the next ones' tasks are copied ahead.
constexpr std::uint32_t kTasksAhead = 2;
constexpr std::uint32_t kTasks = kTasksAhead + 2;  // a unit's, the one's before it, and those
constexpr std::uint32_t kTaskPieces = sizeof(UnitTask) / 16;
static_assert(sizeof(UnitTask) % 16 == 0 && kTaskPieces <= kProjectThreads);

// What a block of threads is about, in shared memory: registers are short.
struct Chain {
    ChainTask task;
    std::uint32_t first_token;
    std::uint32_t tokens;  // of the block
};
static_assert(sizeof(Chain) + kTasks * sizeof(UnitTask) <= kChainTaskBytes);

// Features, states and coefficients in shared memory.
template <std::uint32_t Tiles>
__device__ std::byte* place_of(std::uint32_t resident) {
    return dynamic_shared<std::byte>() + resident * Tiles;
}

__device__ void copy_task(UnitTask& to, const UnitTask& from) {
    if (threadIdx.x < kTaskPieces)
        copy_16(reinterpret_cast<std::byte*>(&to) + 16 * threadIdx.x,
                reinterpret_cast<const std::byte*>(&from) + 16 * threadIdx.x);
}

__device__ const ProjectionTerm& transform_of(const UnitTask& unit) {
    return unit.terms[unit.term_count - 1];
}

template <std::uint32_t Tiles>
__device__ void load_token_features(const Chain& c, Memory memory) {
    const std::uint32_t features = c.task.features;
    const auto* rows = reinterpret_cast<const std::int16_t*>(memory.image + c.task.token_rows) +
                       std::uint64_t{c.first_token} * features;
    for (std::uint32_t i = threadIdx.x; i < c.tokens * features; i += kProjectThreads)
        NarrowRows<Tiles>::put(place_of<Tiles>(c.task.resident), i / features, i % features, rows[i]);
}

// A unit's coefficients on their way to SplitRows. A lane copies what it will hold of a fragment to its
// places in both limbs' fragments, and when they have arrived splits them there. Half of the warps do so, one
// of the two that a scheduler has: they fall behind the others, so that one of the two multiplies while the
// other adds up. A block of one tile waits for matrices more than for products: there all warps do.
template <std::uint32_t Tiles>
class Coefficients {
  public:
    __device__ Coefficients(const Chain& c, std::uint32_t warp) : c_(c), warp_(warp) {}

    __device__ void copy(const UnitTask& unit, Memory memory) const {
        const ProjectionTerm& transform = transform_of(unit);
        const std::uint32_t input = lane_id() % 4 * 8, token = lane_id() / 4;
        const std::uint32_t inputs = transform.inputs, stride = transform.stride, tokens = c_.tokens;
        const auto* rows = reinterpret_cast<const std::int16_t*>(memory.workspace + transform.features) +
                           std::uint64_t{c_.first_token + token} * stride + input;
        for_all_fragments(transform, [&](std::uint32_t step, std::uint32_t tile, std::byte* place) {
            if (step * kUnitStep + input >= inputs) return;
            const std::uint32_t before = tile * kTokenTile;
            const auto* from = rows + before * stride + step * kUnitStep;
            if (before + token < tokens) copy_16(place, from);
            if (before + token + 8 < tokens) copy_16(place + kFeatureBytes, from + 8 * stride);
        });
    }

    // After the thread's wait for its copies.
    __device__ void split_copied(const UnitTask& unit) const {
        for_all_fragments(transform_of(unit), [&](std::uint32_t, std::uint32_t, std::byte* place) {
            auto& low = *reinterpret_cast<uint4*>(place);
            auto& high = *reinterpret_cast<uint4*>(place + kFeatureBytes);
            const Features<2> f = split(low, high);
            low = {f.limbs[0].r[0], f.limbs[0].r[1], f.limbs[0].r[2], f.limbs[0].r[3]};
            high = {f.limbs[1].r[0], f.limbs[1].r[1], f.limbs[1].r[2], f.limbs[1].r[3]};
        });
    }

  private:
    // This warp's part of them.
    template <typename Work>
    __device__ __forceinline__ void for_all_fragments(const ProjectionTerm& transform, Work work) const {
        constexpr std::uint32_t warps = kProjectThreads / kLanes / (Tiles == 1 ? 1 : 2);
        if (warp_ >= warps) return;
        const std::uint32_t count = div_up(transform.inputs, kUnitStep) * Tiles;
        std::byte* first = place_of<Tiles>(transform.resident) + fragment_slot(lane_id());
        KVCAST_UNROLL(1)
        for (std::uint32_t i = warp_; i < count; i += warps)
            work(i / Tiles, i % Tiles, first + i * 2 * kFeatureBytes);
    }

    const Chain& c_;
    std::uint32_t warp_;
};

// Which steps of a unit's coefficients are worth multiplying. Made well before it is asked, its loads are no
// wait.
template <std::uint32_t Tiles>
class CodedSteps {
  public:
    __device__ CodedSteps(const Chain& c, const UnitTask& unit, Memory memory) {
        const auto* masks = reinterpret_cast<const std::uint32_t*>(memory.workspace + unit.masks);
        for (std::uint32_t i = 0; i < kLoads; ++i) {
            const std::uint32_t token = i * kLanes + lane_id();
            masks_[i] = token < c.tokens ? masks[c.first_token + token] : 0;
        }
    }
    __device__ std::uint32_t of(const UnitTask& unit) const {
        std::uint32_t any = 0;
        for (const std::uint32_t mask : masks_) any |= mask;
        return coded_steps(__reduce_or_sync(kFullWarp, any), transform_of(unit).inputs);
    }

  private:
    static constexpr std::uint32_t kLoads = div_up(Tiles * kTokenTile, kLanes);
    std::uint32_t masks_[kLoads];
};

// The terms of units one after another as a warp multiplies them, of each unit the transform first; and
// always the next one's matrix on its way while the sums of the present one are shifted and added.
template <std::uint32_t Tiles>
class Terms {
  public:
    __device__ explicit Terms(const WarpPlace& at) : at_(at) {}

    // A unit whose transform has so many steps.
    __device__ __forceinline__ void begin(const UnitTask& unit, std::uint32_t coded) {
        unit_ = &unit;
        term_ = unit.term_count - 1;
        outside_ = at_.output >= unit.width;
        bias_.load(unit.bias, outside_ ? 0 : at_.output);
        begin_term(coded);
    }

    __device__ void start(Totals<Tiles>& totals) const {
        for_all_sums<Tiles>([&](std::uint32_t m, std::uint32_t n, std::uint32_t i) {
            totals.v[m][n][i] = bias_.v[n][i % 2];
        });
    }

    // Adds a term, and begins the next one: the unit's next prediction, or unit `next`.
    __device__ __forceinline__ void add(Totals<Tiles>& totals, const UnitTask& next, std::uint32_t coded) {
        const ProjectionTerm& term = unit_->terms[term_];
        const std::byte* features = place_of<Tiles>(term.resident);
        const bool any = matrix_.steps() != 0;
        LimbSums<Tiles> sums;
        if (any) {
            if (term.narrow) {
                multiply(NarrowRows<Tiles>{features}, term.limbs, sums);
            } else {
                multiply(SplitRows<Tiles>{features}, term.limbs, sums);
            }
        }
        const Shifts shifts = shifts_;
        term_ = term_ + 1 == unit_->term_count ? 0 : term_ + 1;
        if (term_ + 1 < unit_->term_count) {
            begin_term(div_up(unit_->terms[term_].inputs, kUnitStep));
        } else {
            begin(next, coded);
        }
        if (any) totals.add(sums, shifts);
    }

  private:
    // Nothing behind the unit's last output.
    __device__ __forceinline__ void begin_term(std::uint32_t steps) {
        const ProjectionTerm& term = unit_->terms[term_];
        shifts_.load(term.shifts, outside_ ? 0 : at_.output);
        matrix_.begin(term, unit_->width, at_.output, 0, outside_ ? 0 : steps);
    }

    template <typename Rows>
    __device__ __forceinline__ void multiply(const Rows& rows, std::uint32_t limbs, LimbSums<Tiles>& sums) {
        if (limbs == 2) {
            matrix_.template multiply_first<2>(rows, shifts_, sums);
        } else {
            matrix_.template multiply_first<1>(rows, shifts_, sums);
        }
    }

    const WarpPlace& at_;
    const UnitTask* unit_ = nullptr;
    std::uint32_t term_ = 0;
    bool outside_ = false;  // this warp's outputs are behind the unit's last
    Biases bias_;
    Shifts shifts_;
    MatrixSteps<Tiles> matrix_;
};

#ifdef KVCAST_SIMT

inline std::uint32_t saturated_pair(std::int32_t first, std::int32_t second) {
    return static_cast<std::uint16_t>(saturate16(first)) |
           std::uint32_t{static_cast<std::uint16_t>(saturate16(second))} << 16;
}

#else

__device__ __forceinline__ std::uint32_t saturated_pair(std::int32_t first, std::int32_t second) {
    std::uint32_t pair;
    asm("cvt.pack.sat.s16.s32 %0, %1, %2;" : "=r"(pair) : "r"(second), "r"(first));
    return pair;
}

#endif

// States to the workspace, and to shared memory where units are predicted from them. Of a tile's sums two
// neighbouring lanes exchange halves: each then has four outputs of a token, one word of either limb.
template <std::uint32_t Tiles>
__device__ __forceinline__ void put_states(const Chain& c, const UnitTask& unit, Memory memory,
                                           const WarpPlace& at, const Totals<Tiles>& totals) {
    const std::uint32_t lane = lane_id(), later = lane % 2;  // by 8 tokens
    const std::uint32_t row = lane / 4 + 8 * later, half = lane % 4 / 2;
    const std::uint32_t width = unit.width, stride = unit.stride, resident = unit.resident, tokens = c.tokens;
    auto* states = reinterpret_cast<std::int16_t*>(memory.workspace + unit.states) +
                   std::uint64_t{c.first_token + row} * stride + at.output + 4 * half;
    KVCAST_UNROLL(kOutputTiles)  // so that totals lie in registers
    for (std::uint32_t n = 0; n < kOutputTiles; ++n) {
        const std::uint32_t first = at.output + n * kOutputTile;
        if (first >= width) break;
        std::byte* words = place_of<Tiles>(resident) + first / kUnitStep * Tiles * 2 * kFeatureBytes +
                           fragment_slot(lane / 4 * 4 + first % kUnitStep / 8) + (later + 2 * half) * 4;
        KVCAST_UNROLL(Tiles)
        for (std::uint32_t m = 0; m < Tiles; ++m) {
            const auto& sums = totals.v[m][n];
            const std::uint32_t now = saturated_pair(sums[0], sums[1]);
            const std::uint32_t then = saturated_pair(sums[2], sums[3]);
            const std::uint32_t other = __shfl_xor_sync(kFullWarp, later != 0 ? now : then, 1);
            const uint2 four = later != 0 ? uint2{other, then} : uint2{now, other};
            if (m * kTokenTile + row < tokens)
                *reinterpret_cast<uint2*>(states + m * kTokenTile * stride + n * kOutputTile) = four;
            if (resident == kNone) continue;
            std::byte* low = words + m * 2 * kFeatureBytes;
            *reinterpret_cast<std::uint32_t*>(low) = __byte_perm(four.x, four.y, 0x6420);
            *reinterpret_cast<std::uint32_t*>(low + kFeatureBytes) = __byte_perm(four.x, four.y, 0x7531);
        }
    }
}

template <std::uint32_t Tiles>
__global__ void __launch_bounds__(kProjectThreads, 1)
    chain_tiles(Memory memory, const ChainTask* chains, const ChainTile* tiles, const UnitTask* units) {
    __shared__ Chain c;
    __shared__ UnitTask tasks[kTasks];
    if (threadIdx.x == 0) {
        const ChainTile tile = tiles[blockIdx.x];
        c.task = chains[tile.chain];
        c.first_token = tile.first_token;
        c.tokens = lesser(Tiles * kTokenTile, c.task.tokens - tile.first_token);
    }
    __syncthreads();
    units += c.task.first_unit;
    const std::uint32_t count = c.task.units;
    for (std::uint32_t u = 0; u < kTasksAhead && u < count; ++u) copy_task(tasks[u], units[u]);
    commit_copies();
    load_token_features<Tiles>(c, memory);
    wait_copies<0>();
    __syncthreads();
    const std::uint32_t warp = warp_id();
    const WarpPlace at = {warp * kWarpOutputs};
    const Coefficients<Tiles> coefficients(c, warp);
    coefficients.copy(tasks[0], memory);
    commit_copies();
    std::uint32_t coded = CodedSteps<Tiles>(c, tasks[0], memory).of(tasks[0]);
    Terms<Tiles> terms(at);
    terms.begin(tasks[0], coded);
    wait_copies<0>();
    coefficients.split_copied(tasks[0]);
    Totals<Tiles> totals;
    // The predictions of a unit and, while other warps still make its states, the transform of the next one.
    for (std::uint32_t u = 0; u <= count; ++u) {
        __syncthreads();  // there are coefficients, and the states of all units before the predicted one
        const UnitTask& predicted = tasks[(u + kTasks - 1) % kTasks];
        const UnitTask& unit = tasks[u < count ? u % kTasks : 0];  // one of them behind the last one
        const UnitTask& next = tasks[u + 1 < count ? (u + 1) % kTasks : 0];
        if (u + 1 < count) coefficients.copy(next, memory);
        if (u + kTasksAhead < count) copy_task(tasks[(u + kTasksAhead) % kTasks], units[u + kTasksAhead]);
        commit_copies();
        const CodedSteps<Tiles> coded_steps(c, next, memory);
        const std::uint32_t predictions = u == 0 ? 0 : predicted.term_count - 1;
        for (std::uint32_t k = 0; k <= predictions; ++k) {
            if (k == predictions) {
                if (u != 0) put_states<Tiles>(c, predicted, memory, at, totals);
                if (u == count) break;
                coded = coded_steps.of(next);
                terms.start(totals);
            }
            terms.add(totals, k == predictions ? next : unit, coded);
        }
        wait_copies<0>();
        if (u + 1 < count) coefficients.split_copied(next);
    }
}

template <std::uint32_t Tiles>
cudaError_t launch_tiles(Memory memory, const ChainBatch& batch, cudaStream_t stream) {
    const std::size_t shared_bytes = Tiles * batch.shared_bytes;
    const cudaError_t e = cudaFuncSetAttribute(
        chain_tiles<Tiles>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (e != cudaSuccess) return e;
    return launch(chain_tiles<Tiles>, {batch.tile_count, kProjectThreads, shared_bytes}, stream, memory,
                  batch.chains, batch.tiles, batch.units);
}

}  // namespace

cudaError_t launch_chain(Memory memory, const ChainBatch& batch, cudaStream_t stream) {
    if (batch.tile_count == 0) return cudaSuccess;
    static_assert(kMostHeight == 4);
    switch (batch.height) {
        case 1:
            return launch_tiles<1>(memory, batch, stream);
        case 2:
            return launch_tiles<2>(memory, batch, stream);
        case 3:
            return launch_tiles<3>(memory, batch, stream);
        case 4:
            return launch_tiles<4>(memory, batch, stream);
        default:
            return cudaErrorInvalidValue;
    }
}

}  // namespace kvcast::kernels::cuda
