// A thread that runs tasks one after another.
#pragma once

#include <condition_variable>
#include <functional>
#include <mutex>
#include <queue>
#include <thread>

namespace kvcast::streamer {

class Lane {
  public:
    Lane() : thread_([this] { serve(); }) {}
    ~Lane() { stop(); }
    Lane(const Lane&) = delete;
    Lane& operator=(const Lane&) = delete;

    // Tasks throw nothing. Once stopped, they are dropped: they may own whoever owns the lane.
    void run(std::function<void()> task) {
        {
            const std::scoped_lock lock(mutex_);
            if (stop_) return;
            tasks_.push(std::move(task));
        }
        wake_.notify_one();
    }

    // Drops what has not begun, and waits for what has.
    void stop() { end(true); }
    // Waits for all of it.
    void finish() { end(false); }

  private:
    void end(bool drop) {
        {
            const std::scoped_lock lock(mutex_);
            stop_ = true;
            while (drop && !tasks_.empty()) tasks_.pop();
        }
        wake_.notify_one();
        if (thread_.joinable()) thread_.join();
    }

    void serve() {
        std::unique_lock lock(mutex_);
        while (true) {
            wake_.wait(lock, [this] { return stop_ || !tasks_.empty(); });
            if (tasks_.empty()) return;
            {
                const std::function<void()> task = std::move(tasks_.front());
                tasks_.pop();
                lock.unlock();
                task();
            }
            lock.lock();
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_;
    std::queue<std::function<void()>> tasks_;
    bool stop_ = false;
    std::thread thread_;
};

}  // namespace kvcast::streamer
