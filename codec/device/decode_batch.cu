#include "codec/device.h"
#include "kernels/cuda/launch.h"

namespace kvcast::device {
namespace {

namespace cuda = kernels::cuda;

template <typename T>
const T* in_image(const void* image, DecodePlan::Array array, std::uint32_t first = 0) {
    return reinterpret_cast<const T*>(static_cast<const std::byte*>(image) + array.offset) + first;
}

// What lies between two marks of a plan.
cudaError_t decode_between(const DecodePlan& plan, const DecodePlan::Mark& from, const DecodePlan::Mark& to,
                           const void* image, void* workspace, std::uint32_t* status, cudaStream_t stream) {
    const DecodePlan::Launches& l = plan.launches();
    const cuda::Memory memory = {static_cast<const std::byte*>(image), static_cast<std::byte*>(workspace)};
    const auto* rotations = in_image<cuda::RotationTask>(image, l.rotations);
    const auto* tables = in_image<kernels::AliasTable>(image, l.tables);
    cudaError_t e = cuda::launch_decode(memory, in_image<cuda::PlaneTask>(image, l.planes),
                                        in_image<cuda::BlockTask>(image, l.blocks, from.blocks),
                                        to.blocks - from.blocks, l.most_channels, tables, status, stream);
    if (e != cudaSuccess) return e;
    e = cuda::launch_klt_decode(memory, in_image<cuda::KltPlaneTask>(image, l.klt_planes),
                                in_image<cuda::KltPieceTask>(image, l.klt_pieces),
                                in_image<cuda::KltRunTask>(image, l.klt_runs, from.klt_runs),
                                to.klt_runs - from.klt_runs, tables, status, stream);
    if (e != cudaSuccess) return e;
    for (std::uint32_t i = from.waves; i < to.waves; ++i) {
        const DecodePlan::Wave& w = l.waves[i];
        e = cuda::launch_project(memory, in_image<cuda::UnitTask>(image, w.units), w.units.count, w.tiles,
                                 stream);
        if (e != cudaSuccess) return e;
    }
    return cuda::launch_store(memory, in_image<cuda::StoreTask>(image, l.stores),
                              in_image<cuda::StoreTile>(image, l.tiles, from.tiles), to.tiles - from.tiles,
                              rotations, stream);
}

}  // namespace

cudaError_t decode_begin(const DecodePlan& plan, const void* image, void* workspace, cudaStream_t stream) {
    const DecodePlan::Array rotations = plan.launches().rotations;
    return cuda::launch_rotations({static_cast<const std::byte*>(image), static_cast<std::byte*>(workspace)},
                                  in_image<cuda::RotationTask>(image, rotations), rotations.count, stream);
}

cudaError_t decode_layers(const DecodePlan& plan, std::size_t first, std::size_t end, const void* image,
                          void* workspace, std::uint32_t* status, cudaStream_t stream) {
    if (first > end || end >= plan.marks().size()) return cudaErrorInvalidValue;
    return decode_between(plan, plan.marks()[first], plan.marks()[end], image, workspace, status, stream);
}

cudaError_t decode_batch(const DecodePlan& plan, const void* image, void* workspace, std::uint32_t* status,
                         cudaStream_t stream) {
    const cudaError_t e = decode_begin(plan, image, workspace, stream);
    if (e != cudaSuccess) return e;
    return decode_between(plan, {}, plan.end(), image, workspace, status, stream);
}

}  // namespace kvcast::device
