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

// All limbs of a term, steps 0 on; `todo` is what of the first 32 steps is worth it.
template <typename Rows>
__device__ __forceinline__ void multiply_term(const Rows& rows, const UnitTask& unit,
                                              const ProjectionTerm& term, const WarpPlace& at,
                                              std::uint32_t todo, const Shifts& shifts, LimbSums& sums) {
    const std::uint32_t steps = div_up(term.inputs, kUnitStep);
    for (std::uint32_t limb = 0; limb < term.limbs; ++limb) {
        const LimbFragments matrix(term, limb, unit.width, at.output);
        if (limb == 0) {
            multiply_steps<true>(rows, matrix, 0, todo & all_steps(steps), sums);
        } else {
            sums.fold(shifts);
            multiply_steps<false>(rows, matrix, 0, todo & all_steps(steps), sums);
        }
    }
}

// A term on what is resident.
__device__ __forceinline__ void add_prediction(const Chain& c, const UnitTask& unit, std::uint32_t k,
                                               const WarpPlace& at, Totals& totals) {
    const ProjectionTerm& term = unit.terms[k];
    const std::byte* features = c.shared + term.resident;
    const std::uint32_t steps = div_up(term.inputs, kUnitStep);
    const Shifts shifts(term.shifts, at, 0, unit.width);
    LimbSums sums(shifts, term.limbs == 1);
    if (term.narrow) {
        multiply_term(NarrowRows{features, steps}, unit, term, at, ~0u, shifts, sums);
    } else {
        multiply_term(SplitRows{features, steps}, unit, term, at, ~0u, shifts, sums);
    }
    totals.add(sums, shifts);
}

// The last term, on coefficients.
__device__ __forceinline__ void add_transform(const Chain& c, const UnitTask& unit, const WarpPlace& at,
                                              std::uint32_t masked, Totals& totals) {
    const ProjectionTerm& term = unit.terms[unit.term_count - 1];
    const Shifts shifts(term.shifts, at, 0, unit.width);
    LimbSums sums(shifts, term.limbs == 1);
    multiply_term(WideRows{c.shared + c.task.coefficients, wide_pitch(term.inputs)}, unit, term, at, masked,
                  shifts, sums);
    totals.add(sums, shifts);
}

// States to the workspace, and to shared memory where units are predicted from them. Widths are even.
__device__ __forceinline__ void put_states(const Chain& c, const UnitTask& unit, const WarpPlace& at,
                                           const Totals& totals) {
    auto* states = c.memory.workspace + unit.states;
    for (std::uint32_t m = 0; m < kTokenTiles; ++m) {
        for (std::uint32_t n = 0; n < kOutputTiles; ++n) {
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

__device__ void make_unit(const Chain& c, const UnitTask& unit) {
    const WarpPlace at = warp_place();
    const bool inside = at.output < unit.width;
    std::uint32_t masked = 0;
    Totals totals = {};
    if (inside) {
        masked = coded_groups(reinterpret_cast<const std::uint32_t*>(c.memory.workspace + unit.masks),
                              c.first_token, unit.tokens);
        const ByOutput<std::int32_t> bias(unit.bias, at, 0, unit.width);
        totals.for_all([&](std::uint32_t, std::uint32_t n, std::uint32_t i, std::int32_t& total) {
            total = bias.v[n][i % 2];
        });
        for (std::uint32_t k = 0; k + 1 < unit.term_count; ++k) add_prediction(c, unit, k, at, totals);
    }
    wait_copies<0>();
    __syncthreads();  // the coefficients are there; nobody reads former states, in whose place these go
    if (inside) {
        add_transform(c, unit, at, masked, totals);
        put_states(c, unit, at, totals);
    }
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
