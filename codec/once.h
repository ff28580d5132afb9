// Done once, by whichever thread comes first; others wait for it. std::call_once, but for functions that may
// throw: on some platforms (libstdc++'s bug 66146), and under the thread sanitizer, that waits for ever after
// one has.
#pragma once

#include <atomic>
#include <mutex>

namespace kvcast {

class Once {
  public:
    // Where it throws, the next caller tries again.
    template <typename Function>
    void run(const Function& function) {
        if (done_.load(std::memory_order_acquire)) return;
        const std::scoped_lock lock(mutex_);
        if (done_.load(std::memory_order_relaxed)) return;
        function();
        done_.store(true, std::memory_order_release);
    }

  private:
    std::mutex mutex_;
    std::atomic<bool> done_ = false;
};

}  // namespace kvcast
