// Planes in device memory, as engines keep them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "codec/format/error.h"
#include "codec/format/layout.h"
#include "kernels/cuda/tasks.h"

namespace kvcast::device {

// Device buffers that plans ask for start at multiples of this.
inline constexpr std::size_t kAlignment = 256;

inline bool is_aligned(const void* at, std::size_t unit = kAlignment) {
    return reinterpret_cast<std::uintptr_t>(at) % unit == 0;
}

// Where one plane of one layer lies, in device memory. Contiguous: row t of the chunk at rows + t *
// row_bytes. Paged, where `pages` is set, as vLLM keeps it: with s = slot + t, row t is in page pages[s /
// page_tokens], page p at rows + p * page_bytes, at row s % page_tokens of it. Addresses and strides are
// multiples of the element's size. The block table is read when the batch runs; its entries are the
// caller's to vouch for.
struct DevicePlane {
    void* rows = nullptr;
    std::size_t row_bytes = 0;
    std::size_t head_bytes = 0;  // from head to head; 0: side by side
    const std::int32_t* pages = nullptr;
    std::size_t page_tokens = 0;
    std::size_t page_bytes = 0;
    std::size_t slot = 0;
};

// kOk, or kBadArgument / kLimitExceeded for a plane of elements of this type.
Status check_plane(const DevicePlane& plane, Dtype dtype);

// The plane as kernels take it.
kernels::cuda::RowsAt rows_at(const DevicePlane& plane, std::size_t head_dim, Dtype dtype);

}  // namespace kvcast::device
