// The klt profile: exact rows, gains and coefficients out of the blocks. FORMAT.md, section 11.2.
#include "kernels/cuda/exact_rows.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/platform.cuh"
#include "kernels/cuda/warp_rans.cuh"

namespace kvcast::kernels::cuda {
namespace {

constexpr std::int32_t kGainLimit = 15;

// The coefficients of one token that have their classes in the lanes: group first_group + i in lane i, class
// 0 where there is no such group. What reads a group is loaded while the group before is read. Which groups
// are coded; the others are zero.
__device__ std::uint32_t decode_groups(WarpReader& in, unsigned spread_class, std::uint32_t first_group,
                                       std::uint32_t width, unsigned multiplier, std::int16_t* row) {
    const auto reader_of = [&](std::uint32_t coded) {
        return in.reader_of(__shfl_sync(kFullWarp, spread_class, __ffs(static_cast<int>(coded)) - 1));
    };
    const std::uint32_t all_coded = __ballot_sync(kFullWarp, spread_class != 0);
    std::uint32_t coded = all_coded;
    for (std::uint32_t i = 0; i < kLanes && klt_group_begin(first_group + i) < width; ++i) {
        const std::uint32_t at = klt_group_begin(first_group + i) + lane_id();
        if ((coded >> i & 1u) == 0 && at < width) row[at] = 0;
    }
    if (coded == 0) return 0;
    for (ClassReader next = reader_of(coded); coded != 0;) {
        const ClassReader present = next;
        const std::uint32_t group =
            first_group + static_cast<std::uint32_t>(__ffs(static_cast<int>(coded))) - 1;
        coded &= coded - 1;
        if (coded != 0) next = reader_of(coded);
        const std::uint32_t first = klt_group_begin(group);
        in.strip(present, klt_group_end(group, width) - first, [&](std::uint32_t i, std::int16_t q) {
            row[first + i] = scaled_coefficient(q, multiplier);
        });
    }
    return all_coded;
}

// One part's coefficients, token by token; every group of 32 has a class of its own.
__device__ void decode_part(WarpReader& in, const KltRunTask& run, const KltPlaneTask& plane,
                            std::uint32_t part, const std::int16_t* gains, const std::uint8_t* levels,
                            std::int16_t* coefficients, std::uint32_t* masks) {
    const std::uint32_t groups = klt_groups(plane.part_width);
    const std::uint32_t width = plane.parts * plane.part_width;
    const std::int8_t* classes = plane.classes + part * run.level_count * groups;
    for (std::uint32_t first = 0; first < run.body_tokens; first += kLanes) {
        const std::uint32_t tokens = lesser(kLanes, run.body_tokens - first),
                            own = lesser(lane_id(), tokens - 1);
        const std::int16_t lane_gain = gains[first + own];
        const std::uint32_t lane_level = levels[first + own];
        const std::uint32_t lane_multiplier = run.multipliers[lane_level];
        std::uint32_t lane_mask = 0;
        for (std::uint32_t t = 0; t < tokens; ++t) {
            const auto lane = static_cast<int>(t);
            const std::int16_t gain = __shfl_sync(kFullWarp, lane_gain, lane);
            const std::int8_t* of_level = classes + __shfl_sync(kFullWarp, lane_level, lane) * groups;
            const unsigned multiplier = __shfl_sync(kFullWarp, lane_multiplier, lane);
            std::int16_t* row = coefficients + std::uint64_t{first + t} * width + part * plane.part_width;
            for (std::uint32_t g = 0; g < groups; g += kLanes) {
                const std::uint32_t group = g + lane_id();
                const unsigned spread_class = group < groups ? klt_class(of_level[group], gain) : 0;
                const std::uint32_t coded =
                    decode_groups(in, spread_class, g, plane.part_width, multiplier, row);
                if (g == 0 && lane_id() == t) lane_mask = coded;
            }
        }
        if (lane_id() < tokens) masks[first + lane_id()] = lane_mask;
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
        auto* masks = reinterpret_cast<std::uint32_t*>(memory.workspace + plane.masks);
        for (std::uint32_t part = 0; part < plane.parts; ++part, next += run.body_tokens)
            decode_part(in, run, plane, part, next, levels, coefficients, masks + part * run.body_tokens);
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

}  // namespace

cudaError_t launch_klt_decode(Memory memory, const KltPlaneTask* planes, const KltPieceTask* pieces,
                              const KltRunTask* runs, std::uint32_t count, const AliasTable* tables,
                              std::uint32_t* status, cudaStream_t stream) {
    return launch(decode_runs, {count, kLanes}, stream, memory, planes, pieces, runs, tables, status);
}

}  // namespace kvcast::kernels::cuda
