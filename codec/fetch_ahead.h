// Rows that are read next, brought into the second-level cache while something else is computed: rows of
// heads lie too far apart for the processor to see them coming, and fetched all at once they take as long as
// they would when they are needed. A hint only: nothing is read, and no address is invalid.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace kvcast {

class FetchAhead {
  public:
    static constexpr std::size_t kMost = 4;  // ranges of rows

    // Forgets what has not been fetched yet.
    void clear() { at_ = count_ = 0; }

    // `count` rows of `bytes` bytes each.
    void add(const void* rows, std::size_t row_bytes, std::size_t bytes, std::size_t count) {
        if (count != 0) ranges_[count_++] = {static_cast<const std::uint8_t*>(rows), row_bytes, bytes, count};
    }

    // All of it with the next so many steps.
    void spread(std::size_t steps) {
        std::size_t lines = 0;
        for (std::size_t i = 0; i < count_; ++i) lines += ranges_[i].rows * (ranges_[i].bytes / kLine + 1);
        share_ = (lines + steps - 1) / steps;
        if (count_ != 0) next_ = line_of(ranges_[0].row);
    }

    void step() {
        for (std::size_t i = 0; i < share_ && at_ < count_; ++i) fetch_line();
    }

  private:
    static constexpr std::size_t kLine = 64;
    static constexpr int kSecondLevel = 2;

    struct Range {
        const std::uint8_t* row;  // the next one
        std::size_t row_bytes;
        std::size_t bytes;
        std::size_t rows;  // left
    };

    void fetch_line() {
        __builtin_prefetch(next_, 0, kSecondLevel);
        next_ += kLine;
        Range& r = ranges_[at_];
        if (next_ < r.row + r.bytes) return;
        if (--r.rows != 0) {
            r.row += r.row_bytes;
        } else if (++at_ == count_) {
            return;
        }
        next_ = line_of(ranges_[at_].row);
    }

    static const std::uint8_t* line_of(const std::uint8_t* p) {
        return p - reinterpret_cast<std::uintptr_t>(p) % kLine;
    }

    std::array<Range, kMost> ranges_ = {};
    std::size_t count_ = 0;
    std::size_t at_ = 0;                  // range
    const std::uint8_t* next_ = nullptr;  // line
    std::size_t share_ = 0;               // lines of one step
};

}  // namespace kvcast
