// Outgoing lines, one after another, from registers. What moves a line is the backend's.
#pragma once

#include <cstddef>
#include <span>

#include "kernels/ops.h"

namespace kvcast::kernels::x86 {

class Sender {
  public:
    explicit Sender(std::span<Outgoing> outgoing)
        : current_(outgoing.data()), end_(outgoing.data() + outgoing.size()) {
        if (current_ != end_) now_ = *current_;
        skip_empty();
    }

    bool any() const { return now_.left != 0; }
    const std::uint8_t* from() const { return now_.from; }
    std::uint8_t* to() const { return now_.to; }

    // After a line of what is there.
    void left() {
        now_.leave(Outgoing::kLine);
        if (now_.left == 0) [[unlikely]]
            skip_empty();
    }

    // Leaves what is outgoing as far as it came.
    void finish() {
        if (current_ != end_) *current_ = now_;
    }

  private:
    void skip_empty() {
        while (now_.left == 0 && current_ != end_ && current_ + 1 != end_) {
            *current_ = now_;
            now_ = *++current_;
        }
    }

    Outgoing now_;  // a copy of the current one
    Outgoing* current_;
    Outgoing* end_;
};

}  // namespace kvcast::kernels::x86
