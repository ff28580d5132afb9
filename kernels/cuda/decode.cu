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

// One warp to a block of threads: a batch has some hundred blocks of symbols, and they spread evenly.
constexpr std::uint32_t kThreads = kLanes;

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
    auto* mine = dynamic_shared<std::int16_t>();
    return {mine, mine + stride, mine + 2 * stride};
}

// What reads a channel, loaded while the channel before is read.
template <typename Load, typename Read>
__device__ __forceinline__ void for_channels(std::uint32_t channels, Load load, Read read) {
    auto next = load(0u);
    for (std::uint32_t c = 0; c < channels; ++c) {
        const auto present = next;
        if (c + 1 < channels) next = load(c + 1);
        read(c, present);
    }
}

__device__ bool decode_exact_body(WarpReader& in, const PlaneTask& p, SideVectors side, std::byte* out) {
    const auto last_exponent = static_cast<std::int32_t>(exponent_mask(p.source));
    const bool centers_fit = in.vector(p.channels, 0, last_exponent, side.first);
    const bool tables_fit = in.vector(p.channels, 0, 15, side.second);
    for_channels(
        p.channels,
        [&](std::uint32_t c) { return in.exponents_of(static_cast<std::uint32_t>(side.second[c])); },
        [&](std::uint32_t c, const LaneTable& exponents) {
            const std::uint64_t row = std::uint64_t{c} * p.body_stride;
            const auto center = static_cast<std::uint32_t>(side.first[c]);
            if (p.source == Dtype::kF32) {
                auto* to = reinterpret_cast<std::uint32_t*>(out) + row;
                in.floats(center, exponents, Dtype::kF32, p.body_tokens,
                          [&](std::uint32_t t, std::uint32_t bits) { to[t] = bits; });
            } else {
                auto* to = reinterpret_cast<std::uint16_t*>(out) + row;
                in.floats(
                    center, exponents, p.source, p.body_tokens,
                    [&](std::uint32_t t, std::uint32_t bits) { to[t] = static_cast<std::uint16_t>(bits); });
            }
        });
    return centers_fit && tables_fit;
}

// Anchors, every anchor_group-th token, then the tokens between them.
__device__ void decode_by_anchor(WarpReader& in, const PlaneTask& p, const ClassReader& anchor,
                                 const ClassReader& delta, std::int16_t prediction, std::int16_t* row) {
    const std::uint32_t anchors = div_up(p.body_tokens, p.anchor_group);
    const unsigned fine = p.guard_bits - p.anchor_shift;
    in.strip(anchor, anchors, [&](std::uint32_t a, std::int16_t q) {
        row[a * p.anchor_group] = state_of(prediction, q, fine);
    });
    __syncwarp();
    const std::uint32_t between = p.anchor_group - 1;
    in.strip(delta, p.body_tokens - anchors, [&](std::uint32_t i, std::int16_t q) {
        const std::uint32_t first = i / between * p.anchor_group;
        row[first + 1 + i % between] = state_of(row[first], q, p.guard_bits);
    });
}

__device__ bool decode_quantised_body(WarpReader& in, const PlaneTask& p, SideVectors side,
                                      std::int16_t* out) {
    const bool anchored = p.anchor_group != 0;
    constexpr std::int32_t last_class = kClasses - 1;
    bool fits = in.vector(p.channels, 0, last_class, side.first);
    if (anchored) fits = in.vector(p.channels, 0, last_class, side.second) && fits;
    fits = in.vector(p.channels, -kMeanLimit, kMeanLimit, side.third) && fits;
    const auto reader = [&](const std::int16_t* classes, std::uint32_t c) {
        return in.reader_of(static_cast<unsigned>(classes[c]));
    };
    for_channels(
        p.channels, [&](std::uint32_t c) { return reader(side.first, c); },
        [&](std::uint32_t c, const ClassReader& first) {
            std::int16_t* row = out + std::uint64_t{c} * p.body_stride;
            const std::int16_t prediction = mean_state(side.third[c], p.guard_bits);
            if (anchored) {
                decode_by_anchor(in, p, first, reader(side.second, c), prediction, row);
                return;
            }
            in.strip(first, p.body_tokens, [&](std::uint32_t t, std::int16_t q) {
                row[t] = state_of(prediction, q, p.guard_bits);
            });
        });
    return fits;
}

__device__ bool decode_head(WarpReader& in, const PlaneTask& p, std::uint32_t head, SideVectors side,
                            std::byte* workspace) {
    const std::uint64_t exact_bytes = element_bytes(true, p.source);
    bool fits = read_exact_rows(in, p.source, p.exact_rows, p.channels,
                                workspace + p.rows + head * exact_bytes * p.exact_rows * p.channels);
    if (p.body_tokens == 0) return fits;
    const std::uint64_t body = std::uint64_t{head} * p.channels * p.body_stride;
    if (p.quantised) {
        auto* out = reinterpret_cast<std::int16_t*>(workspace + p.body) + body;
        fits = decode_quantised_body(in, p, side, out) && fits;
    } else {
        fits = decode_exact_body(in, p, side, workspace + p.body + body * exact_bytes) && fits;
    }
    __syncwarp();  // the next head's side vectors overwrite this one's
    return fits;
}

__global__ void __launch_bounds__(kThreads)
    decode_blocks(std::byte* workspace, const PlaneTask* planes, const BlockTask* blocks,
                  std::uint32_t most_channels, const AliasTable* tables, std::uint32_t* status) {
    __shared__ WordRing::Memory ring;
    const BlockTask block = blocks[blockIdx.x];
    const SideVectors side = side_vectors(most_channels);
    WarpReader in(block.begin, block.bytes, tables, ring);
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
    return launch(decode_blocks, {count, kThreads, side_bytes(most_channels)}, stream, memory.workspace,
                  planes, blocks, most_channels, tables, status);
}

}  // namespace kvcast::kernels::cuda
