// Memory for kernels: vectors and rows begin where a cache line does, so that whole vector registers do not
// straddle two.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

namespace kvcast {

template <typename T>
struct LineAllocator {
    using value_type = T;
    static constexpr std::align_val_t kLine{64};

    LineAllocator() = default;
    template <typename U>
    LineAllocator(const LineAllocator<U>&) {}

    T* allocate(std::size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), kLine)); }
    void deallocate(T* p, std::size_t) { ::operator delete(p, kLine); }

    friend bool operator==(const LineAllocator&, const LineAllocator&) { return true; }
};

template <typename T>
using AlignedVector = std::vector<T, LineAllocator<T>>;

// From one row of a tile of 16-bit elements to the next: whole lines, and an odd number of them, so that what
// is at the same place of many rows is not in the same set of a cache.
constexpr std::size_t line_stride(std::size_t elements) {
    constexpr std::size_t kInLine = 64 / sizeof(std::uint16_t);
    return ((elements + kInLine - 1) / kInLine | 1) * kInLine;
}

}  // namespace kvcast
