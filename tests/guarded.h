// Memory that ends, or begins, where readable memory does: reading or writing one byte beyond is a fault, and
// what is written on the other side is noticed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <type_traits>
#include <vector>

namespace kvcast::test {

enum class Edge : std::uint8_t { kEnd, kBegin };

// Bytes between two pages that fault, against one of them; the rest of the page on the other side holds a
// pattern that intact() looks at.
class GuardedBytes {
  public:
    explicit GuardedBytes(std::size_t bytes, Edge edge = Edge::kEnd, std::uint8_t fill = 0xa5);
    ~GuardedBytes();
    GuardedBytes(const GuardedBytes&) = delete;
    GuardedBytes& operator=(const GuardedBytes&) = delete;

    std::byte* data() const { return data_; }
    std::size_t size() const { return bytes_; }
    bool intact() const;

  private:
    std::byte* map_ = nullptr;
    std::size_t map_bytes_ = 0;
    std::byte* data_ = nullptr;
    std::size_t bytes_ = 0;
};

// An array of elements in such memory. Aligned for T at either edge, as long as a page is a multiple of its
// size.
template <typename T>
class Guarded {
    static_assert(std::is_trivially_copyable_v<T>);

  public:
    explicit Guarded(std::size_t count, Edge edge = Edge::kEnd) : bytes_(count * sizeof(T), edge) {}
    explicit Guarded(std::span<const T> content, Edge edge = Edge::kEnd) : Guarded(content.size(), edge) {
        if (!content.empty()) std::memcpy(bytes_.data(), content.data(), content.size_bytes());
    }

    T* data() const { return reinterpret_cast<T*>(bytes_.data()); }
    std::size_t size() const { return bytes_.size() / sizeof(T); }
    T& operator[](std::size_t i) const { return data()[i]; }
    T* begin() const { return data(); }
    T* end() const { return data() + size(); }
    std::vector<T> values() const { return {begin(), end()}; }
    bool intact() const { return bytes_.intact(); }

  private:
    GuardedBytes bytes_;
};

}  // namespace kvcast::test
