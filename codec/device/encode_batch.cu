#include "codec/device.h"
#include "kernels/cuda/encode_launch.h"
#include "kernels/cuda/klt_encode_launch.h"

namespace kvcast::device {
namespace {

namespace cuda = kernels::cuda;

// A plan with the buffers that it was given.
struct Batch {
    const EncodePlan::Launches& l;
    cuda::Memory memory;
    std::byte* report;
    cudaStream_t stream;

    template <typename T>
    const T* at(std::size_t offset) const {
        return reinterpret_cast<const T*>(memory.image + offset);
    }
    std::uint32_t* numbers(std::size_t offset) const {
        return reinterpret_cast<std::uint32_t*>(report + offset);
    }
    cudaError_t pack(const std::uint32_t* block_bytes) const {
        return cuda::launch_pack(memory, at<cuda::PackTask>(l.packs), l.chunks, l.most_blocks,
                                 at<cuda::EncodeBlockTask>(l.blocks), block_bytes, stream);
    }
};

cudaError_t encode_planes(const Batch& b) {
    const EncodePlan::Launches& l = b.l;
    const auto* tables = b.at<cuda::CoderTables>(l.tables);
    const auto* planes = b.at<cuda::EncodePlaneTask>(l.planes);
    auto* choices = reinterpret_cast<cuda::PlaneChoice*>(b.report);
    std::uint32_t* block_bytes = b.numbers(l.block_bytes);
    const cuda::Extents extents = {l.plane_count, l.tiles, l.bands, l.heads, l.duo_runs, l.rows};
    cudaError_t e = cuda::launch_analysis(b.memory, planes, extents, b.at<cuda::RotationTask>(l.rotations),
                                          choices, b.stream);
    if (e != cudaSuccess) return e;
    e = cuda::launch_prepare(b.memory, planes, extents, b.at<cuda::RotationTask>(l.rotations), tables,
                             choices, b.stream);
    if (e != cudaSuccess) return e;
    e = cuda::launch_encode(b.memory, planes, b.at<cuda::EncodeBlockTask>(l.blocks), l.block_count, tables,
                            choices, block_bytes, b.stream);
    return e != cudaSuccess ? e : b.pack(block_bytes);
}

// The closed loop: what a wave is predicted from, the waves before have reconstructed.
cudaError_t encode_wave(const Batch& b, const cuda::KltBatch& batch, const EncodePlan::Launches::Wave& w) {
    const auto* projections = b.at<cuda::UnitTask>(w.projections);
    const auto* products = b.at<cuda::UnitTask>(w.products);
    const cuda::KltWave wave = {b.at<cuda::KltUnitTask>(w.units), w.count, w.tokens};
    cudaError_t e = cuda::launch_predict(b.memory, projections, w.count, w.projection_tiles, b.stream);
    if (e != cudaSuccess) return e;
    e = cuda::launch_klt_residuals(b.memory, batch, wave, b.at<cuda::RotationTask>(b.l.rotations), b.stream);
    if (e != cudaSuccess) return e;
    e = cuda::launch_product(b.memory, products, w.count, w.product_tiles, b.stream);
    if (e != cudaSuccess) return e;
    e = cuda::launch_klt_quantise(b.memory, batch, wave, b.stream);
    if (e != cudaSuccess) return e;
    return cuda::launch_reconstruct(b.memory, projections, w.count, w.projection_tiles, b.stream);
}

cudaError_t encode_klt(const Batch& b) {
    const EncodePlan::Launches& l = b.l;
    const cuda::KltBatch batch = {b.at<cuda::KltChunkTask>(l.klt_chunks),
                                  l.chunks,
                                  b.at<cuda::KltSourceTask>(l.klt_planes),
                                  l.klt_plane_count,
                                  l.heads,
                                  b.at<cuda::CoderTables>(l.tables),
                                  b.report};
    std::uint32_t* run_bytes = b.numbers(l.run_bytes);
    cudaError_t e = cuda::launch_klt_begin(b.memory, batch, b.stream);
    for (const EncodePlan::Launches::Wave& w : l.waves) {
        if (e != cudaSuccess) return e;
        e = encode_wave(b, batch, w);
    }
    if (e != cudaSuccess) return e;
    e = cuda::launch_klt_list(b.memory, batch, b.stream);
    if (e != cudaSuccess) return e;
    e = cuda::launch_klt_write(b.memory, batch, b.at<cuda::KltWriteTask>(l.runs),
                               b.at<cuda::EncodeBlockTask>(l.blocks), l.block_count, run_bytes,
                               b.numbers(l.block_bytes), b.stream);
    return e != cudaSuccess ? e : b.pack(run_bytes);
}

}  // namespace

cudaError_t encode_batch(const EncodePlan& plan, const void* image, void* workspace, void* report,
                         cudaStream_t stream) {
    if (!is_aligned(image) || !is_aligned(workspace) || !is_aligned(report, alignof(cuda::PlaneChoice)))
        return cudaErrorInvalidValue;
    const EncodePlan::Launches& l = plan.launches();
    const Batch batch = {l,
                         {static_cast<const std::byte*>(image), static_cast<std::byte*>(workspace)},
                         static_cast<std::byte*>(report),
                         stream};
    const cudaError_t e = cuda::launch_rotations(batch.memory, batch.at<cuda::RotationTask>(l.rotations),
                                                 l.rotation_count, stream);
    if (e != cudaSuccess) return e;
    return l.waves.empty() ? encode_planes(batch) : encode_klt(batch);
}

}  // namespace kvcast::device
