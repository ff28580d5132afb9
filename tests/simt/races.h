// What the thread sanitizer is told of a block's threads, where a build has it (SIMT_TSAN): fibres are
// threads to it, and memory is ordered between them by what orders it on a GPU, and by nothing else:
// __syncwarp and barriers, for those who take part. Shuffles, votes and products of matrices do not order it
// (CUDA C++ Programming Guide, "Warp Vote Functions", "Warp Shuffle Functions"). Elsewhere all of this is
// empty.
//
// The emulator itself (simt.cpp, context.cpp) is compiled without the sanitizer, which sees of it what it
// says here.
#pragma once

#include <cstddef>

#ifdef SIMT_TSAN
#include <sanitizer/tsan_interface.h>

extern "C" {
// In the sanitizer's library, and in no header of it.
void __tsan_read_range(void* at, std::size_t bytes);   // NOLINT(bugprone-reserved-identifier)
void __tsan_write_range(void* at, std::size_t bytes);  // NOLINT(bugprone-reserved-identifier)
}
#endif

namespace simt {

// Whether launches fail where threads race.
#ifdef SIMT_TSAN
inline constexpr bool kSeesRaces = true;
#else
inline constexpr bool kSeesRaces = false;
#endif

// Who takes at a place comes after all who have given there before.
inline void give_order([[maybe_unused]] void* at) {
#ifdef SIMT_TSAN
    __tsan_release(at);
#endif
}
inline void take_order([[maybe_unused]] void* at) {
#ifdef SIMT_TSAN
    __tsan_acquire(at);
#endif
}

// A place.
class Order {
  public:
    void give() { give_order(this); }
    void take() { take_order(this); }

  private:
    [[maybe_unused]] char place_ = 0;
};

// The orders of a place where threads meet again and again. Those of one meeting have all gone on before the
// next but one begins.
class Meetings {
  public:
    Order& current() { return orders_[round_ % 2]; }
    void next() { ++round_; }

  private:
    Order orders_[2];
    unsigned round_ = 0;
};

// A fibre, as a thread.
class WatchedThread {
  public:
    WatchedThread() = default;
    WatchedThread(const WatchedThread&) = delete;
    WatchedThread& operator=(const WatchedThread&) = delete;

#ifdef SIMT_TSAN
    ~WatchedThread() {
        end();
    }
    // A new one.
    void renew() {
        end();
        thread_ = __tsan_create_fiber(0);
        own_ = true;
    }
    // The one that runs.
    void be_current() {
        thread_ = __tsan_get_current_fiber();
    }
    // Just before its stack is switched to.
    void go_on() {
        __tsan_switch_to_fiber(thread_, __tsan_switch_to_fiber_no_sync);
    }
    // It will not go on: gives what it has not given itself. `current` is the one that runs.
    void cut_off(WatchedThread& current, Order& order) {
        go_on();
        order.give();
        current.go_on();
    }

  private:
    void end() {
        if (own_) __tsan_destroy_fiber(thread_);
    }

    void* thread_ = nullptr;
    bool own_ = false;
#else
    void renew() {}
    void be_current() {}
    void go_on() {}
    void cut_off(WatchedThread&, Order&) {}
#endif
};

// The running thread reads or writes, whoever does it for it.
inline void reads([[maybe_unused]] const void* at, [[maybe_unused]] std::size_t bytes) {
#ifdef SIMT_TSAN
    __tsan_read_range(const_cast<void*>(at), bytes);
#endif
}
inline void writes([[maybe_unused]] void* at, [[maybe_unused]] std::size_t bytes) {
#ifdef SIMT_TSAN
    __tsan_write_range(at, bytes);
#endif
}

}  // namespace simt
