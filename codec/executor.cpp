#include "codec/executor.h"

#include <algorithm>
#include <chrono>
#include <system_error>
#include <utility>

namespace kvcast {
namespace {

// Until `done` or for 100 microseconds.
template <typename Done>
void look_out(Done&& done) {
    using Clock = std::chrono::steady_clock;
    for (const auto end = Clock::now() + std::chrono::microseconds(100); !done() && Clock::now() < end;)
        std::this_thread::yield();
}

}  // namespace

ThreadPool::ThreadPool(std::size_t workers) {
    try {
        for (std::size_t w = 1; w < workers; ++w) threads_.emplace_back([this, w] { serve(w); });
    } catch (...) {
        stop();
        throw;
    }
}

ThreadPool::~ThreadPool() {
    stop();
}

void ThreadPool::stop() {
    {
        const std::lock_guard lock(mutex_);
        stop_ = true;
        ++round_;
    }
    wake_.notify_all();
    for (std::thread& t : threads_) t.join();
}

void ThreadPool::run(std::size_t count, const std::function<void(std::size_t, std::size_t)>& task) {
    std::unique_lock lock(mutex_);
    task_ = &task;
    next_ = 0;
    count_ = count;
    ++round_;
    wake_.notify_all();
    work(0, lock);
    lock.unlock();
    look_out([this] { return running_ == 0; });
    lock.lock();
    done_.wait(lock, [this] { return running_ == 0; });
    task_ = nullptr;
    if (const std::exception_ptr failure = std::exchange(failure_, nullptr)) std::rethrow_exception(failure);
}

void ThreadPool::serve(std::size_t worker) {
    for (std::size_t served = 0;;) {
        look_out([&] { return round_ != served; });
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return round_ != served; });
        served = round_;
        if (stop_) return;
        work(worker, lock);
    }
}

// Takes tasks until none is left; the lock is released while one runs.
void ThreadPool::work(std::size_t worker, std::unique_lock<std::mutex>& lock) {
    while (next_ < count_) {
        const std::size_t i = next_++;
        ++running_;
        const auto* task = task_;
        lock.unlock();
        std::exception_ptr failure;
        try {
            (*task)(i, worker);
        } catch (...) {
            failure = std::current_exception();
        }
        lock.lock();
        if (failure) {
            next_ = count_;
            if (!failure_) failure_ = failure;
        }
        if (--running_ == 0) done_.notify_one();
    }
}

std::unique_ptr<Executor> open_pool(std::size_t most) {
    try {
        return std::make_unique<ThreadPool>(
            std::clamp<std::size_t>(std::thread::hardware_concurrency(), 1, most));
    } catch (const std::system_error&) {
        return std::make_unique<SerialExecutor>();
    }
}

}  // namespace kvcast
