#include "codec/device/plane.h"

#include <fmt/format.h>

#include <limits>

namespace kvcast::device {
namespace {

bool is_multiple(std::uintptr_t value, std::size_t unit) {
    return value % unit == 0;
}

}  // namespace

Status check_plane(const DevicePlane& t, Dtype dtype) {
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
