// An object, fetched to its end: retries with backoff, resumes where it broke off, hedges against silence.
//
// Bytes that came stay, whichever attempt brought them; every attempt asks for what is missing only. What the
// bytes hash to is checked by the caller, who knows what was promised.
//
// All on the event loop's thread. Only the constructor throws (std::bad_alloc): a download that has no memory
// for what comes ends with kOutOfMemory.
#pragma once

#include <list>
#include <random>
#include <string>
#include <vector>

#include "streamer/retry.h"
#include "streamer/transport.h"

namespace kvcast::streamer {

struct DownloadOptions {
    RetryPolicy retry = {};
    Duration queue_timeout = std::chrono::seconds(30);  // until a connection is there and the request is sent
    Duration first_byte_timeout = std::chrono::seconds(5);  // from then on, to the answer's body
    Duration stall_timeout = std::chrono::seconds(5);       // between bytes
    // After this much silence a second request goes out beside the first; the faster one wins.
    std::optional<Duration> hedge_after = std::nullopt;
};

struct DownloadRequest {
    std::string url;
    std::optional<std::uint64_t> bytes;      // the object's size, where it is known
    std::uint64_t limit = 0;                 // an object that is larger is refused
    std::vector<std::uint8_t> storage = {};  // memory to use again; its content is dropped
    std::vector<std::uint8_t> front =
        {};  // instead: bytes from the object's front that are there; the rest is asked for
};

// Throws nothing.
class DownloadObserver {
  public:
    virtual ~DownloadObserver() = default;
    // A request has had its first body byte, `latency` after it was sent.
    virtual void on_first_byte(Duration latency) = 0;
    // `count` bytes came over the network, whether new or not, an error's body among them: received() has
    // moved if they are the object's.
    virtual void on_bytes(std::size_t count) = 0;
    // Last call; the observer may destroy the download in it. Failures: kNetwork, kTls, kHttpStatus,
    // kProtocol, kTimeout, kObjectMismatch (another size than promised, or beyond the limit), kBadArgument,
    // kOutOfMemory.
    // `http_status` is the last answer's, 0 where there was none.
    virtual void on_finished(Result<std::vector<std::uint8_t>> object, int http_status) = 0;
};

class Download {
  public:
    // Starts at once. Loop, transport and observer must outlive it.
    Download(EventLoop& loop, Transport& transport, DownloadRequest request, const DownloadOptions& options,
             DownloadObserver& observer, std::uint64_t seed);
    // Cancels what is still running.
    ~Download();
    Download(const Download&) = delete;
    Download& operator=(const Download&) = delete;

    // Bytes from the object's front on, as far as the quickest request has come: one that a server answers
    // from the front anew, although some of it is there, has to come by it.
    std::uint64_t received() const;
    std::size_t requests() const { return requests_; }  // sent so far
    // What has come, from the object's front on. The download is of no use any more.
    std::vector<std::uint8_t> release() { return std::move(bytes_); }

  private:
    class Attempt;

    void begin_attempt();
    void end_attempt(Attempt& attempt);
    bool accept(Attempt& attempt, const HttpHead& head);
    void start_over(const Attempt& survivor);
    bool take(Attempt& attempt, std::span<const std::uint8_t> bytes);
    void conclude(Attempt& attempt, const HttpResult& result);
    void fail(Attempt& attempt, HttpResult result);
    void finish(Result<std::vector<std::uint8_t>> object, int http_status);
    bool complete() const { return request_.bytes && bytes_.size() == *request_.bytes; }
    template <typename Step>
    void carry_out(const Step& step) noexcept;
    Duration patience(const Attempt& attempt) const;
    void arm();
    void check_silence();

    EventLoop& loop_;
    Transport& transport_;
    DownloadRequest request_;
    const DownloadOptions options_;
    DownloadObserver& observer_;
    std::mt19937_64 random_;
    std::vector<std::uint8_t> bytes_;  // from the object's front
    std::string etag_;                 // of the object that bytes_ belong to
    std::list<Attempt> attempts_;      // in flight: one, or two with a hedge
    std::size_t failures_ = 0;         // since bytes last came in quantity
    std::size_t most_bytes_ = 0;       // that there were at a failure
    std::size_t requests_ = 0;
    EventLoop::TimerId timer_ = 0;  // of silence, or of the pause before a repetition
};

}  // namespace kvcast::streamer
