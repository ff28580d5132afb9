// Host side of the encoding kernels; see kernels/cuda/launch.h.
#pragma once

#include "kernels/cuda/encode_tasks.h"
#include "kernels/cuda/launch.h"

namespace kvcast::kernels::cuda {

// What a batch has, over all its planes. Each number is 2^31 - 1 at most, and so is that of runs and rows
// together.
struct Extents {
    std::uint32_t planes;
    std::uint32_t tiles;  // of bodies without bands, each one of all heads of its plane
    std::uint32_t bands;
    std::uint32_t heads;
    std::uint32_t duo_runs;
    std::uint32_t rows;  // exact rows of all heads
};

// Tiles and scales of all planes; choices[plane] says what was decided. Rotations are filled.
cudaError_t launch_analysis(Memory memory, const EncodePlaneTask* planes, Extents extents,
                            const RotationTask* rotations, PlaneChoice* choices, cudaStream_t stream);

// Strips of analysed planes.
cudaError_t launch_prepare(Memory memory, const EncodePlaneTask* planes, Extents extents,
                           const RotationTask* rotations, const CoderTables* tables,
                           const PlaneChoice* choices, cudaStream_t stream);

// Codes `count` blocks of prepared strips into their slots, one warp per block; block_bytes[block] is their
// size.
cudaError_t launch_encode(Memory memory, const EncodePlaneTask* planes, const EncodeBlockTask* blocks,
                          std::uint32_t count, const CoderTables* tables, const PlaneChoice* choices,
                          std::uint32_t* block_bytes, cudaStream_t stream);

// Packs the blocks of `chunks` chunks, `most_blocks` at most each, one after another. A block that its
// chunk's capacity does not reach is left out.
cudaError_t launch_pack(Memory memory, const PackTask* packs, std::uint32_t chunks, std::uint32_t most_blocks,
                        const EncodeBlockTask* blocks, const std::uint32_t* block_bytes, cudaStream_t stream);

}  // namespace kvcast::kernels::cuda
