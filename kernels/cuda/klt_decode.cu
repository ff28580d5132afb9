// The klt profile: exact rows, gains and coefficients out of the blocks. FORMAT.md, section 11.2.
#include "kernels/cuda/exact_rows.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/platform.cuh"
#include "kernels/cuda/warp_rans.cuh"

namespace kvcast::kernels::cuda {
namespace {

constexpr std::int32_t kGainLimit = 15;

// The steps of some tokens: a group of coefficients each, of those that have bits.
constexpr std::uint32_t kMostSteps = 1024;

struct Shared {
    WordRing::Memory ring;
    AliasTable tables[kFirstExponentTable];  // of classes
    std::uint32_t steps[kMostSteps];
};

// How a step is read, and what it is of.
struct StepReader : ClassReader {
    std::uint32_t count;
    std::uint32_t token;
    std::uint32_t group;
    std::uint32_t multiplier;
};

__device__ std::uint32_t pack_step(unsigned spread_class, std::uint32_t count, std::uint32_t token,
                                   std::uint32_t group) {
    return spread_class | (count - 1) << 5 | token << 10 | group << 15;
}
// The sum over the lanes before this one.
__device__ std::uint32_t sum_before(std::uint32_t v) {
    std::uint32_t sum = v;
    for (unsigned step = 1; step < kLanes; step *= 2) {
        const std::uint32_t other = __shfl_up_sync(kFullWarp, sum, step);
        if (lane_id() >= step) sum += other;
    }
    return sum - v;
}

// What a lane knows of its token.
struct LaneToken {
    const std::int8_t* classes;  // [group], at gain 0
    std::int16_t gain;
    std::uint32_t multiplier;
    bool inside;
};

__device__ StepReader unpack_step(const Shared& shared, const LaneToken& lane, std::uint32_t step) {
    const std::uint32_t token = step >> 10 & 31u;
    return {ClassReader::load(shared.tables, step & 31u), (step >> 5 & 31u) + 1, token, step >> 15,
            __shfl_sync(kFullWarp, lane.multiplier, static_cast<int>(token))};
}

// Steps of the lanes' tokens, token by token, into shared memory; how many. `mask` gets which of the token's
// first 32 groups are coded.
__device__ std::uint32_t list_steps(Shared& shared, const LaneToken& token, std::uint32_t width,
                                    std::uint32_t& mask) {
    const std::uint32_t groups = token.inside ? klt_groups(width) : 0;
    std::uint32_t own = 0;
    mask = 0;
    for (std::uint32_t g = 0; g < groups; ++g) {
        const bool coded = klt_class(token.classes[g], token.gain) != 0;
        own += coded ? 1 : 0;
        if (coded && g < 32) mask |= 1u << g;
    }
    __syncwarp();
    std::uint32_t at = sum_before(own);
    const std::uint32_t count = __shfl_sync(kFullWarp, at + own, kLanes - 1);
    __syncwarp();  // the steps before have been read
    for (std::uint32_t g = 0; g < groups; ++g) {
        const unsigned spread_class = klt_class(token.classes[g], token.gain);
        if (spread_class == 0) continue;
        shared.steps[at++] =
            pack_step(spread_class, klt_group_end(g, width) - klt_group_begin(g), lane_id(), g);
    }
    __syncwarp();
    return count;
}

// Zeros in every row of the lanes' tokens.
__device__ void clear_rows(std::int16_t* rows, std::uint32_t tokens, std::uint32_t stride,
                           std::uint32_t width) {
    if (stride == width && stride % 8 == 0) {  // rows begin at a multiple of 16 bytes
        auto* at = reinterpret_cast<uint4*>(rows);
        for (std::uint32_t i = lane_id(); i < tokens * (width / 8); i += kLanes) at[i] = uint4{0, 0, 0, 0};
        return;
    }
    for (std::uint32_t t = 0; t < tokens; ++t) {
        for (std::uint32_t i = lane_id(); i < width; i += kLanes) rows[t * std::uint64_t{stride} + i] = 0;
    }
}

struct Part {
    const std::int8_t* classes;  // [level][group]
    const std::int16_t* gains;   // [token]
    const std::uint8_t* levels;  // [token]
    std::int16_t* coefficients;  // [token][stride]
    std::uint32_t* masks;        // [token]
    std::uint32_t width;
    std::uint32_t stride;
};

// One part's coefficients, token by token; every group of 32 has a class of its own.
__device__ void decode_part(WarpReader& in, Shared& shared, const KltRunTask& run, const Part& part) {
    const std::uint32_t groups = klt_groups(part.width), at_once = lesser(kLanes, kMostSteps / groups);
    for (std::uint32_t first = 0; first < run.body_tokens; first += at_once) {
        const std::uint32_t tokens = lesser(at_once, run.body_tokens - first);
        const std::uint32_t own = first + lesser(lane_id(), tokens - 1);
        const std::uint32_t level = part.levels[own];
        const LaneToken token = {part.classes + level * groups, part.gains[own], run.multipliers[level],
                                 lane_id() < tokens};
        std::uint32_t mask = 0;
        const std::uint32_t count = list_steps(shared, token, part.width, mask);
        if (token.inside) part.masks[own] = mask;
        __syncwarp();
        std::int16_t* rows = part.coefficients + std::uint64_t{first} * part.stride;
        clear_rows(rows, tokens, part.stride, part.width);
        __syncwarp();  // zeros first
        in.steps(
            count, [&](std::uint32_t i) { return unpack_step(shared, token, shared.steps[i]); },
            [&](const StepReader& step, std::int16_t q) {
                rows[std::uint64_t{step.token} * part.stride + klt_group_begin(step.group) + lane_id()] =
                    scaled_coefficient(q, step.multiplier);
            });
    }
}

__device__ bool decode_piece(WarpReader& in, Shared& shared, const KltRunTask& run,
                             const KltPlaneTask* planes, Memory memory) {
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
        auto* masks = reinterpret_cast<std::uint32_t*>(memory.workspace + plane.masks);
        const std::uint32_t groups = klt_groups(plane.part_width);
        for (std::uint32_t part = 0; part < plane.parts; ++part, next += run.body_tokens) {
            decode_part(in, shared, run,
                        {plane.classes + part * run.level_count * groups, next, levels,
                         coefficients + part * plane.part_width, masks + part * run.body_tokens,
                         plane.part_width, plane.parts * plane.part_width});
        }
    }
    __syncwarp();  // the next layer's gains overwrite this one's
    return fits;
}

__global__ void __launch_bounds__(kLanes)
    decode_runs(Memory memory, const KltPlaneTask* planes, const KltPieceTask* pieces, const KltRunTask* runs,
                const AliasTable* tables, std::uint32_t* status) {
    __shared__ Shared shared;
    for (std::uint32_t t = 0; t < kFirstExponentTable; ++t) {
        for (std::uint32_t i = lane_id(); i < 2 * kSymbols; i += kLanes) {
            shared.tables[t].entry[i] = tables[t].entry[i];
            if (i < kSymbols) shared.tables[t].divider[i] = tables[t].divider[i];
        }
    }
    __syncwarp();
    const KltRunTask run = runs[blockIdx.x];  // a copy: stores cannot change it
    const KltPieceTask* piece = pieces + run.first_piece;
    WarpReader in(piece->begin, piece->bytes, tables, shared.ring);
    for (std::uint32_t i = 0; i < run.pieces; ++i, ++piece) {
        if (i != 0) in.next_piece(piece->begin, piece->bytes);
        const bool fits = decode_piece(in, shared, run, planes + piece->plane, memory);
        const std::uint32_t words = i + 1 == run.pieces ? in.close() : in.check_used();
        if (lane_id() == 0) status[run.first_status + i] = words | (fits ? 0u : kOutOfRange);
    }
}

}  // namespace

cudaError_t launch_klt_decode(Memory memory, const KltPlaneTask* planes, const KltPieceTask* pieces,
                              const KltRunTask* runs, std::uint32_t count, const AliasTable* tables,
                              std::uint32_t* status, cudaStream_t stream) {
    return launch(decode_runs, {count, kLanes}, stream, memory, planes, pieces, runs, tables, status);
}

}  // namespace kvcast::kernels::cuda
