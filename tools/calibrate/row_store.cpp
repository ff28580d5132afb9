#include "tools/calibrate/row_store.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>

#include "tools/common/file.h"

namespace kvcast::calibrate {

RowStore::RowStore(std::vector<std::size_t> widths, std::size_t rows)
    : widths_(std::move(widths)), capacity_(rows) {
    std::size_t floats = 0;
    for (const std::size_t w : widths_) {
        begin_.push_back(floats);
        floats += w * rows;
    }
    bytes_ = std::max<std::size_t>(1, floats) * sizeof(float);
    const std::string folder = std::filesystem::temp_directory_path().string();
    const int fd = ::open(folder.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    const bool room = fd >= 0 && ::posix_fallocate(fd, 0, static_cast<off_t>(bytes_)) == 0;
    void* const at = room ? ::mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) : MAP_FAILED;
    const int error = errno;
    if (fd >= 0) ::close(fd);
    if (at == MAP_FAILED) {
        throw tools::Error(fmt::format("{}: no room for {} bytes of rows: {}", folder, bytes_,
                                       room || fd < 0 ? std::strerror(error) : "the disk is full"));
    }
    data_ = static_cast<float*>(at);
}

RowStore::~RowStore() {
    ::munmap(data_, bytes_);
}

void RowStore::append(std::size_t plane, std::span<const float> values) {
    const std::size_t count = values.size() / widths_[plane];
    if (rows_ + count > capacity_) throw tools::Error("more rows than were announced");
    std::copy(values.begin(), values.end(), data_ + begin_[plane] + rows_ * widths_[plane]);
}

void RowStore::advance(std::size_t rows) {
    rows_ += rows;
}

}  // namespace kvcast::calibrate
