// The thread that a client's network work runs on: its own (ThreadLoop), or the caller's event loop behind
// this interface.
//
// Everything but post() is called on the loop's thread, and every callback runs there. Callbacks may call any
// of these functions, and throw nothing: what leaves one ends the process.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>

namespace kvcast::streamer {

// Monotonic.
using Clock = std::chrono::steady_clock;
using Time = Clock::time_point;
using Duration = Clock::duration;

constexpr double to_seconds(Duration d) {
    return std::chrono::duration<double>(d).count();
}
constexpr Duration from_seconds(double s) {
    return std::chrono::duration_cast<Duration>(std::chrono::duration<double>(s));
}

struct Interest {
    bool readable = false;
    bool writable = false;
};

class EventLoop {
  public:
    using TimerId = std::uint64_t;

    virtual ~EventLoop() = default;

    virtual Time now() const = 0;

    // Runs `task` on the loop's thread, soon and in the order posted. From any thread.
    virtual void post(std::function<void()> task) = 0;

    // Runs `task` once after `delay`. Ids are never reused and never 0; cancelling a past one does nothing.
    virtual TimerId after(Duration delay, std::function<void()> task) = 0;
    virtual void cancel(TimerId timer) = 0;

    // Calls back whenever the descriptor is ready, level-triggered, until watched again; no interest forgets
    // the descriptor. Errors and hang-ups count as readable.
    virtual void watch(int descriptor, Interest interest, std::function<void(Interest ready)> callback) = 0;
};

// A loop with a thread of its own (epoll). Throws std::system_error where the system has no thread or
// descriptor left for it.
class ThreadLoop final : public EventLoop {
  public:
    ThreadLoop();
    ~ThreadLoop() override;
    ThreadLoop(const ThreadLoop&) = delete;
    ThreadLoop& operator=(const ThreadLoop&) = delete;

    Time now() const override { return Clock::now(); }
    void post(std::function<void()> task) override;
    TimerId after(Duration delay, std::function<void()> task) override;
    void cancel(TimerId timer) override;
    void watch(int descriptor, Interest interest, std::function<void(Interest)> callback) override;

    // Whether the calling thread is the loop's.
    bool is_current() const;

    // Runs `task` on the loop and returns when it has run; what it throws is thrown here. Not from the loop's
    // own thread.
    void run(const std::function<void()>& task);

    // Ends the thread once it has run what was posted before; what is posted later is dropped. The destructor
    // does so, too. Afterwards everything but run() may be called from one thread, and does nothing any more.
    void stop();

  private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

}  // namespace kvcast::streamer
