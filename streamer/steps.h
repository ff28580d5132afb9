// What a session does, step by step: on its loop's thread, and on lanes beside it.
#pragma once

#include <memory>
#include <utility>

#include "codec/format/error.h"
#include "streamer/event_loop.h"
#include "streamer/lane.h"
#include "streamer/rules/rule.h"

namespace kvcast::streamer {

// The session's parts share it. Owned by a shared_ptr, which steps that are still to come hold too.
class Steps : public std::enable_shared_from_this<Steps> {
  public:
    Steps(EventLoop& loop, Time start) : loop_(loop), start_(start) {}
    virtual ~Steps() = default;
    Steps(const Steps&) = delete;
    Steps& operator=(const Steps&) = delete;

    // Ends the session early, from any thread.
    virtual void abandon(Status why) = 0;
    // Whether it is to end early. From any thread.
    virtual bool is_cancelled() const = 0;
    // Whether it has ended, or is to: nothing new is begun. On the loop's thread.
    virtual bool is_over() const = 0;

    // Since the session began.
    Seconds now() const { return to_seconds(loop_.now() - start_); }

    // What happens on the loop's thread. Where it throws, be it that memory is used up or that the sink has
    // failed, the session ends; where there is no memory even for that, the process does.
    template <typename Step>
    void carry_out(Step&& step) noexcept {
        try {
            step();
        } catch (...) {
            abandon(status_of_exception());
        }
    }
    template <typename Step>
    void post(Step step) {
        loop_.post([self = shared_from_this(), step = std::move(step)]() mutable { self->carry_out(step); });
    }
    // The same for what happens on a lane.
    template <typename Task>
    void run(Lane& lane, Task task) {
        lane.run([self = shared_from_this(), task = std::move(task)]() mutable { self->carry_out(task); });
    }

  private:
    EventLoop& loop_;
    const Time start_;
};

}  // namespace kvcast::streamer
