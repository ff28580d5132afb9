// How the codec runs independent pieces of work. The library owns no threads: the caller passes an Executor,
// its own or one of these.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace kvcast {

class Executor {
  public:
    virtual ~Executor() = default;

    // How many tasks may run at once; `worker` below is less than this.
    virtual std::size_t workers() const = 0;

    // Calls task(i, worker) for every i < count, each once, in any order and thread, and returns when all are
    // done. No two calls with the same worker overlap. Where a task throws (memory exhaustion), so does this,
    // when all that had begun are done; others may be left out. Not re-entrant, and one run at a time.
    virtual void run(std::size_t count,
                     const std::function<void(std::size_t i, std::size_t worker)>& task) = 0;
};

// Everything in the calling thread.
class SerialExecutor final : public Executor {
  public:
    std::size_t workers() const override { return 1; }
    void run(std::size_t count, const std::function<void(std::size_t, std::size_t)>& task) override {
        for (std::size_t i = 0; i < count; ++i) task(i, 0);
    }
};

// A fixed set of threads; the calling thread works too. Who has nothing to do looks out for 100 microseconds
// before it sleeps: layers follow each other faster than a sleeping thread wakes, in virtual machines above
// all.
class ThreadPool final : public Executor {
  public:
    // `workers` at least 1, the caller counted in. Throws std::system_error where the system has no more
    // threads.
    explicit ThreadPool(std::size_t workers);
    ~ThreadPool() override;
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    std::size_t workers() const override { return threads_.size() + 1; }
    void run(std::size_t count, const std::function<void(std::size_t, std::size_t)>& task) override;

  private:
    void stop();
    void serve(std::size_t worker);
    void work(std::size_t worker, std::unique_lock<std::mutex>& lock);

    std::mutex mutex_;
    std::condition_variable wake_;
    std::condition_variable done_;
    const std::function<void(std::size_t, std::size_t)>* task_ = nullptr;
    std::exception_ptr failure_;  // the first one
    std::size_t next_ = 0;
    std::size_t count_ = 0;
    std::atomic<std::size_t> running_ = 0;  // written under the lock, as round_ is
    std::atomic<std::size_t> round_ = 0;    // of tasks, or the end of all
    bool stop_ = false;
    std::vector<std::thread> threads_;
};

// A pool of as many threads as there are processors, at most `most`; the calling thread alone where the
// system has no more threads.
std::unique_ptr<Executor> open_pool(std::size_t most);

}  // namespace kvcast
