// An array that ends where readable memory does: reading or writing one byte behind it is a fault, and bytes
// written in front of it are noticed.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <stdexcept>
#include <vector>

namespace kvcast::test {

template <typename T>
class Guarded {
  public:
    explicit Guarded(std::size_t count) : count_(count) {
        const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
        const std::size_t pages = (count * sizeof(T) + kFront + page - 1) / page;
        mapped_ = (pages + 1) * page;
        void* at = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (at == MAP_FAILED) throw std::runtime_error("no memory for a guarded array");
        base_ = static_cast<std::uint8_t*>(at);
        mprotect(base_ + pages * page, page, PROT_NONE);
        front_ = pages * page - count * sizeof(T);
        std::memset(base_, kFill, front_);
    }
    explicit Guarded(const std::vector<T>& values) : Guarded(values.size()) {
        if (count_ != 0) std::memcpy(base_ + front_, values.data(), count_ * sizeof(T));
    }
    ~Guarded() { munmap(base_, mapped_); }
    Guarded(const Guarded&) = delete;
    Guarded& operator=(const Guarded&) = delete;

    // Aligned to T only where count is such that it is.
    T* data() { return reinterpret_cast<T*>(base_ + front_); }
    std::vector<T> values() { return {data(), data() + count_}; }

    bool front_is_whole() const {
        for (std::size_t i = 0; i < front_; ++i) {
            if (base_[i] != kFill) return false;
        }
        return true;
    }

  private:
    static constexpr std::size_t kFront = 256;
    static constexpr std::uint8_t kFill = 0x5a;

    std::size_t count_;
    std::size_t mapped_ = 0;
    std::uint8_t* base_ = nullptr;
    std::size_t front_ = 0;
};

}  // namespace kvcast::test
