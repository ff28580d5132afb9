// Entropy coding of analysed planes: one warp per block, backwards, then packing.
#include "kernels/cuda/encode_launch.h"
#include "kernels/cuda/platform.cuh"
#include "kernels/cuda/rows.cuh"
#include "kernels/cuda/warp_writer.cuh"

namespace kvcast::kernels::cuda {
namespace {

constexpr std::uint32_t kEncodeWarps = 2;  // of a block of threads
constexpr std::uint32_t kPackThreads = 128;

__device__ void write_exact_rows(WarpWriter& out, const EncodePlaneTask& p, std::uint32_t head,
                                 Memory memory) {
    const auto* models =
        reinterpret_cast<const std::uint16_t*>(memory.workspace + p.row_models) + head * p.exact_rows;
    for (std::uint32_t t = p.exact_rows; t-- > 0;) {
        const std::uint32_t model = models[t];
        const std::uint8_t* row = row_of(p.in, t) + head * p.in.head_bytes;
        out.floats(model & 255u, model >> 8, p.source, p.channels,
                   [&](std::uint32_t c) { return element_of(row, p.source, c); });
        out.word(model);
    }
}

__device__ void write_exact_body(WarpWriter& out, const EncodePlaneTask& p, const std::int16_t* side,
                                 const std::uint32_t* bits) {
    const std::int16_t* tables = side + p.heads * p.channels;
    for (std::uint32_t c = p.channels; c-- > 0;) {
        const std::uint32_t* row = bits + std::uint64_t{c} * p.body_tokens;
        out.floats(static_cast<std::uint32_t>(side[c]), static_cast<std::uint32_t>(tables[c]), p.source,
                   p.body_tokens, [&](std::uint32_t i) { return row[i]; });
    }
    out.vector(p.channels, tables);
    out.vector(p.channels, side);
}

__device__ void write_quantised_body(WarpWriter& out, const EncodePlaneTask& p, const std::int16_t* side,
                                     const std::int16_t* symbols) {
    const bool anchored = p.anchor_group != 0;
    const std::uint32_t first = anchored ? div_up(p.body_tokens, p.anchor_group) : p.body_tokens;
    const std::int16_t* delta_classes = side + p.heads * p.channels;
    const std::int16_t* means = delta_classes + p.heads * p.channels;
    for (std::uint32_t c = p.channels; c-- > 0;) {
        const std::int16_t* q = symbols + std::uint64_t{c} * p.body_tokens;
        if (anchored) {
            out.strip(static_cast<unsigned>(delta_classes[c]), p.body_tokens - first,
                      [&](std::uint32_t i) { return std::int32_t{q[first + i]}; });
        }
        out.strip(static_cast<unsigned>(side[c]), first, [&](std::uint32_t i) { return std::int32_t{q[i]}; });
    }
    out.vector(p.channels, means);
    if (anchored) out.vector(p.channels, delta_classes);
    out.vector(p.channels, side);
}

__device__ void write_head(WarpWriter& out, const EncodePlaneTask& p, std::uint32_t head, bool quantised,
                           Memory memory) {
    if (p.body_tokens != 0) {
        const auto* side =
            reinterpret_cast<const std::int16_t*>(memory.workspace + p.classes) + head * p.channels;
        const std::uint64_t body = std::uint64_t{head} * p.channels * p.body_tokens;
        if (quantised) {
            write_quantised_body(out, p, side,
                                 reinterpret_cast<const std::int16_t*>(memory.workspace + p.symbols) + body);
        } else {
            write_exact_body(out, p, side,
                             reinterpret_cast<const std::uint32_t*>(memory.workspace + p.tile) + body);
        }
    }
    write_exact_rows(out, p, head, memory);
}

__global__ void encode_blocks(Memory memory, const EncodePlaneTask* planes, const EncodeBlockTask* blocks,
                              std::uint32_t count, const CoderTables* tables, const PlaneChoice* choices,
                              std::uint32_t* block_bytes) {
    const std::uint32_t index = blockIdx.x * kEncodeWarps + threadIdx.x / kLanes;
    if (index >= count) return;
    const EncodeBlockTask block = blocks[index];
    auto* end = reinterpret_cast<std::uint8_t*>(memory.workspace + block.slot) + block.slot_bytes;
    WarpWriter out(end, tables);
    for (std::uint32_t head = block.end_head; head-- > block.first_head;) {
        const std::uint32_t k_heads = planes[block.plane].heads;
        const bool second = head >= k_heads;
        const std::uint32_t plane = block.plane + (second ? 1 : 0);
        write_head(out, planes[plane], head - (second ? k_heads : 0), choices[plane].quantised != 0, memory);
    }
    const std::uint8_t* begin = out.finish();
    if (lane_id() == 0) block_bytes[index] = static_cast<std::uint32_t>(end - begin);
}

// One block of threads per coded block.
__global__ void pack_blocks(Memory memory, const PackTask* packs, std::uint32_t most_blocks,
                            const EncodeBlockTask* blocks, const std::uint32_t* block_bytes) {
    __shared__ std::uint64_t offset;
    const PackTask& pack = packs[blockIdx.x / most_blocks];
    const std::uint32_t index = pack.first_block + blockIdx.x % most_blocks;
    if (index >= pack.end_block) return;
    if (threadIdx.x == 0) offset = 0;
    __syncthreads();
    std::uint64_t before = 0;
    for (std::uint32_t b = pack.first_block + threadIdx.x; b < index; b += kPackThreads)
        before += block_bytes[b];
    atomicAdd(reinterpret_cast<unsigned long long*>(&offset), static_cast<unsigned long long>(before));
    __syncthreads();
    const std::uint32_t bytes = block_bytes[index];
    if (offset + bytes > pack.capacity) return;
    const EncodeBlockTask& block = blocks[index];
    const auto* from =
        reinterpret_cast<const std::uint16_t*>(memory.workspace + block.slot + block.slot_bytes - bytes);
    auto* to = reinterpret_cast<std::uint16_t*>(pack.payload + offset);
    for (std::uint32_t i = threadIdx.x; i < bytes / 2; i += kPackThreads) to[i] = from[i];
}

}  // namespace

cudaError_t launch_encode(Memory memory, const EncodePlaneTask* planes, const EncodeBlockTask* blocks,
                          std::uint32_t count, const CoderTables* tables, const PlaneChoice* choices,
                          std::uint32_t* block_bytes, cudaStream_t stream) {
    return launch(encode_blocks, {div_up(count, kEncodeWarps), kEncodeWarps * kLanes}, stream, memory, planes,
                  blocks, count, tables, choices, block_bytes);
}

cudaError_t launch_pack(Memory memory, const PackTask* packs, std::uint32_t chunks, std::uint32_t most_blocks,
                        const EncodeBlockTask* blocks, const std::uint32_t* block_bytes,
                        cudaStream_t stream) {
    return launch(pack_blocks, {chunks * most_blocks, kPackThreads}, stream, memory, packs, most_blocks,
                  blocks, block_bytes);
}

}  // namespace kvcast::kernels::cuda
