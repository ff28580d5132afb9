// Turns checked chunk sources into tasks. Part of DecodePlan::make.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "codec/device/decode_plan.h"
#include "codec/device/image.h"
#include "codec/format/layout.h"
#include "kernels/cuda/tasks.h"

namespace kvcast::device {

class PlanBuilder {
  public:
    // `source` is sound; `index` is its number in the batch.
    void add(const ChunkSource& source, std::uint32_t index);

    // kLimitExceeded. Ends the builder.
    Result<DecodePlan> finish();

  private:
    // In the image's front, which tasks refer to by offset.
    template <typename T>
    std::uint64_t put(std::span<const T> items);

    void mark(std::size_t layer, std::size_t planes, std::size_t run_layers);
    std::uint32_t rotation(const ChunkSource& c, std::uint64_t first, std::size_t columns);
    void store(kernels::cuda::StoreTask task);
    const kernels::cuda::RotationTask* rotation_at(std::uint32_t index) const;  // null for kNone
    kernels::cuda::StoreTask store_of(const ChunkSource& c, std::size_t layer, std::size_t plane) const;

    void add_blocks(const ChunkSource& c, std::uint32_t index, std::size_t layer, bool direct,
                    std::uint64_t& at);
    bool add_planes(const ChunkSource& c, std::size_t layer);
    struct PlaneStores {
        kernels::cuda::StoreTask exact;
        kernels::cuda::StoreTask body;
    };
    PlaneStores add_plane(const ChunkSource& c, std::size_t layer, std::size_t plane);

    struct KltChunk;
    void add_klt(const ChunkSource& c, std::uint32_t index);
    void add_klt_runs(const KltChunk& k, std::uint32_t index);
    void add_klt_plane(const KltChunk& k, std::size_t layer, std::size_t plane);
    void add_unit(const KltChunk& k, std::size_t layer, std::size_t plane, std::size_t part);
    void add_chain(const KltChunk& k);
    void chain_unit(const KltChunk& k, kernels::cuda::UnitTask unit, std::size_t layer, std::size_t plane,
                    std::size_t part);

    struct Wave {
        std::vector<kernels::cuda::UnitTask> units;
        std::uint64_t tiles = 0;
    };

    std::vector<std::byte> front_;
    std::vector<kernels::cuda::PlaneTask> planes_;
    std::vector<kernels::cuda::BlockTask> blocks_;
    std::vector<kernels::cuda::RotationTask> rotations_;
    std::vector<kernels::cuda::StoreTask> stores_;
    std::vector<kernels::cuda::KltPlaneTask> klt_planes_;
    std::vector<kernels::cuda::KltPieceTask> klt_pieces_;
    std::vector<kernels::cuda::KltRunTask> klt_runs_;
    std::vector<Wave> waves_;  // [layer * planes + plane]
    bool chained_ = true;      // so far, all klt chunks
    std::size_t chain_bytes_ = 0;
    std::vector<kernels::cuda::ChainTask> chains_;
    std::array<std::vector<kernels::cuda::ChainTile>, kernels::cuda::kMostHeight> chain_tiles_;
    std::vector<kernels::cuda::UnitTask> chained_units_;
    std::vector<DecodePlan::Block> places_;
    std::vector<DecodePlan::Mark> marks_;  // of all chunks' layers
    std::size_t chunks_ = 0;
    Workspace workspace_;
    std::vector<kernels::cuda::StoreTile> tiles_;
    std::uint32_t most_channels_ = 1;
    bool any_direct_ = false;
    bool any_indirect_ = false;
    std::uint32_t absolute_ = kernels::cuda::kNone;  // rotations of the chunk that is being added
    std::uint32_t shift_ = kernels::cuda::kNone;
};

}  // namespace kvcast::device
