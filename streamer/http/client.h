// A thread of its own and the connections that live on it: what sessions need where the caller has no event
// loop.
#pragma once

#include <memory>

#include "streamer/event_loop.h"
#include "streamer/http/curl_transport.h"
#include "streamer/memory_pool.h"

namespace kvcast::streamer {

// Shared by any number of sessions, which must end before it. Thread-safe; what transport() returns is the
// loop's, as sessions use it.
class Client {
  public:
    // Throws what ThreadLoop and CurlTransport do.
    explicit Client(HttpOptions options) {
        loop_.run([&] { transport_ = std::make_unique<CurlTransport>(loop_, std::move(options)); });
    }
    // Sessions that were destroyed a moment ago are done with the transport when the loop has stopped.
    ~Client() {
        loop_.stop();
        transport_.reset();
    }
    Client(const Client&) = delete;
    Client& operator=(const Client&) = delete;

    ThreadLoop& loop() { return loop_; }
    const ThreadLoop& loop() const { return loop_; }
    Transport& transport() { return *transport_; }
    // For SessionOptions::memory.
    const std::shared_ptr<MemoryPool>& memory() const { return memory_; }

  private:
    ThreadLoop loop_;
    std::unique_ptr<CurlTransport> transport_;
    std::shared_ptr<MemoryPool> memory_ = std::make_shared<MemoryPool>();
};

}  // namespace kvcast::streamer
