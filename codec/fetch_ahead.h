// Rows that are read next, brought into the second-level cache while something else is computed: rows of
// heads lie too far apart for the processor to see them coming, and all at once they take as long as they
// would take when they are needed. A hint only: nothing is read, and no address is invalid.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvcast {

class FetchAhead {
  public:
    // `count` rows of `bytes` bytes each, in shares that `steps` calls of step() are enough for. What was
    // left of other rows is forgotten.
    void aim(const void* rows, std::size_t row_bytes, std::size_t bytes, std::size_t count,
             std::size_t steps) {
        row_ = reinterpret_cast<std::uintptr_t>(rows);
        row_bytes_ = row_bytes;
        bytes_ = bytes;
        left_ = count;
        next_ = row_ / kLine * kLine;
        if (steps != 0) share_ = (count * (bytes / kLine + 2) + steps - 1) / steps;
    }

    void stop() { left_ = 0; }

    void step() {
        for (std::size_t i = 0; i < share_ && left_ != 0; ++i) {
            __builtin_prefetch(reinterpret_cast<const void*>(next_), 0, kSecondLevel);
            next_ += kLine;
            if (next_ < row_ + bytes_) continue;
            row_ += row_bytes_;
            next_ = row_ / kLine * kLine;
            --left_;
        }
    }

  private:
    static constexpr std::size_t kLine = 64;
    static constexpr int kSecondLevel = 2;

    std::uintptr_t row_ = 0;
    std::uintptr_t next_ = 0;  // line
    std::size_t row_bytes_ = 0;
    std::size_t bytes_ = 0;  // of a row
    std::size_t left_ = 0;   // rows
    std::size_t share_ = 0;  // lines of one step
};

}  // namespace kvcast
