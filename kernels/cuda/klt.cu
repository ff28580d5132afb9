// The klt profile: coefficients out of the blocks, then states by integer projections. FORMAT.md, section 11.
#include "kernels/cuda/exact_rows.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/platform.cuh"
#include "kernels/cuda/warp_rans.cuh"

namespace kvcast::kernels::cuda {
namespace {

constexpr std::int32_t kGainLimit = 15;

// ---- coefficients

// The coefficients of one token that have their classes in the lanes: group first_group + i in lane i, class 0
// where there is no such group. What reads a group is loaded while the group before is read.
__device__ void decode_groups(WarpReader& in, unsigned spread_class, std::uint32_t first_group,
                              std::uint32_t width, unsigned multiplier, std::int16_t* row) {
    const auto reader_of = [&](std::uint32_t coded) {
        return in.reader_of(__shfl_sync(kFullWarp, spread_class, __ffs(static_cast<int>(coded)) - 1));
    };
    std::uint32_t coded = __ballot_sync(kFullWarp, spread_class != 0);
    for (std::uint32_t i = 0; i < kLanes && klt_group_begin(first_group + i) < width; ++i) {
        const std::uint32_t at = klt_group_begin(first_group + i) + lane_id();
        if ((coded >> i & 1u) == 0 && at < width) row[at] = 0;
    }
    if (coded == 0) return;
    for (ClassReader next = reader_of(coded); coded != 0;) {
        const ClassReader present = next;
        const std::uint32_t group = first_group + static_cast<std::uint32_t>(__ffs(static_cast<int>(coded))) - 1;
        coded &= coded - 1;
        if (coded != 0) next = reader_of(coded);
        const std::uint32_t first = klt_group_begin(group);
        in.strip(present, klt_group_end(group, width) - first, [&](std::uint32_t i, std::int16_t q) {
            row[first + i] = scaled_coefficient(q, multiplier);
        });
    }
}

// One part's coefficients, token by token; every group of 32 has a class of its own.
__device__ void decode_part(WarpReader& in, const KltRunTask& run, const KltPlaneTask& plane,
                            std::uint32_t part, const std::int16_t* gains, const std::uint8_t* levels,
                            std::int16_t* coefficients) {
    const std::uint32_t groups = klt_groups(plane.part_width);
    const std::uint32_t width = plane.parts * plane.part_width;
    const std::int8_t* classes = plane.classes + part * run.level_count * groups;
    for (std::uint32_t first = 0; first < run.body_tokens; first += kLanes) {
        const std::uint32_t tokens = lesser(kLanes, run.body_tokens - first), own = lesser(lane_id(), tokens - 1);
        const std::int16_t lane_gain = gains[first + own];
        const std::uint32_t lane_level = levels[first + own];
        const std::uint32_t lane_multiplier = run.multipliers[lane_level];
        for (std::uint32_t t = 0; t < tokens; ++t) {
            const auto lane = static_cast<int>(t);
            const std::int16_t gain = __shfl_sync(kFullWarp, lane_gain, lane);
            const std::int8_t* of_level = classes + __shfl_sync(kFullWarp, lane_level, lane) * groups;
            const unsigned multiplier = __shfl_sync(kFullWarp, lane_multiplier, lane);
            std::int16_t* row =
                coefficients + std::uint64_t{first + t} * width + part * plane.part_width;
            for (std::uint32_t g = 0; g < groups; g += kLanes) {
                const std::uint32_t group = g + lane_id();
                const unsigned spread_class = group < groups ? klt_class(of_level[group], gain) : 0;
                decode_groups(in, spread_class, g, plane.part_width, multiplier, row);
            }
        }
    }
}

__device__ bool decode_piece(WarpReader& in, const KltRunTask& run, const KltPlaneTask* planes,
                             Memory memory) {
    const std::uint64_t exact_bytes = element_bytes(true, run.source);
    bool fits = true;
    for (std::uint32_t p = 0; p < run.planes; ++p) {
        const KltPlaneTask plane = planes[p];
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
        const KltPlaneTask plane = planes[p];
        auto* coefficients = reinterpret_cast<std::int16_t*>(memory.workspace + plane.coefficients);
        for (std::uint32_t part = 0; part < plane.parts; ++part, next += run.body_tokens)
            decode_part(in, run, plane, part, next, levels, coefficients);
    }
    __syncwarp();  // the next layer's gains overwrite this one's
    return fits;
}

__global__ void __launch_bounds__(kLanes)
    decode_runs(Memory memory, const KltPlaneTask* planes, const KltPieceTask* pieces, const KltRunTask* runs,
                const AliasTable* tables, std::uint32_t* status) {
    __shared__ WordRing::Memory ring;
    const KltRunTask run = runs[blockIdx.x];  // a copy: stores cannot change it
    const KltPieceTask* piece = pieces + run.first_piece;
    WarpReader in(piece->begin, piece->bytes, tables, ring);
    for (std::uint32_t i = 0; i < run.pieces; ++i, ++piece) {
        if (i != 0) in.next_piece(piece->begin, piece->bytes);
        const bool fits = decode_piece(in, run, planes + piece->plane, memory);
        const std::uint32_t words = i + 1 == run.pieces ? in.close() : in.check_used();
        if (lane_id() == 0) status[run.first_status + i] = words | (fits ? 0u : kOutOfRange);
    }
}

// ---- projections

// A block of threads makes the states of 64 tokens x 64 outputs, a warp those of 16 x 32, on the tensor
// cores: inputs go by in steps of 32 through shared memory, in limbs of 8 bits (kernels/cuda/limbs.h). A step
// in which all of the tile's features are zero, as most coefficients are, costs a look at them; one in which
// a warp's are, no multiplication. Sums are exact: limb by limb in 32 bits, together modulo 2^32, and the
// calibration's reader bounds every row's norm so that the whole fits.
constexpr std::uint32_t kProjectThreads = 256;
constexpr std::uint32_t kWarpTokens = 16;
constexpr std::uint32_t kWarpOutputs = 32;
constexpr std::uint32_t kProducts = kWarpOutputs / 8;  // of a warp: 16 x 8 each
constexpr std::uint32_t kPitch = kUnitStep + 16;       // bytes; a fragment's 32 words lie in 32 banks

struct alignas(16) UnitTile {
    std::uint8_t features[2][kUnitTokens][kPitch];  // high limbs, low limbs
    std::uint8_t matrix[2][kUnitOutputs][kPitch];
};

struct alignas(16) Piece {
    std::uint32_t words[4];
};

__device__ std::uint32_t load_word(const std::uint8_t* p) {
    return *reinterpret_cast<const std::uint32_t*>(p);
}
__device__ void store_word(std::uint8_t* p, std::uint32_t word) {
    *reinterpret_cast<std::uint32_t*>(p) = word;
}

// Eight features of a thread into both limbs' planes, zeros outside. Whether any is not zero.
__device__ bool load_features(UnitTile& tile, const UnitTask& unit, const ProjectionTerm& term,
                              const std::int16_t* rows, std::uint32_t first_token,
                              std::uint32_t first_input) {
    const std::uint32_t t = threadIdx.x / 4, k = threadIdx.x % 4 * 8;
    std::uint32_t high[2] = {}, low[2] = {};
    for (std::uint32_t i = 0; i < 8; ++i) {
        const bool inside = first_token + t < unit.tokens && first_input + k + i < term.inputs;
        const std::uint32_t f =
            inside ? static_cast<std::uint16_t>(
                         rows[std::uint64_t{first_token + t} * term.stride + first_input + k + i])
                   : 0u;
        high[i / 4] |= f >> 8 << i % 4 * 8;
        low[i / 4] |= (f & 255u) << i % 4 * 8;
    }
    for (std::uint32_t i = 0; i < 2; ++i) {
        store_word(&tile.features[0][t][k + 4 * i], high[i]);
        store_word(&tile.features[1][t][k + 4 * i], low[i]);
    }
    return (high[0] | high[1] | low[0] | low[1]) != 0;
}

__device__ void load_matrix(UnitTile& tile, const ProjectionTerm& term, const std::uint8_t* limbs) {
    constexpr std::uint32_t pieces = kUnitStep / sizeof(Piece);
    for (std::uint32_t i = threadIdx.x; i < term.limbs * kUnitOutputs * pieces; i += kProjectThreads) {
        const std::uint32_t limb = i / (kUnitOutputs * pieces), o = i / pieces % kUnitOutputs, k = i % pieces;
        *reinterpret_cast<Piece*>(&tile.matrix[limb][o][k * sizeof(Piece)]) =
            reinterpret_cast<const Piece*>(limbs)[i];
    }
}

__device__ FragmentA features_of(const std::uint8_t (&limb)[kUnitTokens][kPitch], std::uint32_t token) {
    const std::uint32_t g = lane_id() / 4, k = lane_id() % 4 * 4;
    return {{load_word(&limb[token + g][k]), load_word(&limb[token + g + 8][k]),
             load_word(&limb[token + g][16 + k]), load_word(&limb[token + g + 8][16 + k])}};
}

__device__ FragmentB matrix_of(const std::uint8_t (&limb)[kUnitOutputs][kPitch], std::uint32_t output) {
    const std::uint32_t g = lane_id() / 4, k = lane_id() % 4 * 4;
    return {{load_word(&limb[output + g][k]), load_word(&limb[output + g][16 + k])}};
}

// Sums of limb products that count 1, 2^8 and 2^16.
struct LimbSums {
    Sums by_weight[3];

    __device__ std::int32_t total(std::uint32_t i) const {
        return static_cast<std::int32_t>((static_cast<std::uint32_t>(by_weight[2].r[i]) << 16) +
                                         (static_cast<std::uint32_t>(by_weight[1].r[i]) << 8) +
                                         static_cast<std::uint32_t>(by_weight[0].r[i]));
    }
};

__device__ void multiply_step(const UnitTile& tile, std::uint32_t limbs, std::uint32_t token,
                              std::uint32_t output, LimbSums (&sums)[kProducts]) {
    const FragmentA high = features_of(tile.features[0], token), low = features_of(tile.features[1], token);
    std::uint32_t any = 0;
    for (std::uint32_t i = 0; i < 4; ++i) any |= high.r[i] | low.r[i];
    if (__any_sync(kFullWarp, any != 0) == 0) return;
    for (std::uint32_t n = 0; n < kProducts; ++n) {
        const FragmentB m = matrix_of(tile.matrix[0], output + 8 * n);
        if (limbs == 1) {
            multiply_add<true, true>(sums[n].by_weight[1], high, m);
            multiply_add<false, true>(sums[n].by_weight[0], low, m);
            continue;
        }
        multiply_add<true, true>(sums[n].by_weight[2], high, m);
        multiply_add<false, true>(sums[n].by_weight[1], low, m);
        const FragmentB rest = matrix_of(tile.matrix[1], output + 8 * n);
        multiply_add<true, false>(sums[n].by_weight[1], high, rest);
        multiply_add<false, false>(sums[n].by_weight[0], low, rest);
    }
}

// Sum i of a lane is for this token and output of the product's 16 x 8.
__device__ std::uint32_t token_of(std::uint32_t i) {
    return lane_id() / 4 + i / 2 * 8;
}
__device__ std::uint32_t output_of(std::uint32_t i) {
    return lane_id() % 4 * 2 + i % 2;
}

// Where a thread's sums lie in the tile: product n, sum i.
struct SumPlace {
    std::uint32_t token;   // of the unit
    std::uint32_t output;  // may lie outside, as the token may
};

struct WarpTile {
    std::uint32_t first_token;
    std::uint32_t first_output;
    std::uint32_t token;  // of the warp's part, in the tile
    std::uint32_t output;

    __device__ SumPlace place(std::uint32_t n, std::uint32_t i) const {
        return {first_token + token + token_of(i), first_output + output + 8 * n + output_of(i)};
    }
};

__device__ WarpTile warp_tile(const UnitTask& unit) {
    const std::uint32_t local = blockIdx.x - unit.first_tile, warp = threadIdx.x / kLanes;
    const std::uint32_t across = div_up(unit.width, kUnitOutputs);
    return {local / across * kUnitTokens, local % across * kUnitOutputs, warp % 4 * kWarpTokens,
            warp / 4 * kWarpOutputs};
}

// The sums of one term over a tile's tokens and outputs.
__device__ void multiply_term(UnitTile& tile, const UnitTask& unit, const ProjectionTerm& term,
                              const WarpTile& at, Memory memory, LimbSums (&sums)[kProducts]) {
    const auto* rows = reinterpret_cast<const std::int16_t*>(
        (term.in_image ? memory.image : memory.workspace) + term.features);
    const std::uint32_t steps = div_up(term.inputs, kUnitStep), across = div_up(unit.width, kUnitOutputs);
    for (std::uint32_t step = 0; step < steps; ++step) {
        const bool nonzero = load_features(tile, unit, term, rows, at.first_token, step * kUnitStep);
        if (__syncthreads_or(nonzero) == 0) continue;
        const std::uint64_t index = std::uint64_t{step} * across + at.first_output / kUnitOutputs;
        load_matrix(tile, term, term.matrix + index * term.limbs * kLimbTileBytes);
        __syncthreads();
        multiply_step(tile, term.limbs, at.token, at.output, sums);
        __syncthreads();
    }
}

// A decoder goes from the bias to states at once. An encoder stops at the prediction, and goes on from there
// when it has chosen coefficients.
enum class Stage : std::uint8_t { kWhole, kPrediction, kReconstruction };

template <Stage S>
__global__ void project_tiles(Memory memory, const UnitTask* units, std::uint32_t count) {
    __shared__ UnitTile tile;
    const UnitTask& unit = units[task_of<&UnitTask::first_tile>(units, count, blockIdx.x)];
    const WarpTile at = warp_tile(unit);
    auto* predicted = reinterpret_cast<std::int32_t*>(memory.workspace + unit.sums);
    auto* states = reinterpret_cast<std::int16_t*>(memory.workspace + unit.states);

    const auto for_all = [&](auto work) {
        for (std::uint32_t n = 0; n < kProducts; ++n) {
            for (std::uint32_t i = 0; i < 4; ++i) {
                const SumPlace p = at.place(n, i);
                if (p.token < unit.tokens && p.output < unit.width)
                    work(n, i, p.output, std::uint64_t{p.token} * unit.stride + p.output);
            }
        }
    };
    std::int32_t totals[kProducts][4] = {};
    for_all([&](std::uint32_t n, std::uint32_t i, std::uint32_t output, std::uint64_t index) {
        totals[n][i] = S == Stage::kReconstruction ? predicted[index] : unit.bias[output];
    });
    const std::uint32_t first = S == Stage::kReconstruction ? unit.term_count - 1 : 0;
    const std::uint32_t end = S == Stage::kPrediction ? unit.term_count - 1 : unit.term_count;
    for (std::uint32_t k = first; k < end; ++k) {
        const ProjectionTerm term = unit.terms[k];
        LimbSums sums[kProducts] = {};
        multiply_term(tile, unit, term, at, memory, sums);
        for_all([&](std::uint32_t n, std::uint32_t i, std::uint32_t output, std::uint64_t) {
            totals[n][i] += shifted_sum(sums[n].total(i), term.shifts[output]);
        });
    }
    for_all([&](std::uint32_t n, std::uint32_t i, std::uint32_t, std::uint64_t index) {
        if constexpr (S == Stage::kPrediction) {
            predicted[index] = totals[n][i];
        } else {
            states[index] = saturate16(totals[n][i]);
        }
    });
}

}  // namespace

cudaError_t launch_klt_decode(Memory memory, const KltPlaneTask* planes, const KltPieceTask* pieces,
                              const KltRunTask* runs, std::uint32_t count, const AliasTable* tables,
                              std::uint32_t* status, cudaStream_t stream) {
    return launch(decode_runs, {count, kLanes}, stream, memory, planes, pieces, runs, tables, status);
}

cudaError_t launch_project(Memory memory, const UnitTask* units, std::uint32_t count, std::uint32_t tiles,
                           cudaStream_t stream) {
    return launch(project_tiles<Stage::kWhole>, {tiles, kProjectThreads}, stream, memory, units, count);
}

cudaError_t launch_predict(Memory memory, const UnitTask* units, std::uint32_t count, std::uint32_t tiles,
                           cudaStream_t stream) {
    return launch(project_tiles<Stage::kPrediction>, {tiles, kProjectThreads}, stream, memory, units, count);
}

cudaError_t launch_reconstruct(Memory memory, const UnitTask* units, std::uint32_t count, std::uint32_t tiles,
                               cudaStream_t stream) {
    return launch(project_tiles<Stage::kReconstruction>, {tiles, kProjectThreads}, stream, memory, units,
                  count);
}

}  // namespace kvcast::kernels::cuda
