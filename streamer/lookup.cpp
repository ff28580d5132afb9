#include "streamer/lookup.h"

#include <condition_variable>
#include <mutex>
#include <optional>
#include <random>

namespace kvcast::streamer {
namespace {

// Lives until its answer is there, and then ends on the loop's thread.
class Lookup {
  public:
    Lookup(EventLoop& loop, Transport& transport, const LookupOptions& options)
        : loop_(loop), transport_(transport), options_(options) {}

    Result<Located> run(Wanted wanted) {
        loop_.post([this, wanted = std::move(wanted)]() mutable {
            try {
                begin(std::move(wanted));
            } catch (...) {
                end(status_of_exception());
            }
        });
        std::unique_lock lock(mutex_);
        answered_.wait(lock, [this] { return answer_.has_value(); });
        return std::move(*answer_);
    }

  private:
    void begin(Wanted wanted) {
        timer_ = loop_.after(options_.patience, [this] {
            timer_ = 0;
            end(Status(ErrorCode::kTimeout, "no answer in time"));
        });
        const auto clock = options_.wall_clock ? options_.wall_clock : system_seconds;
        locator_ = std::make_unique<Locator>(
            Locator::Environment{loop_, transport_, options_.download, options_.trusted, clock(),
                                 std::random_device()()},
            std::move(wanted), [](Duration) {}, [this](Result<Located> found) { end(std::move(found)); });
    }

    void end(Result<Located> answer) {
        loop_.cancel(timer_);
        locator_.reset();
        const std::scoped_lock lock(mutex_);  // and notified under it: who waits for it destroys this
        answer_.emplace(std::move(answer));
        answered_.notify_one();
    }

    EventLoop& loop_;
    Transport& transport_;
    const LookupOptions& options_;
    EventLoop::TimerId timer_ = 0;
    std::unique_ptr<Locator> locator_;
    std::mutex mutex_;
    std::condition_variable answered_;
    std::optional<Result<Located>> answer_;  // guarded by mutex_
};

}  // namespace

Result<Located> look_up(EventLoop& loop, Transport& transport, Wanted wanted, const LookupOptions& options) {
    if (Status s = check_wanted(wanted); !s.ok()) return s;
    return Lookup(loop, transport, options).run(std::move(wanted));
}

}  // namespace kvcast::streamer
