// The klt profile: coefficients out of the blocks, then states by integer projections. FORMAT.md, section 11.
#include "kernels/cuda/exact_rows.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/platform.cuh"
#include "kernels/cuda/warp_rans.cuh"

namespace kvcast::kernels::cuda {
namespace {

constexpr std::int32_t kGainLimit = 15;
constexpr std::uint32_t kThreads = 128;

// ---- coefficients

// One part's coefficients, token by token; every group of 32 has a class of its own.
__device__ void decode_part(WarpReader& in, const KltRunTask& run, const KltPlaneTask& plane,
                            std::uint32_t part, const std::int16_t* gains, const std::uint8_t* levels,
                            std::int16_t* coefficients) {
    const std::uint32_t groups = div_up(plane.part_width, kLanes);
    const std::uint32_t width = plane.parts * plane.part_width;
    const std::int8_t* classes = plane.classes + part * run.level_count * groups;
    for (std::uint32_t t = 0; t < run.body_tokens; ++t) {
        const std::uint32_t level = levels[t];
        const unsigned multiplier = run.multipliers[level];
        std::int16_t* row = coefficients + std::uint64_t{t} * width + part * plane.part_width;
        for (std::uint32_t g = 0; g < groups; ++g) {
            const std::uint32_t first = g * kLanes;
            const std::uint32_t count = plane.part_width - first < kLanes ? plane.part_width - first : kLanes;
            in.strip(
                klt_class(classes[level * groups + g], gains[t]), count,
                [&](std::uint32_t i, std::int16_t q) { row[first + i] = scaled_coefficient(q, multiplier); });
        }
    }
}

__device__ bool decode_piece(WarpReader& in, const KltRunTask& run, const KltPlaneTask* planes,
                             Memory memory) {
    const std::uint64_t exact_bytes = element_bytes(true, run.source);
    bool fits = true;
    for (std::uint32_t p = 0; p < run.planes; ++p) {
        const KltPlaneTask& plane = planes[p];
        for (std::uint32_t head = 0; head < plane.heads; ++head) {
            std::byte* out =
                memory.workspace + plane.rows + head * exact_bytes * run.exact_tokens * plane.channels;
            fits = read_exact_rows(in, run.source, run.exact_tokens, plane.channels, out) && fits;
        }
    }
    auto* gains = reinterpret_cast<std::int16_t*>(memory.workspace + run.gains);
    std::int16_t* next = gains;
    for (std::uint32_t p = 0; p < run.planes; ++p) {
        for (std::uint32_t part = 0; part < planes[p].parts; ++part, next += run.body_tokens)
            fits = in.vector(run.body_tokens, -kGainLimit, kGainLimit, next) && fits;
    }
    const auto* levels = reinterpret_cast<const std::uint8_t*>(memory.image + run.levels);
    next = gains;
    for (std::uint32_t p = 0; p < run.planes; ++p) {
        auto* coefficients = reinterpret_cast<std::int16_t*>(memory.workspace + planes[p].coefficients);
        for (std::uint32_t part = 0; part < planes[p].parts; ++part, next += run.body_tokens)
            decode_part(in, run, planes[p], part, next, levels, coefficients);
    }
    __syncwarp();  // the next layer's gains overwrite this one's
    return fits;
}

__global__ void decode_runs(Memory memory, const KltPlaneTask* planes, const KltPieceTask* pieces,
                            const KltRunTask* runs, const AliasTable* tables, std::uint32_t* status) {
    const KltRunTask& run = runs[blockIdx.x];
    const KltPieceTask* piece = pieces + run.first_piece;
    WarpReader in(piece->begin, piece->bytes, tables);
    for (std::uint32_t i = 0; i < run.pieces; ++i, ++piece) {
        if (i != 0) in.next_piece(piece->begin, piece->bytes);
        const bool fits = decode_piece(in, run, planes + piece->plane, memory);
        const std::uint32_t words = i + 1 == run.pieces ? in.close() : in.check_used();
        if (lane_id() == 0) status[run.first_status + i] = words | (fits ? 0u : kOutOfRange);
    }
}

// ---- projections

// A block of threads makes the states of 32 tokens x 64 outputs, a thread those of 4 x 4. Inputs go by in
// steps of 32 through shared memory; a step in which all of the tile's features are zero, as most
// coefficients are, costs a look at them and no multiplication. Sums are exact in 32 bits for any features:
// the calibration's reader bounds every row's norm.
constexpr std::uint32_t kStep = 32;
constexpr std::uint32_t kPerThread = 4;
constexpr std::uint32_t kColumns = kUnitOutputs / kPerThread;
static_assert(kThreads == kUnitTokens / kPerThread * kColumns);

struct UnitTile {
    std::int16_t features[kUnitTokens][kStep];
    std::int16_t matrix[kStep][kUnitOutputs];
};

// Fills the tile with one step of a term, zeros outside. Whether any feature is not zero, in all threads.
__device__ bool load_step(UnitTile& tile, const UnitTask& unit, const ProjectionTerm& term,
                          const std::byte* features, std::uint32_t first_token, std::uint32_t first_output,
                          std::uint32_t first_input) {
    const auto* rows = reinterpret_cast<const std::int16_t*>(features);
    bool nonzero = false;
    for (std::uint32_t i = threadIdx.x; i < kUnitTokens * kStep; i += kThreads) {
        const std::uint32_t t = i / kStep, k = i % kStep;
        const bool inside = first_token + t < unit.tokens && first_input + k < term.inputs;
        const std::int16_t f =
            inside ? rows[std::uint64_t{first_token + t} * term.stride + first_input + k] : std::int16_t{0};
        tile.features[t][k] = f;
        nonzero = nonzero || f != 0;
    }
    if (__syncthreads_or(nonzero) == 0) return false;
    for (std::uint32_t i = threadIdx.x; i < kStep * kUnitOutputs; i += kThreads) {
        const std::uint32_t k = i / kUnitOutputs, o = i % kUnitOutputs;
        const bool inside = first_output + o < unit.width && first_input + k < term.inputs;
        tile.matrix[k][o] = inside
                                ? term.matrix[std::uint64_t{first_input + k} * unit.width + first_output + o]
                                : std::int16_t{0};
    }
    __syncthreads();
    return true;
}

__device__ void multiply_step(const UnitTile& tile, std::uint32_t token, std::uint32_t output,
                              std::int32_t (&sums)[kPerThread][kPerThread]) {
    for (std::uint32_t k = 0; k < kStep; ++k) {
        std::int32_t m[kPerThread];
        for (std::uint32_t j = 0; j < kPerThread; ++j) m[j] = tile.matrix[k][output + j * kColumns];
        for (std::uint32_t i = 0; i < kPerThread; ++i) {
            const std::int32_t f = tile.features[token + i][k];
            for (std::uint32_t j = 0; j < kPerThread; ++j) sums[i][j] += f * m[j];
        }
    }
}

__global__ void project_tiles(Memory memory, const UnitTask* units, std::uint32_t count) {
    __shared__ UnitTile tile;
    const UnitTask& unit = units[task_of(units, count, blockIdx.x)];
    const std::uint32_t local = blockIdx.x - unit.first_tile;
    const std::uint32_t across = div_up(unit.width, kUnitOutputs);
    const std::uint32_t first_token = local / across * kUnitTokens;
    const std::uint32_t first_output = local % across * kUnitOutputs;
    // Outputs of a thread lie kColumns apart, so that a warp's reads of the matrix are neighbours.
    const std::uint32_t token = threadIdx.x / kColumns * kPerThread;
    const std::uint32_t output = threadIdx.x % kColumns;

    std::int32_t total[kPerThread][kPerThread];
    for (std::uint32_t j = 0; j < kPerThread; ++j) {
        const std::uint32_t o = first_output + output + j * kColumns;
        for (std::uint32_t i = 0; i < kPerThread; ++i) total[i][j] = o < unit.width ? unit.bias[o] : 0;
    }
    for (std::uint32_t n = 0; n < unit.term_count; ++n) {
        const ProjectionTerm& term = unit.terms[n];
        const std::byte* features = (term.in_image ? memory.image : memory.workspace) + term.features;
        std::int32_t sums[kPerThread][kPerThread] = {};
        for (std::uint32_t first_input = 0; first_input < term.inputs; first_input += kStep) {
            if (!load_step(tile, unit, term, features, first_token, first_output, first_input)) continue;
            multiply_step(tile, token, output, sums);
            __syncthreads();
        }
        for (std::uint32_t j = 0; j < kPerThread; ++j) {
            const std::uint32_t o = first_output + output + j * kColumns;
            if (o >= unit.width) continue;
            for (std::uint32_t i = 0; i < kPerThread; ++i)
                total[i][j] += shifted_sum(sums[i][j], term.shifts[o]);
        }
    }
    auto* states = reinterpret_cast<std::int16_t*>(memory.workspace + unit.states);
    for (std::uint32_t i = 0; i < kPerThread; ++i) {
        const std::uint32_t t = first_token + token + i;
        for (std::uint32_t j = 0; j < kPerThread; ++j) {
            const std::uint32_t o = first_output + output + j * kColumns;
            if (t < unit.tokens && o < unit.width)
                states[std::uint64_t{t} * unit.stride + o] = saturate16(total[i][j]);
        }
    }
}

}  // namespace

cudaError_t launch_klt_decode(Memory memory, const KltPlaneTask* planes, const KltPieceTask* pieces,
                              const KltRunTask* runs, std::uint32_t count, const AliasTable* tables,
                              std::uint32_t* status, cudaStream_t stream) {
    return launch(decode_runs, {count, kLanes}, stream, memory, planes, pieces, runs, tables, status);
}

cudaError_t launch_project(Memory memory, const UnitTask* units, std::uint32_t count, std::uint32_t tiles,
                           cudaStream_t stream) {
    return launch(project_tiles, {tiles, kThreads}, stream, memory, units, count);
}

}  // namespace kvcast::kernels::cuda
