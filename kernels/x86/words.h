// The words that a decoder still has to read, so that a whole group may be loaded without looking at the end
// first: the last bytes of a stream are read from a copy with zeros behind it.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/ops.h"

namespace kvcast::kernels::x86 {

class Words {
  public:
    // No group takes more: 32 words of refill, 24 raw planes, 32 escapes.
    static constexpr std::ptrdiff_t kMostOfGroup = 64 + 24 * 4 + 64;

    // Where the last bytes are copied to. Apart from Words, whose members stay in registers.
    using Tail = std::uint8_t[2 * kMostOfGroup];

    void begin(const RansDecoder& decoder, Tail& tail) {
        next = decoder.next;
        end_ = real_end_ = next + (decoder.end - next) / 2 * 2;
        tail_ = tail;
    }

    // Makes kMostOfGroup bytes readable at `next`.
    void prepare() {
        if (end_ - next < kMostOfGroup) [[unlikely]]
            pad();
    }

    // Leaves the decoder where the last group ended.
    void finish(RansDecoder& decoder) {
        check();
        decoder.next = real_end_ - (end_ - next);
        decoder.overrun |= static_cast<std::uint32_t>(overrun_);
    }

    const std::uint8_t* next = nullptr;

  private:
    // What was read beyond the end was zero, and stays unread.
    void check() {
        if (next <= end_) return;
        overrun_ = true;
        next = end_;
    }

    void pad() {
        check();
        if (end_ != real_end_) return;
        const std::ptrdiff_t left = end_ - next;
        std::memcpy(tail_, next, static_cast<std::size_t>(left));
        std::memset(tail_ + left, 0, kMostOfGroup);
        next = tail_;
        end_ = tail_ + left;
    }

    const std::uint8_t* end_ = nullptr;
    const std::uint8_t* real_end_ = nullptr;
    std::uint8_t* tail_ = nullptr;
    bool overrun_ = false;
};

// Puts what the words of escaped lanes stand for in their places. Inlined, so that Words stays in registers.
template <typename Meant>
__attribute__((always_inline)) inline void take_escapes(std::int16_t* lanes, std::uint32_t escapes,
                                                        Words& words, Meant&& meant) {
    for (; escapes != 0; escapes &= escapes - 1, words.next += 2) {
        std::int16_t value;
        std::memcpy(&value, words.next, 2);
        lanes[std::countr_zero(escapes)] = meant(value);
    }
}

}  // namespace kvcast::kernels::x86
