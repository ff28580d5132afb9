#include "codec/staged_rows.h"

namespace kvcast {

using kernels::Outgoing;

StagedRows::Rows StagedRows::place(Rows there, std::size_t bytes, std::size_t count) {
    const bool lines = reinterpret_cast<std::uintptr_t>(there.rows) % Outgoing::kLine == 0 &&
                       there.row_bytes % Outgoing::kLine == 0 && bytes % Outgoing::kLine == 0;
    if (!lines || bytes == 0 || used_ == kMost) return there;
    AlignedVector<std::uint8_t>& buffer = buffers_[used_];
    if (buffer.size() < bytes * count) buffer.resize(bytes * count);
    outgoing_[used_++] = {buffer.data(), static_cast<std::uint8_t*>(there.rows),
                          bytes,         there.row_bytes - bytes,
                          bytes,         bytes * count};
    return {buffer.data(), bytes};
}

void StagedRows::send(const kernels::Ops& ops) {
    for (Outgoing& rows : outgoing()) ops.send(rows);
    used_ = 0;
}

void StagedRows::settle(const kernels::Ops& ops) {
    Outgoing nothing;
    ops.send(nothing);
}

}  // namespace kvcast
