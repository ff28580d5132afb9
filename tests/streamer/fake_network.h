// A network and a clock that a test moves by hand.
#pragma once

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "streamer/transport.h"

namespace kvcast::test {

// Time stands still until advance().
class FakeLoop final : public streamer::EventLoop {
  public:
    streamer::Time now() const override { return now_; }
    void post(std::function<void()> task) override { after(streamer::Duration(0), std::move(task)); }
    TimerId after(streamer::Duration delay, std::function<void()> task) override {
        timers_.emplace(std::pair(now_ + delay, ++last_), std::move(task));
        return last_;
    }
    void cancel(TimerId timer) override {
        std::erase_if(timers_, [&](const auto& t) { return t.first.second == timer; });
    }
    void watch(int, streamer::Interest, std::function<void(streamer::Interest)>) override {}

    void advance(streamer::Duration by) {
        const streamer::Time end = now_ + by;
        while (!timers_.empty() && timers_.begin()->first.first <= end) {
            const auto entry = timers_.extract(timers_.begin());
            now_ = std::max(now_, entry.key().first);
            entry.mapped()();
        }
        now_ = end;
    }
    std::size_t timers() const { return timers_.size(); }

  private:
    streamer::Time now_{};
    TimerId last_ = 0;
    std::map<std::pair<streamer::Time, TimerId>, std::function<void()>> timers_;
};

// Requests wait until the test answers them.
class FakeTransport final : public streamer::Transport {
  public:
    struct Pending {
        streamer::HttpRequest request;
        streamer::HttpHandler* handler = nullptr;  // null: cancelled or answered
    };

    Id start(streamer::HttpRequest request, streamer::HttpHandler& handler) override {
        requests.push_back({std::move(request), &handler});
        if (!queues) handler.on_connected();
        return requests.size();
    }
    void cancel(Id id) override { requests[id - 1].handler = nullptr; }

    bool waits(std::size_t i) const { return i < requests.size() && requests[i].handler != nullptr; }
    std::size_t waiting() const {
        std::size_t n = 0;
        for (const Pending& p : requests) n += p.handler != nullptr;
        return n;
    }

    // Each returns what the handler answered.
    bool head(std::size_t i, const streamer::HttpHead& head) { return requests[i].handler->on_head(head); }
    bool body(std::size_t i, std::span<const std::uint8_t> bytes) {
        return requests[i].handler->on_body(bytes);
    }
    void end(std::size_t i, const streamer::HttpResult& result) {
        streamer::HttpHandler* handler = requests[i].handler;
        requests[i].handler = nullptr;
        handler->on_end(result);
    }

    void connect(std::size_t i) { requests[i].handler->on_connected(); }

    std::vector<Pending> requests;
    bool queues = false;  // requests get a connection by connect()
};

}  // namespace kvcast::test
