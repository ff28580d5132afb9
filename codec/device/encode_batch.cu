#include "codec/device.h"
#include "kernels/cuda/encode_launch.h"

namespace kvcast::device {

cudaError_t encode_batch(const EncodePlan& plan, const void* image, void* workspace, void* report,
                         cudaStream_t stream) {
    namespace cuda = kernels::cuda;
    const EncodePlan::Launches& l = plan.launches();
    const auto* base = static_cast<const std::byte*>(image);
    const cuda::Memory memory = {base, static_cast<std::byte*>(workspace)};
    const auto* tables = reinterpret_cast<const cuda::CoderTables*>(base + l.tables);
    const auto* rotations = reinterpret_cast<const cuda::RotationTask*>(base + l.rotations);
    const auto* planes = reinterpret_cast<const cuda::EncodePlaneTask*>(base + l.planes);
    const auto* blocks = reinterpret_cast<const cuda::EncodeBlockTask*>(base + l.blocks);
    auto* choices = static_cast<cuda::PlaneChoice*>(report);
    auto* block_bytes = reinterpret_cast<std::uint32_t*>(static_cast<std::byte*>(report) + l.block_bytes);
    cudaError_t e = cuda::launch_rotations(memory, rotations, l.rotation_count, stream);
    if (e != cudaSuccess) return e;
    e = cuda::launch_analysis(memory, planes, {l.plane_count, l.tiles, l.channels, l.rows}, rotations, tables,
                              choices, stream);
    if (e != cudaSuccess) return e;
    e = cuda::launch_encode(memory, planes, blocks, l.block_count, tables, choices, block_bytes, stream);
    if (e != cudaSuccess) return e;
    return cuda::launch_pack(memory, reinterpret_cast<const cuda::PackTask*>(base + l.packs), l.chunks,
                             l.most_blocks, blocks, block_bytes, stream);
}

}  // namespace kvcast::device
