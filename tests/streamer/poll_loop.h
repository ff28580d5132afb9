// An event loop of the caller's own: poll(2) on the thread that calls run_until().
#pragma once

#include <poll.h>
#include <unistd.h>

#include <functional>
#include <map>
#include <mutex>
#include <vector>

#include "streamer/event_loop.h"

namespace kvcast::test {

class PollLoop final : public streamer::EventLoop {
  public:
    PollLoop() {
        if (::pipe(wake_) != 0) throw std::runtime_error("pipe");
    }
    ~PollLoop() override {
        ::close(wake_[0]);
        ::close(wake_[1]);
    }
    PollLoop(const PollLoop&) = delete;
    PollLoop& operator=(const PollLoop&) = delete;

    streamer::Time now() const override { return streamer::Clock::now(); }
    void post(std::function<void()> task) override {
        {
            const std::scoped_lock lock(mutex_);
            posted_.push_back(std::move(task));
        }
        [[maybe_unused]] const auto written = ::write(wake_[1], "x", 1);
    }
    TimerId after(streamer::Duration delay, std::function<void()> task) override {
        timers_.emplace(std::pair(now() + delay, ++last_), std::move(task));
        return last_;
    }
    void cancel(TimerId timer) override {
        std::erase_if(timers_, [&](const auto& t) { return t.first.second == timer; });
    }
    void watch(int descriptor, streamer::Interest interest,
               std::function<void(streamer::Interest)> callback) override {
        watched_.erase(descriptor);
        if (interest.readable || interest.writable) watched_[descriptor] = {interest, std::move(callback)};
    }

    void run_until(const std::function<bool()>& done) {
        while (!done()) turn();
    }

    // One round, at most 5 ms.
    void turn() {
        std::vector<pollfd> set = {{wake_[0], POLLIN, 0}};
        for (const auto& [fd, w] : watched_) {
            const int events = (w.interest.readable ? POLLIN : 0) | (w.interest.writable ? POLLOUT : 0);
            set.push_back({fd, static_cast<short>(events), 0});
        }
        ::poll(set.data(), set.size(), 5);
        char drained[64];
        if (set[0].revents != 0) [[maybe_unused]]
            const auto got = ::read(wake_[0], drained, sizeof drained);
        for (std::size_t i = 1; i < set.size(); ++i) {
            const auto it = watched_.find(set[i].fd);
            if (set[i].revents == 0 || it == watched_.end()) continue;
            const auto callback = it->second.callback;
            callback({(set[i].revents & (POLLIN | POLLERR | POLLHUP)) != 0, (set[i].revents & POLLOUT) != 0});
        }
        std::vector<std::function<void()>> tasks;
        {
            const std::scoped_lock lock(mutex_);
            tasks.swap(posted_);
        }
        for (const auto& task : tasks) task();
        while (!timers_.empty() && timers_.begin()->first.first <= now()) {
            const auto entry = timers_.extract(timers_.begin());
            entry.mapped()();
        }
    }

  private:
    struct Watched {
        streamer::Interest interest;
        std::function<void(streamer::Interest)> callback;
    };

    int wake_[2] = {-1, -1};
    std::mutex mutex_;
    std::vector<std::function<void()>> posted_;
    TimerId last_ = 0;
    std::map<std::pair<streamer::Time, TimerId>, std::function<void()>> timers_;
    std::map<int, Watched> watched_;
};

}  // namespace kvcast::test
