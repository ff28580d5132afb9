// Outgoing lines, one after another, from registers. What moves a line is the backend's.
#pragma once

#include <cstddef>
#include <span>

#include "kernels/ops.h"

namespace kvcast::kernels::x86 {

class Sender {
  public:
    explicit Sender(std::span<Outgoing> outgoing)
        : next_(outgoing.data()), last_(outgoing.data() + outgoing.size()), begun_(!outgoing.empty()) {
        if (begun_) now_ = *next_;
        skip_empty();
    }

    bool any() const { return now_.left != 0; }
    const std::uint8_t* from() const { return now_.from; }
    std::uint8_t* to() const { return now_.to; }

    void left() {
        now_.leave(Outgoing::kLine);
        if (now_.left == 0) [[unlikely]]
            skip_empty();
    }

    void finish() {
        if (begun_) *next_ = now_;
    }

  private:
    void skip_empty() {
        while (now_.left == 0 && next_ != last_ && next_ + 1 != last_) {
            *next_ = now_;
            now_ = *++next_;
        }
    }

    Outgoing now_;
    Outgoing* next_;
    Outgoing* last_;
    bool begun_;
};

}  // namespace kvcast::kernels::x86
