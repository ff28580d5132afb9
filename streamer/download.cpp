#include "streamer/download.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

namespace kvcast::streamer {
namespace {

constexpr std::size_t kDrainedBytes = 65536;  // of an error's body, so that the connection can be kept
constexpr std::size_t kRealProgress = 65536;  // bytes after which failures are counted anew
constexpr std::uint64_t kMostReserved = 64u << 20;

}  // namespace

// One request. Its bytes go to the download's buffer from `position` on.
class Download::Attempt final : public HttpHandler {
  public:
    Attempt(Download& download, std::uint64_t from)
        : owner(download), position(from), asked_from(from), started(download.loop_.now()), heard(started) {}

    void on_connected() override {
        connected = true;
        if (!has_body) started = heard = owner.loop_.now();
        owner.arm();
    }
    bool on_head(const HttpHead& head) override {
        return unless_thrown([&] { return owner.accept(*this, head); });
    }
    bool on_body(std::span<const std::uint8_t> bytes) override {
        return unless_thrown([&] { return owner.take(*this, bytes); });
    }
    void on_end(const HttpResult& result) override {
        owner.carry_out([&] { owner.conclude(*this, result); });
    }

    Download& owner;
    Transport::Id id = 0;
    std::uint64_t position;
    const std::uint64_t asked_from;
    Time started;  // when it was sent: with a connection
    Time heard;
    bool connected = false;
    bool has_body = false;
    std::optional<HttpResult> refused;  // why the answer is not wanted
    std::size_t drained = 0;

  private:
    template <typename Call>
    bool unless_thrown(const Call& call) noexcept {
        try {
            return call();
        } catch (...) {
            refused = HttpResult{status_of_exception(), 0, std::nullopt};
            return false;
        }
    }
};

// What the network or a timer brings about; where it throws, the download has failed.
template <typename Step>
void Download::carry_out(const Step& step) noexcept {
    try {
        step();
    } catch (...) {
        finish(status_of_exception(), 0);
    }
}

Download::Download(EventLoop& loop, Transport& transport, DownloadRequest request,
                   const DownloadOptions& options, DownloadObserver& observer, std::uint64_t seed)
    : loop_(loop),
      transport_(transport),
      request_(std::move(request)),
      options_(options),
      observer_(observer),
      random_(seed),
      bytes_(std::move(request_.storage)) {
    bytes_.clear();
    if (!request_.front.empty()) bytes_ = std::move(request_.front);
    most_bytes_ = bytes_.size();
    try {
        begin_attempt();
    } catch (...) {
        loop_.cancel(timer_);
        throw;
    }
}

Download::~Download() {
    loop_.cancel(timer_);
    for (const Attempt& a : attempts_) transport_.cancel(a.id);
}

std::uint64_t Download::received() const {
    std::optional<std::uint64_t> furthest;
    for (const Attempt& a : attempts_) {
        if (a.has_body) furthest = std::max(furthest.value_or(0), a.position);
    }
    return furthest.value_or(bytes_.size());
}

void Download::begin_attempt() {
    Attempt& attempt = attempts_.emplace_back(*this, bytes_.size());
    HttpRequest request;
    request.url = request_.url;
    if (attempt.position != 0) {
        request.range = ByteRange{attempt.position};
        request.if_range = etag_;
    }
    ++requests_;
    arm();
    attempt.id = transport_.start(std::move(request), attempt);  // the last thing that may throw
}

void Download::end_attempt(Attempt& attempt) {
    attempts_.remove_if([&](const Attempt& a) { return &a == &attempt; });
}

// Bytes so far belong to another object than the one that `survivor` reads.
void Download::start_over(const Attempt& survivor) {
    bytes_.clear();
    attempts_.remove_if([&](const Attempt& a) {
        if (&a != &survivor) transport_.cancel(a.id);
        return &a != &survivor;
    });
}

bool Download::accept(Attempt& attempt, const HttpHead& head) {
    const auto refuse = [&](ErrorCode code, std::string message) {
        attempt.refused = HttpResult{{code, std::move(message)}, head.status, std::nullopt};
        return true;  // what follows is drained
    };
    if (head.status == 416 && attempt.asked_from != 0) {
        start_over(attempt);
        return refuse(ErrorCode::kProtocol, "the server has no bytes from where the last attempt ended");
    }
    if (head.status != 200 && head.status != 206)
        return refuse(ErrorCode::kHttpStatus, fmt::format("HTTP status {}", head.status));
    const bool changed = !etag_.empty() && !head.etag.empty() && head.etag != etag_;
    if (changed) start_over(attempt);
    if (head.status == 200) {
        attempt.position = 0;
    } else if (head.range_first != attempt.asked_from || changed || attempt.asked_from == 0) {
        start_over(attempt);
        return refuse(ErrorCode::kProtocol, "the server sent another range than was asked for");
    }
    etag_ = head.etag;
    std::optional<std::uint64_t> size = head.object_bytes;
    if (head.content_length) size = attempt.position + *head.content_length;
    if (size && request_.bytes && *size != *request_.bytes) {
        return refuse(ErrorCode::kObjectMismatch,
                      fmt::format("the object has {} bytes, {} were promised", *size, *request_.bytes));
    }
    if (size && *size > request_.limit) {
        return refuse(ErrorCode::kObjectMismatch,
                      fmt::format("the object has {} bytes, at most {} are read", *size, request_.limit));
    }
    if (size) bytes_.reserve(std::min(*size, kMostReserved));
    return true;
}

bool Download::take(Attempt& attempt, std::span<const std::uint8_t> bytes) {
    attempt.heard = loop_.now();
    if (attempt.refused) {
        observer_.on_bytes(bytes.size());
        return (attempt.drained += bytes.size()) <= kDrainedBytes;
    }
    const std::uint64_t most = std::min(request_.bytes.value_or(request_.limit), request_.limit);
    const bool fits = attempt.position + bytes.size() <= most;
    if (fits) {
        // An attempt starts where bytes_ ended, or before that.
        const std::uint64_t known = std::min<std::uint64_t>(bytes_.size() - attempt.position, bytes.size());
        bytes_.insert(bytes_.end(), bytes.begin() + static_cast<std::ptrdiff_t>(known), bytes.end());
        attempt.position += bytes.size();
    } else {
        attempt.refused =
            HttpResult{{ErrorCode::kObjectMismatch, fmt::format("the object goes on after {} bytes", most)},
                       200,
                       std::nullopt};
    }
    const bool first = !std::exchange(attempt.has_body, true);
    observer_.on_bytes(bytes.size());
    if (first) observer_.on_first_byte(attempt.heard - attempt.started);
    return fits;
}

void Download::conclude(Attempt& attempt, const HttpResult& result) {
    if (attempt.refused) {
        attempt.refused->retry_after = result.retry_after;
        return fail(attempt, *attempt.refused);
    }
    if (!result.status.ok()) return fail(attempt, result);
    if (complete() || (!request_.bytes && attempt.position == bytes_.size()))
        return finish(std::move(bytes_), result.http_status);
    fail(attempt, {{ErrorCode::kNetwork, fmt::format("the answer ended after {} of {} bytes",
                                                     attempt.position, request_.bytes.value_or(0))},
                   result.http_status,
                   std::nullopt});
}

void Download::fail(Attempt& attempt, HttpResult result) {
    end_attempt(attempt);
    if (!attempts_.empty()) return;  // the other one goes on
    const bool too_long = result.status.code() == ErrorCode::kObjectMismatch;
    if (complete() && !too_long) return finish(std::move(bytes_), result.http_status);
    // Bytes that were there before, until a server said that they are none, are no progress.
    if (bytes_.size() >= most_bytes_ + kRealProgress) failures_ = 0;
    most_bytes_ = std::max(most_bytes_, bytes_.size());
    const auto delay = retry_delay(options_.retry, ++failures_, result, random_);
    if (!delay) return finish(std::move(result.status), result.http_status);
    loop_.cancel(timer_);
    timer_ = loop_.after(*delay, [this] { carry_out([this] { begin_attempt(); }); });
}

void Download::finish(Result<std::vector<std::uint8_t>> object, int http_status) {
    loop_.cancel(timer_);
    timer_ = 0;
    for (const Attempt& a : attempts_) transport_.cancel(a.id);
    attempts_.clear();
    observer_.on_finished(std::move(object), http_status);
}

// How long it may be silent.
Duration Download::patience(const Attempt& attempt) const {
    if (attempt.has_body) return options_.stall_timeout;
    return attempt.connected ? options_.first_byte_timeout : options_.queue_timeout;
}

void Download::arm() {
    loop_.cancel(timer_);
    Time next = Time::max();
    for (const Attempt& a : attempts_) {
        next = std::min(next, a.heard + patience(a));
        if (options_.hedge_after && attempts_.size() == 1 && a.connected)
            next = std::min(next, a.heard + *options_.hedge_after);
    }
    timer_ = loop_.after(std::max(next - loop_.now(), Duration(0)),
                         [this] { carry_out([this] { check_silence(); }); });
}

void Download::check_silence() {
    const Time now = loop_.now();
    for (Attempt& a : attempts_) {
        if (now - a.heard < patience(a)) continue;
        transport_.cancel(a.id);
        const auto silent = std::chrono::duration_cast<std::chrono::milliseconds>(now - a.heard).count();
        const bool another = attempts_.size() > 1;
        // The last attempt's failure may be the download's end, in which the observer may destroy it.
        fail(a, {{ErrorCode::kTimeout,
                  fmt::format("no {} for {} ms", a.connected ? "byte" : "connection to be had", silent)},
                 0,
                 std::nullopt});
        if (another) arm();
        return;
    }
    if (options_.hedge_after && attempts_.size() == 1 && attempts_.front().connected &&
        now - attempts_.front().heard >= *options_.hedge_after)
        return begin_attempt();
    arm();
}

}  // namespace kvcast::streamer
