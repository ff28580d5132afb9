#include "tests/guarded.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <new>

namespace kvcast::test {
namespace {

constexpr std::uint8_t kPattern = 0x5a;

std::size_t page_bytes() {
    return static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
}

}  // namespace

GuardedBytes::GuardedBytes(std::size_t bytes, Edge edge, std::uint8_t fill) : bytes_(bytes) {
    const std::size_t page = page_bytes();
    const std::size_t inner = std::max((bytes + page - 1) / page * page, page);
    map_bytes_ = inner + 2 * page;
    void* const map = mmap(nullptr, map_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) throw std::bad_alloc();
    map_ = static_cast<std::byte*>(map);
    if (mprotect(map_ + page, inner, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
    std::memset(map_ + page, kPattern, inner);
    data_ = map_ + page + (edge == Edge::kEnd ? inner - bytes : 0);
    std::memset(data_, fill, bytes);
}

GuardedBytes::~GuardedBytes() {
    munmap(map_, map_bytes_);
}

bool GuardedBytes::intact() const {
    const std::byte* const first = map_ + page_bytes();
    const std::byte* const last = map_ + map_bytes_ - page_bytes();
    const auto untouched = [](std::byte b) { return b == std::byte{kPattern}; };
    return std::all_of(first, static_cast<const std::byte*>(data_), untouched) &&
           std::all_of(static_cast<const std::byte*>(data_ + bytes_), last, untouched);
}

}  // namespace kvcast::test
