#include "codec/chunk_assembly.h"

#include <algorithm>

namespace kvcast {
namespace {

void append(std::vector<std::uint8_t>& out, std::span<const ChunkAssembly::Bytes> pieces) {
    for (const ChunkAssembly::Bytes piece : pieces) out.insert(out.end(), piece.begin(), piece.end());
}

}  // namespace

void ChunkAssembly::begin(std::vector<std::uint8_t>& object, std::size_t parts) {
    object_ = &object;
    object.assign(room_, 0);
    next_ = 0;
    waiting_.resize(parts);
    for (Waiting& w : waiting_) w.ready = false;
}

void ChunkAssembly::add(std::size_t part, std::span<const Bytes> pieces) {
    std::unique_lock lock(mutex_);
    if (part == next_) {
        append(*object_, pieces);
        ++next_;
    } else {
        lock.unlock();
        waiting_[part].bytes.clear();
        append(waiting_[part].bytes, pieces);
        lock.lock();
        waiting_[part].ready = true;
    }
    for (; next_ < waiting_.size() && waiting_[next_].ready; ++next_) {
        const Bytes bytes = waiting_[next_].bytes;
        append(*object_, {&bytes, 1});
    }
}

void ChunkAssembly::finish(Bytes header) {
    if (header.size() > room_) {
        object_->insert(object_->begin(), header.size() - room_, 0);
    } else {
        object_->erase(object_->begin(),
                       object_->begin() + static_cast<std::ptrdiff_t>(room_ - header.size()));
    }
    std::copy(header.begin(), header.end(), object_->begin());
    room_ = header.size();
}

}  // namespace kvcast
