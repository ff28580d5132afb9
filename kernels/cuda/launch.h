// Host side of the CUDA kernels: every function puts one kernel on a stream and returns at once. Pointers are
// device pointers unless they say otherwise. No function allocates, waits, or keeps state.
//
// All launches have fixed shapes, decided by the host from the tasks: they can be captured into a CUDA graph.
// Device arrays of tasks live in the image (kernels/cuda/tasks.h).
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/tasks.h"
#include "kernels/ops.h"

namespace kvcast::kernels::cuda {

// The two buffers that offsets in tasks refer to.
struct Memory {
    const std::byte* image;
    std::byte* workspace;
};

// Fills the tables of `count` rotations.
cudaError_t launch_rotations(Memory memory, const RotationTask* tasks, std::uint32_t count,
                             cudaStream_t stream);

// Blocks of the profiles delta and lossless. `rotations` have been filled; `most_channels` is the greatest
// PlaneTask::channels, at most 4096; `tables` are the format's.
struct DecodeBatch {
    const PlaneTask* planes;
    const BlockTask* blocks;
    std::uint32_t count;
    const RotationTask* rotations;
    std::uint32_t most_channels;
    const BucketTable* tables;
    std::uint32_t* status;
};

// Decodes those blocks that are direct, bodies to their rows, by two warps each, or those that are not, into
// the workspace, by one, and sets each one's status word to 0 or the faults found. Of a faulty block there is
// what a CPU would have decoded.
cudaError_t launch_decode_direct(Memory memory, const DecodeBatch& batch, cudaStream_t stream);
cudaError_t launch_decode(Memory memory, const DecodeBatch& batch, cudaStream_t stream);

// Decodes the blocks of `count` runs of klt layers into the workspace, two warps per run, and sets a status
// word per layer. Gains and coefficients of a faulty layer are those that a CPU would have decoded.
cudaError_t launch_klt_decode(Memory memory, const KltPlaneTask* planes, const KltPieceTask* pieces,
                              const KltRunTask* runs, std::uint32_t count, const BucketTable* tables,
                              std::uint32_t* status, cudaStream_t stream);

// States of `count` units, which do not depend on each other, by their `tiles` tiles, at most 2^31 - 1.
cudaError_t launch_project(Memory memory, const UnitTask* units, std::uint32_t count, std::uint32_t tiles,
                           cudaStream_t stream);

// Chains of a batch, by `tile_count` blocks of threads of `height` token tiles, 1 to kMostHeight, with rings
// of `chunks`, one of kRingChunks. The device gives a block that asks for more than 48 KiB of shared memory
// `shared_bytes` for each of the token tiles, ring_bytes(chunks) and kChainTaskBytes.
struct ChainBatch {
    const ChainTask* chains;
    const ChainTile* tiles;
    const UnitTask* units;
    std::uint32_t tile_count;
    std::uint32_t height;
    std::uint32_t chunks;
    std::size_t shared_bytes;
};
cudaError_t launch_chain(Memory memory, const ChainBatch& batch, cudaStream_t stream);

// The steps of an encoder's loop: bias and predictions into UnitTask::sums; of other tasks, all terms alone
// into theirs; then the predictions and the last term, the transform, to states or, where nobody asks for
// those, to features only.
cudaError_t launch_predict(Memory memory, const UnitTask* units, std::uint32_t count, std::uint32_t tiles,
                           cudaStream_t stream);
cudaError_t launch_product(Memory memory, const UnitTask* units, std::uint32_t count, std::uint32_t tiles,
                           cudaStream_t stream);
cudaError_t launch_reconstruct(Memory memory, const UnitTask* units, std::uint32_t count, std::uint32_t tiles,
                               cudaStream_t stream);

// Turns, converts and stores `count` tiles, at most 2^31 - 1.
cudaError_t launch_store(Memory memory, const StoreTask* tasks, const StoreTile* tiles, std::uint32_t count,
                         const RotationTask* rotations, cudaStream_t stream);

}  // namespace kvcast::kernels::cuda
