#include "codec/device/decode_plan.h"

#include <fmt/format.h>

#include <algorithm>

#include "codec/device/calibration_image.h"
#include "codec/device/plan_builder.h"
#include "codec/klt/klt_chunk.h"

namespace kvcast::device {
namespace {

namespace cuda = kernels::cuda;

Status check_source(const ChunkSource& c) {
    const ChunkHeader& h = *c.header;
    if (h.profile == Profile::kKlt) {
        if (Status s =
                check_calibration(h, c.calibration == nullptr ? nullptr : &c.calibration->calibration());
            !s.ok())
            return s;
        if (c.calibration_bytes == nullptr || !is_aligned(c.calibration_bytes))
            return {ErrorCode::kBadArgument,
                    "a calibration that is not on the device, or not at a multiple of 256 bytes"};
    }
    if (c.planes.size() != h.layout.layers * h.layout.planes.size()) {
        return {ErrorCode::kBadArgument, fmt::format("{} planes given, the chunk has {}", c.planes.size(),
                                                     h.layout.layers * h.layout.planes.size())};
    }
    if (!is_aligned(c.payload, 2)) return {ErrorCode::kBadArgument, "a payload at an odd address"};
    if (c.payload_bytes < h.payload_bytes()) {
        return {ErrorCode::kTruncated,
                fmt::format("a payload of {} bytes, {} are there", h.payload_bytes(), c.payload_bytes)};
    }
    if (c.base_position.value_or(h.base_position) != h.base_position &&
        h.layout.rope.pairing == RopePairing::kNone)
        return {ErrorCode::kBadArgument, "the chunk has no RoPE by which to move it to another position"};
    for (const DevicePlane& t : c.planes) {
        if (Status s = check_plane(t, c.dtype.value_or(h.layout.dtype)); !s.ok()) return s;
    }
    return {};
}

}  // namespace

Result<DecodePlan> DecodePlan::make(std::span<const ChunkSource> chunks) {
    PlanBuilder builder;
    for (std::size_t i = 0; i < chunks.size(); ++i) {
        if (Status s = check_source(chunks[i]); !s.ok())
            return Status(s.code(), fmt::format("chunk {} of the batch: {}", i, s.message()));
        builder.add(chunks[i], static_cast<std::uint32_t>(i));
    }
    return builder.finish();
}

DecodePlan::Mark DecodePlan::end() const {
    return {launches_.blocks.count, launches_.klt_runs.count,
            static_cast<std::uint32_t>(launches_.waves.size()), launches_.tiles.count};
}

Status DecodePlan::block_status(std::size_t index, std::uint32_t word) const {
    if (word == 0) return {};
    const Block& b = blocks_[index];
    const char* what = (word & cuda::kEndsEarly) != 0   ? "its data ends before its values do"
                       : (word & cuda::kLeftOver) != 0  ? "bytes are left over"
                       : (word & cuda::kNotClosed) != 0 ? "the coder does not end in its first state"
                                                        : "its side information is out of range";
    return {ErrorCode::kCorruptBlock, fmt::format("block {} of layer {} of chunk {} of the batch: {}",
                                                  b.block, b.layer, b.chunk, what)};
}

Status DecodePlan::batch_status(std::span<const std::uint32_t> words) const {
    for (std::size_t i = 0; i < std::min(words.size(), blocks_.size()); ++i) {
        if (words[i] != 0) return block_status(i, words[i]);
    }
    return {};
}

}  // namespace kvcast::device
