// Rows of heads that are written to buffers which stay in a cache, and leave from there to memory that is in
// none while what comes after them is decoded: whole lines that go past the caches need not be read first,
// and a store that has to wait for them has something else to do. One thread at a time.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "codec/aligned_vector.h"
#include "kernels/ops.h"

namespace kvcast {

class StagedRows {
  public:
    static constexpr std::size_t kMost = 4;  // heads at once

    // From about so many bytes on that are written and not read again soon, this is worth while.
    static constexpr std::size_t kFromBytes = std::size_t{1} << 20;

    struct Rows {
        void* rows;
        std::size_t row_bytes;
    };

    // Where `count` rows of `bytes` bytes each are to be written that belong to `there`: a buffer, or there
    // where that is not made of whole lines. After each send(), up to kMost times.
    Rows place(Rows there, std::size_t bytes, std::size_t count);

    // What has been written to buffers and not left yet.
    std::span<kernels::Outgoing> outgoing() { return {outgoing_.data(), used_}; }

    // All of it.
    void send(const kernels::Ops& ops);

    // What left in this thread can be read by others.
    static void settle(const kernels::Ops& ops);

    void drop() { used_ = 0; }

  private:
    std::array<AlignedVector<std::uint8_t>, kMost> buffers_;
    std::array<kernels::Outgoing, kMost> outgoing_;
    std::size_t used_ = 0;
};

}  // namespace kvcast
