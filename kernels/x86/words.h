// The words that a decoder still has to read, so that a whole group may be loaded without looking at the end
// first: the last bytes of a stream are read from a copy with zeros behind it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/ops.h"

namespace kvcast::kernels::x86 {

class Words {
  public:
    // No group takes more: 32 words of refill, 24 raw planes, 32 escapes.
    static constexpr std::ptrdiff_t kMostOfGroup = 64 + 24 * 4 + 64;

    void begin(RansDecoder& decoder) {
        decoder_ = &decoder;
        next = decoder.next;
        end_ = real_end_ = next + (decoder.end - next) / 2 * 2;
    }

    // Makes kMostOfGroup bytes readable at `next`.
    void prepare() {
        if (end_ - next < kMostOfGroup) [[unlikely]]
            pad();
    }

    // Leaves the decoder where the last group ended.
    void finish() {
        check();
        decoder_->next = real_end_ - (end_ - next);
    }

    const std::uint8_t* next = nullptr;

  private:
    // What was read beyond the end was zero, and stays unread.
    void check() {
        if (next <= end_) return;
        decoder_->overrun = 1;
        next = end_;
    }

    void pad() {
        check();
        if (end_ != real_end_) return;
        const std::ptrdiff_t left = end_ - next;
        std::memcpy(copy_, next, static_cast<std::size_t>(left));
        std::memset(copy_ + left, 0, kMostOfGroup);
        next = copy_;
        end_ = copy_ + left;
    }

    RansDecoder* decoder_ = nullptr;
    const std::uint8_t* end_ = nullptr;
    const std::uint8_t* real_end_ = nullptr;
    std::uint8_t copy_[2 * kMostOfGroup];
};

}  // namespace kvcast::kernels::x86
