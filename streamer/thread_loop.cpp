#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <exception>
#include <future>
#include <map>
#include <mutex>
#include <span>
#include <system_error>
#include <thread>
#include <unordered_map>
#include <vector>

#include "streamer/event_loop.h"

namespace kvcast::streamer {
namespace {

constexpr Duration kLongest = std::chrono::hours(24 * 365);  // of a delay, so that sums stay in range

class Descriptor {
  public:
    Descriptor(int fd, const char* what) : fd_(fd) {
        if (fd < 0) throw std::system_error(errno, std::generic_category(), what);
    }
    ~Descriptor() { ::close(fd_); }
    Descriptor(const Descriptor&) = delete;
    Descriptor& operator=(const Descriptor&) = delete;
    int get() const { return fd_; }

  private:
    int fd_;
};

}  // namespace

struct ThreadLoop::Impl {
    using Watcher = std::shared_ptr<std::function<void(Interest)>>;

    Descriptor epoll{::epoll_create1(EPOLL_CLOEXEC), "epoll_create1"};
    Descriptor wake{::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), "eventfd"};
    std::mutex mutex;
    std::vector<std::function<void()>> posted;  // guarded by mutex
    bool stop = false;                          // guarded by mutex
    std::multimap<Time, std::pair<TimerId, std::function<void()>>> timers;
    TimerId next_timer = 1;
    std::unordered_map<int, Watcher> watchers;
    std::thread thread;

    Impl() {
        epoll_event event = {};
        event.events = EPOLLIN;
        event.data.fd = wake.get();
        if (::epoll_ctl(epoll.get(), EPOLL_CTL_ADD, wake.get(), &event) != 0)
            throw std::system_error(errno, std::generic_category(), "epoll_ctl");
    }

    void notify() const {
        const std::uint64_t one = 1;
        [[maybe_unused]] const auto written = ::write(wake.get(), &one, sizeof one);
    }

    // Milliseconds until the next timer, rounded up; -1: none.
    int patience() const {
        if (timers.empty()) return -1;
        const auto left = std::chrono::ceil<std::chrono::milliseconds>(timers.begin()->first - Clock::now());
        return static_cast<int>(std::clamp<std::int64_t>(left.count(), 0, 60'000));
    }

    void run_due() {
        const Time now = Clock::now();
        while (!timers.empty() && timers.begin()->first <= now) {
            const auto task = std::move(timers.begin()->second.second);
            timers.erase(timers.begin());
            task();
        }
    }

    void run_ready(std::span<const epoll_event> events) {
        for (const epoll_event& event : events) {
            if (event.data.fd == wake.get()) {
                std::uint64_t count = 0;
                [[maybe_unused]] const auto got = ::read(wake.get(), &count, sizeof count);
                continue;
            }
            const auto it = watchers.find(event.data.fd);  // an earlier callback may have removed it
            if (it == watchers.end()) continue;
            const Watcher watcher = it->second;
            (*watcher)(
                {(event.events & (EPOLLIN | EPOLLERR | EPOLLHUP)) != 0, (event.events & EPOLLOUT) != 0});
        }
    }

    // Runs what was posted; false when it is time to end.
    bool run_posted() {
        std::vector<std::function<void()>> tasks;
        bool last = false;
        {
            const std::scoped_lock lock(mutex);
            last = stop;
            tasks.swap(posted);
        }
        for (const auto& task : tasks) task();
        return !last;
    }

    void serve() noexcept {
        std::array<epoll_event, 64> events;
        while (run_posted()) {
            const int count = ::epoll_wait(epoll.get(), events.data(), events.size(), patience());
            run_ready(std::span(events).first(static_cast<std::size_t>(std::max(count, 0))));
            run_due();
        }
    }
};

ThreadLoop::ThreadLoop() : impl_(std::make_unique<Impl>()) {
    impl_->thread = std::thread([this] { impl_->serve(); });
}

ThreadLoop::~ThreadLoop() {
    stop();
}

void ThreadLoop::stop() {
    {
        const std::scoped_lock lock(impl_->mutex);
        impl_->stop = true;
    }
    impl_->notify();
    if (impl_->thread.joinable()) impl_->thread.join();
}

bool ThreadLoop::is_current() const {
    return std::this_thread::get_id() == impl_->thread.get_id();
}

void ThreadLoop::post(std::function<void()> task) {
    {
        const std::scoped_lock lock(impl_->mutex);
        if (impl_->stop) return;
        impl_->posted.push_back(std::move(task));
    }
    impl_->notify();
}

EventLoop::TimerId ThreadLoop::after(Duration delay, std::function<void()> task) {
    const TimerId id = impl_->next_timer++;
    impl_->timers.emplace(Clock::now() + std::min<Duration>(delay, kLongest), std::pair(id, std::move(task)));
    return id;
}

void ThreadLoop::cancel(TimerId timer) {
    std::erase_if(impl_->timers, [&](const auto& entry) { return entry.second.first == timer; });
}

void ThreadLoop::watch(int descriptor, Interest interest, std::function<void(Interest)> callback) {
    if (!interest.readable && !interest.writable) {
        if (impl_->watchers.erase(descriptor) != 0)
            ::epoll_ctl(impl_->epoll.get(), EPOLL_CTL_DEL, descriptor, nullptr);
        return;
    }
    epoll_event event = {};
    event.events = (interest.readable ? std::uint32_t{EPOLLIN} : 0u) |
                   (interest.writable ? std::uint32_t{EPOLLOUT} : 0u);
    event.data.fd = descriptor;
    const bool known = impl_->watchers.contains(descriptor);
    impl_->watchers[descriptor] = std::make_shared<std::function<void(Interest)>>(std::move(callback));
    // A descriptor that was closed and opened again under its number has left the set by itself.
    if (!known || ::epoll_ctl(impl_->epoll.get(), EPOLL_CTL_MOD, descriptor, &event) != 0)
        ::epoll_ctl(impl_->epoll.get(), EPOLL_CTL_ADD, descriptor, &event);
}

void ThreadLoop::run(const std::function<void()>& task) {
    std::promise<void> done;
    post([&] {
        try {
            task();
            done.set_value();
        } catch (...) {
            done.set_exception(std::current_exception());
        }
    });
    done.get_future().get();
}

}  // namespace kvcast::streamer
