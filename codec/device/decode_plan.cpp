#include "codec/device/decode_plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>

#include "codec/device/calibration_image.h"
#include "codec/device/plan_builder.h"
#include "codec/klt/klt_chunk.h"

namespace kvcast::device {
namespace {

namespace cuda = kernels::cuda;

bool is_multiple(std::uintptr_t value, std::size_t unit) {
    return value % unit == 0;
}

Status check_target(const PlaneTarget& t, Dtype dtype) {
    const std::size_t unit = kernels::dtype_bytes(dtype);
    const bool aligned = is_multiple(reinterpret_cast<std::uintptr_t>(t.rows), unit) &&
                         is_multiple(t.row_bytes, unit) && is_multiple(t.head_bytes, unit) &&
                         is_multiple(t.page_bytes, unit);
    if (!aligned)
        return {ErrorCode::kBadArgument,
                fmt::format("rows or strides that are no multiples of {} bytes", unit)};
    if (t.rows == nullptr) return {ErrorCode::kBadArgument, "a plane without rows"};
    if (t.pages != nullptr && t.page_tokens == 0) return {ErrorCode::kBadArgument, "pages of no tokens"};
    if (t.page_tokens > std::numeric_limits<std::uint32_t>::max() || t.slot > (std::size_t{1} << 31))
        return {ErrorCode::kLimitExceeded, "a page or a slot beyond 2^31 tokens"};
    return {};
}

Status check_source(const ChunkSource& c) {
    const ChunkHeader& h = *c.header;
    if (h.profile == Profile::kKlt) {
        if (Status s =
                check_calibration(h, c.calibration == nullptr ? nullptr : &c.calibration->calibration());
            !s.ok())
            return s;
        if (c.calibration_bytes == nullptr)
            return {ErrorCode::kBadArgument, "a calibration that is not on the device"};
    }
    if (c.planes.size() != h.layout.layers * h.layout.planes.size()) {
        return {ErrorCode::kBadArgument, fmt::format("{} planes given, the chunk has {}", c.planes.size(),
                                                     h.layout.layers * h.layout.planes.size())};
    }
    if (!is_multiple(reinterpret_cast<std::uintptr_t>(c.payload), 2))
        return {ErrorCode::kBadArgument, "a payload at an odd address"};
    if (c.payload_bytes < h.payload_bytes()) {
        return {ErrorCode::kTruncated,
                fmt::format("a payload of {} bytes, {} are there", h.payload_bytes(), c.payload_bytes)};
    }
    if (c.base_position.value_or(h.base_position) != h.base_position &&
        h.layout.rope.pairing == RopePairing::kNone)
        return {ErrorCode::kBadArgument, "the chunk has no RoPE by which to move it to another position"};
    for (const PlaneTarget& t : c.planes) {
        if (Status s = check_target(t, c.dtype.value_or(h.layout.dtype)); !s.ok()) return s;
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
