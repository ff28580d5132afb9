// Rows of KV on disk: calibration reads them plane by plane and several times, and they need not fit memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace kvcast::calibrate {

// A nameless temporary file of floats, [plane of all layers][row][width], mapped. Rows are appended to all
// planes alike. Not thread-safe for appending.
class RowStore {
  public:
    // Room for `rows` rows in planes of these widths, in the folder of temporary files. Throws tools::Error.
    RowStore(std::vector<std::size_t> widths, std::size_t rows);
    ~RowStore();
    RowStore(const RowStore&) = delete;
    RowStore& operator=(const RowStore&) = delete;

    std::size_t rows() const { return rows_; }  // appended so far
    std::size_t width(std::size_t plane) const { return widths_[plane]; }

    // Appends to one plane; call it for every plane with the same number of rows, then advance().
    void append(std::size_t plane, std::span<const float> values);
    void advance(std::size_t rows);

    const float* row(std::size_t plane, std::size_t row) const {
        return data_ + begin_[plane] + row * widths_[plane];
    }

  private:
    std::vector<std::size_t> widths_;
    std::vector<std::size_t> begin_;
    std::size_t capacity_ = 0;
    std::size_t rows_ = 0;
    std::size_t bytes_ = 0;
    float* data_ = nullptr;
};

}  // namespace kvcast::calibrate
