#include "codec/device/plane.h"

#include <fmt/format.h>

#include <limits>

namespace kvcast::device {

Status check_plane(const DevicePlane& t, Dtype dtype) {
    const std::size_t unit = kernels::dtype_bytes(dtype);
    const bool aligned = is_aligned(t.rows, unit) && t.row_bytes % unit == 0 && t.head_bytes % unit == 0 &&
                         t.page_bytes % unit == 0;
    if (!aligned)
        return {ErrorCode::kBadArgument,
                fmt::format("rows or strides that are no multiples of {} bytes", unit)};
    if (!is_aligned(t.pages, sizeof(*t.pages)))
        return {ErrorCode::kBadArgument, "a block table at an address that is no multiple of 4 bytes"};
    if (t.rows == nullptr) return {ErrorCode::kBadArgument, "a plane without rows"};
    if (t.pages != nullptr && t.page_tokens == 0) return {ErrorCode::kBadArgument, "pages of no tokens"};
    if (t.page_tokens > std::numeric_limits<std::uint32_t>::max() || t.slot > (std::size_t{1} << 31))
        return {ErrorCode::kLimitExceeded, "a page or a slot beyond 2^31 tokens"};
    return {};
}

kernels::cuda::RowsAt rows_at(const DevicePlane& t, std::size_t head_dim, Dtype dtype) {
    return {.rows = static_cast<std::uint8_t*>(t.rows),
            .pages = t.pages,
            .row_bytes = t.row_bytes,
            .head_bytes = t.head_bytes != 0 ? t.head_bytes : head_dim * kernels::dtype_bytes(dtype),
            .page_bytes = t.page_bytes,
            .page_tokens = static_cast<std::uint32_t>(t.page_tokens),
            .slot = static_cast<std::uint32_t>(t.slot)};
}

}  // namespace kvcast::device
