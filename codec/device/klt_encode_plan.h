// Turns checked klt chunks into encoding tasks. Part of EncodePlan::make.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "codec/device/encode_plan.h"
#include "codec/device/image.h"
#include "kernels/cuda/klt_encode_tasks.h"

namespace kvcast::device {

class KltPlanBuilder {
  public:
    KltPlanBuilder(const EncodeOptions& options, const KltOnDevice& klt) : options_(options), klt_(klt) {}

    // kMissingCalibration, kWrongCalibration, kBadArgument, kLimitExceeded.
    Status add(const ChunkToEncode& chunk);

    // kLimitExceeded. Ends the builder.
    Result<EncodePlan> finish();

  private:
    struct Coding;
    struct Wave {
        std::vector<kernels::cuda::UnitTask> projections;
        std::vector<kernels::cuda::UnitTask> products;
        std::vector<kernels::cuda::KltUnitTask> units;
        std::uint64_t projection_tiles = 0;
        std::uint64_t product_tiles = 0;
        std::uint64_t tokens = 0;
    };

    Status check(const ChunkHeader& header) const;
    void add_tokens(Coding& c);
    void add_memory(Coding& c);
    Status add_runs(const Coding& c);
    void add_plane(const Coding& c, std::size_t layer, std::size_t plane);
    void add_unit(const Coding& c, std::size_t layer, std::size_t plane, std::size_t part);
    kernels::cuda::UnitTask analysed_unit(const kernels::cuda::KltUnitTask& unit, std::size_t index,
                                          const kernels::cuda::UnitTask& projection) const;
    std::vector<EncodePlan::Launches::Wave> put_waves(std::vector<std::byte>& image);

    const EncodeOptions& options_;
    const KltOnDevice klt_;
    EncodePlan plan_;
    std::vector<kernels::cuda::RotationTask> rotations_;
    std::vector<kernels::cuda::KltChunkTask> chunks_;
    std::vector<kernels::cuda::KltSourceTask> planes_;
    std::vector<kernels::cuda::KltWriteTask> runs_;
    std::vector<kernels::cuda::EncodeBlockTask> slots_;
    std::vector<kernels::cuda::PackTask> packs_;
    std::vector<Wave> waves_;  // [layer * planes + plane]
    Workspace workspace_;
    std::size_t layers_ = 0;  // of all chunks
    std::size_t heads_ = 0;
    std::size_t most_runs_ = 0;  // of a chunk
};

}  // namespace kvcast::device
