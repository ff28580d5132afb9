#include "codec/device.h"
#include "kernels/cuda/launch.h"

namespace kvcast::device {
namespace {

template <typename T>
const T* in_image(const void* image, DecodePlan::Array array) {
    return reinterpret_cast<const T*>(static_cast<const std::byte*>(image) + array.offset);
}

}  // namespace

cudaError_t decode_batch(const DecodePlan& plan, const void* image, void* workspace, std::uint32_t* status,
                         cudaStream_t stream) {
    namespace cuda = kernels::cuda;
    const DecodePlan::Launches& l = plan.launches();
    const cuda::Memory memory = {static_cast<const std::byte*>(image), static_cast<std::byte*>(workspace)};
    const auto* rotations = in_image<cuda::RotationTask>(image, l.rotations);
    cudaError_t e = cuda::launch_rotations(memory, rotations, l.rotations.count, stream);
    if (e != cudaSuccess) return e;
    e = cuda::launch_decode(memory, in_image<cuda::PlaneTask>(image, l.planes),
                            in_image<cuda::BlockTask>(image, l.blocks), l.blocks.count, l.most_channels,
                            in_image<kernels::AliasTable>(image, l.tables), status, stream);
    if (e != cudaSuccess) return e;
    e = cuda::launch_klt_decode(memory, in_image<cuda::KltPlaneTask>(image, l.klt_planes),
                                in_image<cuda::KltPieceTask>(image, l.klt_pieces),
                                in_image<cuda::KltRunTask>(image, l.klt_runs), l.klt_runs.count,
                                in_image<kernels::AliasTable>(image, l.tables), status, stream);
    if (e != cudaSuccess) return e;
    for (const DecodePlan::Wave& w : l.waves) {
        e = cuda::launch_project(memory, in_image<cuda::UnitTask>(image, w.units), w.units.count, w.tiles,
                                 stream);
        if (e != cudaSuccess) return e;
    }
    return cuda::launch_store(memory, in_image<cuda::StoreTask>(image, l.stores), l.stores.count, l.tiles,
                              rotations, stream);
}

}  // namespace kvcast::device
