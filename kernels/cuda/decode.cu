// Entropy decoding and reconstruction of the profiles delta and lossless: one warp per block, states left
// channel-major in the workspace.
//
// A strip is one channel of a head over all tokens, but rows of the output are tokens, and RoPE's partner of
// a channel comes half a head later: storing from here would write two bytes at a time, and hold back half a
// head. store.cu does it, from states that have just been written.
#include "kernels/cuda/exact_rows.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/platform.cuh"

namespace kvcast::kernels::cuda {
namespace {

constexpr std::uint32_t kMostWarps = 4;
constexpr std::uint32_t kSharedBytes = 48 << 10;

// Side information of a head, in shared memory: three numbers per channel.
struct SideVectors {
    std::int16_t* first;
    std::int16_t* second;
    std::int16_t* third;
};

constexpr std::uint32_t side_bytes(std::uint32_t channels) {
    return 3 * sizeof(std::int16_t) * (channels + channels % 2);
}

__device__ SideVectors side_vectors(std::uint32_t most_channels) {
    const std::uint32_t stride = most_channels + most_channels % 2;
    auto* mine = dynamic_shared<std::int16_t>() + threadIdx.x / kLanes * 3 * stride;
    return {mine, mine + stride, mine + 2 * stride};
}

__device__ bool decode_exact_body(WarpReader& in, const PlaneTask& p, SideVectors side, std::byte* out) {
    const auto last_exponent = static_cast<std::int32_t>(exponent_mask(p.source));
    const bool centers_fit = in.vector(p.channels, 0, last_exponent, side.first);
    const bool tables_fit = in.vector(p.channels, 0, 15, side.second);
    for (std::uint32_t c = 0; c < p.channels; ++c) {
        const auto center = static_cast<std::uint32_t>(side.first[c]);
        const auto table = static_cast<std::uint32_t>(side.second[c]);
        in.floats(center, table, p.source, p.body_tokens, [&](std::uint32_t t, std::uint32_t bits) {
            put_bits(out, p.source, std::uint64_t{c} * p.body_tokens + t, bits);
        });
    }
    return centers_fit && tables_fit;
}

__device__ void decode_by_mean(WarpReader& in, const PlaneTask& p, unsigned spread_class,
                               std::int16_t prediction, std::int16_t* row) {
    in.strip(spread_class, p.body_tokens,
             [&](std::uint32_t t, std::int16_t q) { row[t] = state_of(prediction, q, p.guard_bits); });
}

// Anchors, every anchor_group-th token, then the tokens between them.
__device__ void decode_by_anchor(WarpReader& in, const PlaneTask& p, unsigned anchor_class,
                                 unsigned delta_class, std::int16_t prediction, std::int16_t* row) {
    const std::uint32_t anchors = div_up(p.body_tokens, p.anchor_group);
    const unsigned fine = p.guard_bits - p.anchor_shift;
    in.strip(anchor_class, anchors, [&](std::uint32_t a, std::int16_t q) {
        row[a * p.anchor_group] = state_of(prediction, q, fine);
    });
    __syncwarp();
    const std::uint32_t between = p.anchor_group - 1;
    in.strip(delta_class, p.body_tokens - anchors, [&](std::uint32_t i, std::int16_t q) {
        const std::uint32_t anchor = i / between * p.anchor_group;
        row[anchor + 1 + i % between] = state_of(row[anchor], q, p.guard_bits);
    });
}

__device__ bool decode_quantised_body(WarpReader& in, const PlaneTask& p, SideVectors side,
                                      std::int16_t* out) {
    const bool anchored = p.anchor_group != 0;
    constexpr std::int32_t last_class = kClasses - 1;
    bool fits = in.vector(p.channels, 0, last_class, side.first);
    if (anchored) fits = in.vector(p.channels, 0, last_class, side.second) && fits;
    fits = in.vector(p.channels, -kMeanLimit, kMeanLimit, side.third) && fits;
    for (std::uint32_t c = 0; c < p.channels; ++c) {
        std::int16_t* row = out + std::uint64_t{c} * p.body_tokens;
        const auto spread_class = static_cast<unsigned>(side.first[c]);
        const std::int16_t prediction = mean_state(side.third[c], p.guard_bits);
        if (anchored) {
            decode_by_anchor(in, p, spread_class, static_cast<unsigned>(side.second[c]), prediction, row);
        } else {
            decode_by_mean(in, p, spread_class, prediction, row);
        }
    }
    return fits;
}

__device__ bool decode_head(WarpReader& in, const PlaneTask& p, std::uint32_t head, SideVectors side,
                            std::byte* workspace) {
    const std::uint64_t exact_bytes = element_bytes(true, p.source);
    bool fits = read_exact_rows(in, p.source, p.exact_rows, p.channels,
                                workspace + p.rows + head * exact_bytes * p.exact_rows * p.channels);
    if (p.body_tokens == 0) return fits;
    const std::uint64_t body = std::uint64_t{head} * p.channels * p.body_tokens;
    if (p.quantised) {
        auto* out = reinterpret_cast<std::int16_t*>(workspace + p.body) + body;
        fits = decode_quantised_body(in, p, side, out) && fits;
    } else {
        fits = decode_exact_body(in, p, side, workspace + p.body + body * exact_bytes) && fits;
    }
    __syncwarp();  // the next head's side vectors overwrite this one's
    return fits;
}

__global__ void decode_blocks(std::byte* workspace, const PlaneTask* planes, const BlockTask* blocks,
                              std::uint32_t count, std::uint32_t most_channels, const AliasTable* tables,
                              std::uint32_t* status) {
    const std::uint32_t index = blockIdx.x * (blockDim.x / kLanes) + threadIdx.x / kLanes;
    if (index >= count) return;
    const BlockTask block = blocks[index];
    const SideVectors side = side_vectors(most_channels);
    WarpReader in(block.begin, block.bytes, tables);
    const std::uint32_t first_heads = planes[block.plane].heads;
    bool fits = true;
    for (std::uint32_t head = block.first_head; head < block.end_head; ++head) {
        const bool second = head >= first_heads;
        const PlaneTask plane = planes[block.plane + (second ? 1 : 0)];  // a copy: stores cannot change it
        fits = decode_head(in, plane, head - (second ? first_heads : 0), side, workspace) && fits;
    }
    const std::uint32_t faults = in.close() | (fits ? 0u : kOutOfRange);
    if (lane_id() == 0) status[block.status] = faults;
}

}  // namespace

cudaError_t launch_decode(Memory memory, const PlaneTask* planes, const BlockTask* blocks,
                          std::uint32_t count, std::uint32_t most_channels, const AliasTable* tables,
                          std::uint32_t* status, cudaStream_t stream) {
    const std::uint32_t per_warp = side_bytes(most_channels);
    const std::uint32_t fitting = kSharedBytes / per_warp;
    const std::uint32_t warps = fitting < kMostWarps ? fitting : kMostWarps;
    return launch(decode_blocks, {div_up(count, warps), warps * kLanes, std::size_t{warps} * per_warp},
                  stream, memory.workspace, planes, blocks, count, most_channels, tables, status);
}

}  // namespace kvcast::kernels::cuda
