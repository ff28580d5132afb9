// Host side of the kernels that encode the klt profile; see kernels/cuda/launch.h.
#pragma once

#include "kernels/cuda/klt_encode_tasks.h"
#include "kernels/cuda/launch.h"

namespace kvcast::kernels::cuda {

// What all launches of a batch share.
struct KltBatch {
    const KltChunkTask* chunks;
    std::uint32_t chunk_count;
    const KltSourceTask* planes;
    std::uint32_t plane_count;
    std::uint32_t heads;  // of all planes
    const CoderTables* tables;
    std::byte* report;
};

struct KltWave {
    const KltUnitTask* units;
    std::uint32_t count;
    std::uint32_t tokens;  // of all units; at most 2^31 - 1
};

// Notes which tokens are exact by choice. First.
cudaError_t launch_klt_begin(Memory memory, const KltBatch& batch, cudaStream_t stream);

// What a wave's predictions miss, as features of the product that gives coefficients; tokens that do not fit
// are noted. Rotations are filled.
cudaError_t launch_klt_residuals(Memory memory, const KltBatch& batch, const KltWave& wave,
                                 const RotationTask* rotations, cudaStream_t stream);

// From such products to gains and scaled coefficients.
cudaError_t launch_klt_quantise(Memory memory, const KltBatch& batch, const KltWave& wave,
                                cudaStream_t stream);

// After all waves: which tokens are coded and which exact, and the models of exact rows.
cudaError_t launch_klt_list(Memory memory, const KltBatch& batch, cudaStream_t stream);

// Codes `count` runs, one warp each, into their slots. run_bytes[run] and layer_bytes[layer] are their sizes.
cudaError_t launch_klt_write(Memory memory, const KltBatch& batch, const KltWriteTask* runs,
                             const EncodeBlockTask* slots, std::uint32_t count, std::uint32_t* run_bytes,
                             std::uint32_t* layer_bytes, cudaStream_t stream);

}  // namespace kvcast::kernels::cuda
