// A stack that is not running, and the switch to it.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)

extern "C" void simt_switch(void** from, void* to);

namespace simt {

// Six registers and a stack pointer. (ucontext saves the signal mask too, by a system call for every switch,
// which is most of the time that an emulated kernel takes.)
class Context {
  public:
    // `entry` never returns.
    void start(std::byte* stack, std::size_t bytes, void (*entry)()) {
        auto** top = reinterpret_cast<void**>(stack + bytes);
        *--top = nullptr;                              // where entry would return to
        *--top = reinterpret_cast<void*>(entry);       // where the first switch returns to
        for (int i = 0; i < 6; ++i) *--top = nullptr;  // rbp, rbx, r12 to r15
        stack_pointer_ = top;
    }

    // Suspends the running stack into `from`.
    static void swap(Context& from, Context& to) { simt_switch(&from.stack_pointer_, to.stack_pointer_); }

  private:
    void* stack_pointer_ = nullptr;
};

}  // namespace simt

#else

#include <ucontext.h>

namespace simt {

class Context {
  public:
    // `entry` never returns.
    void start(std::byte* stack, std::size_t bytes, void (*entry)()) {
        getcontext(&context_);
        context_.uc_stack.ss_sp = stack;
        context_.uc_stack.ss_size = bytes;
        context_.uc_link = nullptr;
        makecontext(&context_, entry, 0);
    }

    // Suspends the running stack into `from`.
    static void swap(Context& from, Context& to) { swapcontext(&from.context_, &to.context_); }

  private:
    ucontext_t context_ = {};
};

}  // namespace simt

#endif
