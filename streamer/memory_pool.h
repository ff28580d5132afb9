// Memory of objects, kept for the next ones: pages that are mapped once are not mapped again for every
// object, which on a fast link is a quarter of what receiving costs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <vector>

namespace kvcast::streamer {

// Thread-safe. Holds at most `most_bytes`; what is beyond goes back to the system.
class MemoryPool {
  public:
    explicit MemoryPool(std::uint64_t most_bytes = std::uint64_t{64} << 20) : most_bytes_(most_bytes) {}

    // Empty, with room for `bytes` if any in the pool has it, else as it comes.
    std::vector<std::uint8_t> take(std::uint64_t bytes) {
        const std::scoped_lock lock(mutex_);
        auto best = spare_.end();
        for (auto it = spare_.begin(); it != spare_.end(); ++it) {
            if (it->capacity() >= bytes && (best == spare_.end() || it->capacity() < best->capacity()))
                best = it;
        }
        if (best == spare_.end()) return {};
        std::vector<std::uint8_t> out = std::move(*best);
        spare_.erase(best);
        held_ -= out.capacity();
        out.clear();
        return out;
    }

    void give(std::vector<std::uint8_t> memory) {
        const std::scoped_lock lock(mutex_);
        if (memory.capacity() == 0 || held_ + memory.capacity() > most_bytes_) return;
        held_ += memory.capacity();
        spare_.push_back(std::move(memory));
    }

  private:
    const std::uint64_t most_bytes_;
    std::mutex mutex_;
    std::uint64_t held_ = 0;
    std::vector<std::vector<std::uint8_t>> spare_;
};

}  // namespace kvcast::streamer
