// The inverse of ByteReader: appends header fields to a vector.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

namespace kvcast {

class ByteWriter {
  public:
    explicit ByteWriter(std::vector<std::uint8_t>& out) : out_(out) {}

    template <typename T>
    void fixed(T value) {
        std::array<std::uint8_t, sizeof(T)> raw;
        std::memcpy(raw.data(), &value, sizeof(T));
        bytes(raw);
    }

    void u24(std::uint32_t value) {
        for (unsigned shift = 0; shift < 24; shift += 8)
            out_.push_back(static_cast<std::uint8_t>(value >> shift));
    }

    void varint(std::uint64_t value) {
        for (; value >= 0x80; value >>= 7) out_.push_back(static_cast<std::uint8_t>(value | 0x80));
        out_.push_back(static_cast<std::uint8_t>(value));
    }

    void bytes(std::span<const std::uint8_t> data) {
        for (const std::uint8_t b : data) out_.push_back(b);
    }

  private:
    std::vector<std::uint8_t>& out_;
};

}  // namespace kvcast
