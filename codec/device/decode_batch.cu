#include "codec/device.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/platform.cuh"

namespace kvcast::device {
namespace {

namespace cuda = kernels::cuda;

// How blocks of threads take chains.
struct ChainShape {
    std::uint32_t height = 0;  // 0: not at all
    std::uint32_t chunks = 0;
};

// The chunks of the longest rings that blocks of this height have shared memory for; 0 where there are none.
std::uint32_t chain_chunks(std::uint32_t height, const DecodePlan::Launches& l,
                           const cuda::DeviceLimits& device) {
    for (const std::uint32_t chunks : cuda::kRingChunks) {
        const std::size_t bytes = height * l.chain_bytes + cuda::ring_bytes(chunks) + cuda::kChainTaskBytes;
        if (bytes <= device.shared_bytes) return chunks;
    }
    return 0;
}

// That with which the plan's chains take the shortest time, a block of threads at a time on each
// multiprocessor, where the device has the shared memory that they ask for. What a block does once for each
// unit, whatever its height, takes about as long as one more tile.
ChainShape chain_shape(const DecodePlan::Launches& l) {
    if (l.chains.count == 0) return {};
    cuda::DeviceLimits device = {};
    if (cuda::device_limits(device) != cudaSuccess) return {};
    ChainShape best;
    std::uint64_t shortest = ~std::uint64_t{0};
    for (std::uint32_t height = 1; height <= cuda::kMostHeight; ++height) {
        const std::uint32_t chunks = chain_chunks(height, l, device);
        if (chunks == 0) break;
        const std::uint32_t rounds = cuda::div_up(l.chain_tiles[height - 1].count, device.multiprocessors);
        const std::uint64_t time = std::uint64_t{rounds} * (height + 1);
        if (time > shortest) continue;
        best = {height, chunks};
        shortest = time;
    }
    return best;
}

class Decoding {
  public:
    Decoding(const DecodePlan& plan, const void* image, void* workspace, std::uint32_t* status,
             cudaStream_t stream)
        : l_(plan.launches()),
          image_(image),
          memory_{static_cast<const std::byte*>(image), static_cast<std::byte*>(workspace)},
          status_(status),
          stream_(stream) {}

    cudaError_t rotations() const {
        return cuda::launch_rotations(memory_, at<cuda::RotationTask>(l_.rotations), l_.rotations.count,
                                      stream_);
    }

    // Blocks and runs between two marks of the plan.
    cudaError_t entropy(const DecodePlan::Mark& from, const DecodePlan::Mark& to) const {
        const auto* tables = at<cuda::BucketTable>(l_.tables);
        const cuda::DecodeBatch blocks = {at<cuda::PlaneTask>(l_.planes),
                                          at<cuda::BlockTask>(l_.blocks, from.blocks),
                                          to.blocks - from.blocks,
                                          at<cuda::RotationTask>(l_.rotations),
                                          l_.most_channels,
                                          tables,
                                          status_};
        cudaError_t e = cudaSuccess;
        if (l_.any_direct) e = cuda::launch_decode_direct(memory_, blocks, stream_);
        if (e == cudaSuccess && l_.any_indirect) e = cuda::launch_decode(memory_, blocks, stream_);
        if (e != cudaSuccess) return e;
        return cuda::launch_klt_decode(memory_, at<cuda::KltPlaneTask>(l_.klt_planes),
                                       at<cuda::KltPieceTask>(l_.klt_pieces),
                                       at<cuda::KltRunTask>(l_.klt_runs, from.klt_runs),
                                       to.klt_runs - from.klt_runs, tables, status_, stream_);
    }

    cudaError_t waves(const DecodePlan::Mark& from, const DecodePlan::Mark& to) const {
        for (std::uint32_t i = from.waves; i < to.waves; ++i) {
            const DecodePlan::Wave& w = l_.waves[i];
            const cudaError_t e =
                cuda::launch_project(memory_, at<cuda::UnitTask>(w.units), w.units.count, w.tiles, stream_);
            if (e != cudaSuccess) return e;
        }
        return cudaSuccess;
    }

    // Instead of all waves.
    cudaError_t chains(const ChainShape& shape) const {
        const DecodePlan::Array& tiles = l_.chain_tiles[shape.height - 1];
        return cuda::launch_chain(
            memory_,
            {at<cuda::ChainTask>(l_.chains), at<cuda::ChainTile>(tiles), at<cuda::UnitTask>(l_.chained_units),
             tiles.count, shape.height, shape.chunks, l_.chain_bytes},
            stream_);
    }

    cudaError_t stores(const DecodePlan::Mark& from, const DecodePlan::Mark& to) const {
        return cuda::launch_store(memory_, at<cuda::StoreTask>(l_.stores),
                                  at<cuda::StoreTile>(l_.tiles, from.tiles), to.tiles - from.tiles,
                                  at<cuda::RotationTask>(l_.rotations), stream_);
    }

  private:
    template <typename T>
    const T* at(DecodePlan::Array array, std::uint32_t first = 0) const {
        return reinterpret_cast<const T*>(static_cast<const std::byte*>(image_) + array.offset) + first;
    }

    const DecodePlan::Launches& l_;
    const void* image_;
    cuda::Memory memory_;
    std::uint32_t* status_;
    cudaStream_t stream_;
};

bool are_aligned(const void* image, const void* workspace, const std::uint32_t* status) {
    return is_aligned(image) && is_aligned(workspace) && is_aligned(status, sizeof(*status));
}

}  // namespace

cudaError_t decode_begin(const DecodePlan& plan, const void* image, void* workspace, cudaStream_t stream) {
    if (!are_aligned(image, workspace, nullptr)) return cudaErrorInvalidValue;
    return Decoding(plan, image, workspace, nullptr, stream).rotations();
}

cudaError_t decode_layers(const DecodePlan& plan, std::size_t first, std::size_t end, const void* image,
                          void* workspace, std::uint32_t* status, cudaStream_t stream) {
    if (first > end || end >= plan.marks().size()) return cudaErrorInvalidValue;
    if (!are_aligned(image, workspace, status)) return cudaErrorInvalidValue;
    const DecodePlan::Mark &from = plan.marks()[first], &to = plan.marks()[end];
    const Decoding d(plan, image, workspace, status, stream);
    cudaError_t e = d.entropy(from, to);
    if (e == cudaSuccess) e = d.waves(from, to);
    if (e == cudaSuccess) e = d.stores(from, to);
    return e;
}

cudaError_t decode_batch(const DecodePlan& plan, const void* image, void* workspace, std::uint32_t* status,
                         cudaStream_t stream) {
    if (!are_aligned(image, workspace, status)) return cudaErrorInvalidValue;
    const Decoding d(plan, image, workspace, status, stream);
    cudaError_t e = d.rotations();
    if (e == cudaSuccess) e = d.entropy({}, plan.end());
    const ChainShape shape = chain_shape(plan.launches());
    if (e == cudaSuccess) e = shape.height != 0 ? d.chains(shape) : d.waves({}, plan.end());
    if (e == cudaSuccess) e = d.stores({}, plan.end());
    return e;
}

}  // namespace kvcast::device
