// States of all units of some tokens of a chunk, one unit after another, by one block of threads: what units
// are predicted from stays in shared memory, and no launch waits for another. FORMAT.md, section 11.3.
#include "kernels/cuda/project.cuh"

namespace kvcast::kernels::cuda {
namespace {

// Units are described by the time they are reached: the next ones' tasks are copied ahead.
constexpr std::uint32_t kTasksAhead = 2;
static_assert((kTasksAhead + 1) * sizeof(UnitTask) <= kChainTaskBytes);
constexpr std::uint32_t kTaskPieces = sizeof(UnitTask) / 16;
static_assert(sizeof(UnitTask) % 16 == 0 && kTaskPieces <= kProjectThreads);

struct Chain {
    const ChainTask& task;
    const UnitTask* units;  // of the chain
    std::byte* shared;      // features, states and coefficients
    Memory memory;
    std::uint32_t first_token;
    std::uint32_t tokens;  // of the tile
};

__device__ void copy_task(UnitTask& to, const UnitTask& from) {
    if (threadIdx.x < kTaskPieces)
        copy_16(reinterpret_cast<std::byte*>(&to) + 16 * threadIdx.x,
                reinterpret_cast<const std::byte*>(&from) + 16 * threadIdx.x);
}

__device__ void copy_coefficients(const Chain& c, const UnitTask& unit) {
    const ProjectionTerm& transform = unit.terms[unit.term_count - 1];
    const auto* rows = reinterpret_cast<const std::int16_t*>(c.memory.workspace + transform.features);
    stage_rows(c.shared + c.task.coefficients, wide_pitch(transform.inputs),
               rows + std::uint64_t{c.first_token} * transform.stride, transform.stride, c.tokens,
               transform.inputs);
}

__device__ void load_token_features(const Chain& c) {
    const auto* rows = reinterpret_cast<const std::int16_t*>(c.memory.image + c.task.token_rows) +
                       std::uint64_t{c.first_token} * c.task.features;
    for (std::uint32_t i = threadIdx.x; i < c.tokens * c.task.features; i += kProjectThreads) {
        NarrowRows::put(c.shared + c.task.resident, div_up(c.task.features, kUnitStep), i / c.task.features,
                        i % c.task.features, rows[i]);
    }
}

// A unit's terms as a warp multiplies them: limb after limb of term after term, and always the next one's
// matrix on its way while the sums of the present one are shifted and added.
class Terms {
  public:
    // `masked`: which steps of the last term are worth it.
    __device__ Terms(const Chain& c, const UnitTask& unit, const WarpPlace& at, std::uint32_t masked)
        : c_(c), unit_(unit), at_(at), masked_(masked), matrix_(steps_of(0, 0)) {}

    // The next term, on rows.
    template <typename Rows>
    __device__ __forceinline__ void add(const Rows& rows, Totals& totals) {
        const ProjectionTerm& term = unit_.terms[term_];
        const Shifts shifts(term.shifts, at_, 0, unit_.width);
        LimbSums sums(shifts, term.limbs == 1);
        matrix_.template multiply<true>(rows, sums);
        if (term.limbs == 2) {
            matrix_ = steps_of(term_, 1);
            sums.fold(shifts);
            matrix_.template multiply<false>(rows, sums);
        }
        if (++term_ < unit_.term_count) matrix_ = steps_of(term_, 0);
        totals.add(sums, shifts);
    }

    __device__ void add_prediction(Totals& totals) {
        const ProjectionTerm& term = unit_.terms[term_];
        const std::byte* features = c_.shared + term.resident;
        const std::uint32_t steps = div_up(term.inputs, kUnitStep);
        if (term.narrow) {
            add(NarrowRows{features, steps}, totals);
        } else {
            add(SplitRows{features, steps}, totals);
        }
    }

    __device__ void add_transform(Totals& totals) {
        add(WideRows{c_.shared + c_.task.coefficients, wide_pitch(unit_.terms[term_].inputs)}, totals);
    }

  private:
    __device__ __forceinline__ MatrixSteps steps_of(std::uint32_t k, std::uint32_t limb) const {
        const ProjectionTerm& term = unit_.terms[k];
        const std::uint32_t all = all_steps(div_up(term.inputs, kUnitStep));
        return {LimbFragments(term, limb, unit_.width, at_.output), 0,
                k + 1 == unit_.term_count ? all & masked_ : all};
    }

    const Chain& c_;
    const UnitTask& unit_;
    const WarpPlace& at_;
    std::uint32_t masked_;
    std::uint32_t term_ = 0;
    MatrixSteps matrix_;
};

// States to the workspace, and to shared memory where units are predicted from them. Widths are even.
__device__ __forceinline__ void put_states(const Chain& c, const UnitTask& unit, const WarpPlace& at,
                                           const Totals& totals) {
    auto* states = c.memory.workspace + unit.states;
    KVCAST_UNROLL(kTokenTiles)  // so that totals lie in registers
    for (std::uint32_t m = 0; m < kTokenTiles; ++m) {
        KVCAST_UNROLL(kOutputTiles)
        for (std::uint32_t n = 0; n < kOutputTiles; ++n) {
            KVCAST_UNROLL(2)
            for (std::uint32_t i = 0; i < 4; i += 2) {
                const std::uint32_t token = at.token_of(m, i), output = at.output_of(n, i);
                if (token >= c.tokens || output >= unit.width) continue;
                const std::uint32_t word =
                    static_cast<std::uint16_t>(saturate16(totals.v[m][n][i])) |
                    std::uint32_t{static_cast<std::uint16_t>(saturate16(totals.v[m][n][i + 1]))} << 16;
                const std::uint64_t index = std::uint64_t{c.first_token + token} * unit.stride + output;
                *reinterpret_cast<std::uint32_t*>(states + index * sizeof(std::int16_t)) = word;
                if (unit.resident == kNone) continue;
                SplitRows::put(c.shared + unit.resident, div_up(unit.width, kUnitStep), token, output, word);
            }
        }
    }
}

__device__ void fetch_coefficients() {
    wait_copies<0>();
    __syncthreads();  // they are there; and nobody reads former states, in whose place these go
}

__device__ void make_unit(const Chain& c, const UnitTask& unit) {
    const WarpPlace at = warp_place();
    if (at.output >= unit.width) {
        fetch_coefficients();
        __syncthreads();
        return;
    }
    const auto* masks = reinterpret_cast<const std::uint32_t*>(c.memory.workspace + unit.masks);
    Terms terms(c, unit, at, coded_groups(masks, c.first_token, unit.tokens));
    const ByOutput<std::int32_t> bias(unit.bias, at, 0, unit.width);
    Totals totals = {};
    totals.for_all([&](std::uint32_t, std::uint32_t n, std::uint32_t i, std::int32_t& total) {
        total = bias.v[n][i % 2];
    });
    for (std::uint32_t k = 0; k + 1 < unit.term_count; ++k) terms.add_prediction(totals);
    fetch_coefficients();
    terms.add_transform(totals);
    put_states(c, unit, at, totals);
    __syncthreads();  // states are there; the coefficients have been read
}

__global__ void __launch_bounds__(kProjectThreads, 1)
    chain_tiles(Memory memory, const ChainTask* chains, const ChainTile* tiles, const UnitTask* units) {
    __shared__ UnitTask tasks[kTasksAhead + 1];
    const ChainTile tile = tiles[blockIdx.x];
    const ChainTask& task = chains[tile.chain];
    const Chain c = {task,   units + task.first_unit, dynamic_shared<std::byte>(),
                     memory, tile.first_token,        lesser(kProjectTokens, task.tokens - tile.first_token)};
    for (std::uint32_t u = 0; u < kTasksAhead && u < task.units; ++u) copy_task(tasks[u], c.units[u]);
    commit_copies();
    load_token_features(c);
    wait_copies<0>();
    __syncthreads();
    for (std::uint32_t u = 0; u < task.units; ++u) {
        copy_coefficients(c, tasks[u % (kTasksAhead + 1)]);
        if (u + kTasksAhead < task.units)
            copy_task(tasks[(u + kTasksAhead) % (kTasksAhead + 1)], c.units[u + kTasksAhead]);
        commit_copies();
        make_unit(c, tasks[u % (kTasksAhead + 1)]);
    }
}

}  // namespace

cudaError_t launch_chain(Memory memory, const ChainBatch& batch, cudaStream_t stream) {
    if (batch.tile_count == 0) return cudaSuccess;
    const cudaError_t e = cudaFuncSetAttribute(chain_tiles, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                               static_cast<int>(batch.shared_bytes));
    if (e != cudaSuccess) return e;
    return launch(chain_tiles, {batch.tile_count, kProjectThreads, batch.shared_bytes}, stream, memory,
                  batch.chains, batch.tiles, batch.units);
}

}  // namespace kvcast::kernels::cuda
