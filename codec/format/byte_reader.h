// The one place where header bytes are read. It cannot run off the end: a read past it yields zero and marks
// the reader as failed, so that a parser reads a run of fields and checks once.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

namespace kvcast {

static_assert(std::endian::native == std::endian::little,
              "the format is little-endian, and so is this reader");

class ByteReader {
  public:
    explicit ByteReader(std::span<const std::uint8_t> bytes) : bytes_(bytes) {}

    bool ok() const { return ok_; }
    std::size_t position() const { return at_; }
    std::size_t left() const { return bytes_.size() - at_; }

    // A little-endian integer of fixed size.
    template <typename T>
    T fixed() {
        T value{};
        const auto raw = take(sizeof(T));
        if (!raw.empty()) std::memcpy(&value, raw.data(), sizeof(T));
        return value;
    }

    std::uint32_t u24() {
        const auto raw = take(3);
        return raw.empty() ? 0u : raw[0] | std::uint32_t{raw[1]} << 8 | std::uint32_t{raw[2]} << 16;
    }

    // LEB128, at most ten bytes; fails on a longer one, on overflow and on a needless last zero byte.
    std::uint64_t varint() {
        std::uint64_t value = 0;
        for (unsigned shift = 0; shift < 64; shift += 7) {
            const auto byte = fixed<std::uint8_t>();
            if (!ok_ || (shift == 63 && byte > 1) || (shift > 0 && byte == 0)) return fail();
            value |= std::uint64_t{byte & 0x7fu} << shift;
            if ((byte & 0x80u) == 0) return value;
        }
        return fail();
    }

    // The next `count` bytes; empty and failed where there are fewer.
    std::span<const std::uint8_t> take(std::size_t count) {
        if (!ok_ || count > left()) {
            fail();
            return {};
        }
        const auto out = bytes_.subspan(at_, count);
        at_ += count;
        return out;
    }

    std::uint64_t fail() {
        ok_ = false;
        return 0;
    }

  private:
    std::span<const std::uint8_t> bytes_;
    std::size_t at_ = 0;
    bool ok_ = true;
};

}  // namespace kvcast
