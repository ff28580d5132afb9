// A chunk object in the making. Its parts are coded in any order; one whose turn it is goes straight into the
// object, others wait in memory of their own. The header comes last and stands first: room is left that fits
// where headers of successive chunks are of one length, as they mostly are, and what follows is moved where
// it does not. Reuse one object for many chunks and it stops allocating.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <span>
#include <vector>

namespace kvcast {

class ChunkAssembly {
  public:
    using Bytes = std::span<const std::uint8_t>;

    // Replaces `object`, which must stay until finish(), by one of so many parts.
    void begin(std::vector<std::uint8_t>& object, std::size_t parts);

    // The bytes of one part, given once, from any thread.
    void add(std::size_t part, std::span<const Bytes> pieces);

    void finish(Bytes header);

  private:
    struct Waiting {
        std::vector<std::uint8_t> bytes;
        bool ready = false;
    };

    std::mutex mutex_;
    std::vector<std::uint8_t>* object_ = nullptr;
    std::size_t room_ = 0;          // for the header
    std::size_t next_ = 0;          // part
    std::vector<Waiting> waiting_;  // [part]
};

}  // namespace kvcast
