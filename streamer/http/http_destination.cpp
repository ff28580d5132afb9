#include "streamer/http/http_destination.h"

#include <curl/curl.h>
#include <fmt/format.h>

#include <atomic>
#include <future>
#include <pugixml.hpp>
#include <set>
#include <thread>

#include "streamer/http/client.h"
#include "streamer/retry.h"
#include "streamer/store.h"

namespace kvcast::streamer {
namespace {

constexpr std::uint64_t kMostAnswerBytes = std::uint64_t{256} << 20;

struct Answer {
    HttpResult result;
    HttpHead head;
    std::vector<std::uint8_t> body;
};

class Collect final : public HttpHandler {
  public:
    void on_connected() override { moved = Clock::now(); }
    void on_sent() override { moved = Clock::now(); }
    bool on_head(const HttpHead& head) override {
        moved = Clock::now();
        answer.head = head;
        return true;
    }
    bool on_body(std::span<const std::uint8_t> bytes) override {
        moved = Clock::now();
        answer.body.insert(answer.body.end(), bytes.begin(), bytes.end());
        return answer.body.size() <= kMostAnswerBytes;
    }
    void on_end(const HttpResult& result) override {
        try {
            answer.result = result;
        } catch (...) {
            answer.result = {status_of_exception(), 0, std::nullopt};
        }
        done.set_value();
    }

    Answer answer;
    std::promise<void> done;
    std::atomic<Time> moved = Clock::now();  // when bytes last did
};

Status failed(const std::string& name, const Answer& a) {
    if (!a.result.status.ok())
        return {a.result.status.code(), fmt::format("{}: {}", name, a.result.status.message())};
    // S3 says more in the body.
    pugi::xml_document document;
    document.load_buffer(a.body.data(), a.body.size());
    const std::string said = document.child("Error").child_value("Message");
    return {ErrorCode::kHttpStatus, fmt::format("{}: HTTP status {}{}{}", name, a.result.http_status,
                                                said.empty() ? "" : ": ", said)};
}

bool good(const Answer& a) {
    return a.result.status.ok() && a.result.http_status / 100 == 2;
}

std::string escaped(const std::string& text) {
    char* raw = curl_easy_escape(nullptr, text.c_str(), static_cast<int>(text.size()));
    std::string out = raw;
    curl_free(raw);
    return out;
}

// "2026-11-21T05:00:00.000Z"
std::int64_t listed_time(std::string_view text) {
    return parse_time(std::string(text.substr(0, 19)) + "Z").value_or(0);
}

class Server final : public Destination {
  public:
    Server(std::string shown, std::string url, HttpOptions options, Duration patience)
        : shown_(std::move(shown)),
          url_(std::move(url)),
          s3_(options.s3.has_value()),
          patience_(patience),
          client_(std::move(options)) {
        while (url_.ends_with('/')) url_.pop_back();
    }

    const std::string& root() const override { return shown_; }

    Result<std::optional<StoredObject>> find(const std::string& name) override {
        const Answer a = ask(HttpRequest::Method::kHead, join_url(url_, name), {});
        if (a.result.status.ok() && a.result.http_status == 404) return std::optional<StoredObject>();
        if (!good(a)) return failed(name, a);
        const std::time_t modified = curl_getdate(a.head.last_modified.c_str(), nullptr);
        return std::optional(
            StoredObject{name, a.head.content_length.value_or(0), modified < 0 ? 0 : modified});
    }

    Status put(const std::string& name, std::span<const std::uint8_t> bytes) override {
        const Answer a = ask(HttpRequest::Method::kPut, join_url(url_, name), bytes);
        return good(a) ? Status() : failed(name, a);
    }

    Result<std::vector<std::uint8_t>> get(const std::string& name) override {
        Answer a = ask(HttpRequest::Method::kGet, join_url(url_, name), {});
        if (a.result.status.ok() && a.result.http_status == 404)
            return Status(ErrorCode::kNotStored, fmt::format("{}: not in the store", name));
        if (!good(a)) return failed(name, a);
        return std::move(a.body);
    }

    Status remove(const std::string& name) override {
        const Answer a = ask(HttpRequest::Method::kDelete, join_url(url_, name), {});
        return good(a) || a.result.http_status == 404 ? Status() : failed(name, a);
    }

    // ListObjectsV2.
    Result<std::vector<StoredObject>> list() override {
        if (!s3_)
            return Status(ErrorCode::kBadArgument,
                          fmt::format("{}: a server that only takes PUT cannot list what it has, expected a "
                                      "folder or s3:// to collect",
                                      shown_));
        const std::size_t scheme = url_.find("://") + 3;
        const std::size_t bucket_end = url_.find('/', url_.find('/', scheme) + 1);
        const std::string bucket = url_.substr(0, bucket_end);
        const std::string prefix = bucket_end == std::string::npos ? "" : url_.substr(bucket_end + 1) + "/";
        std::vector<StoredObject> out;
        std::string token;
        std::set<std::string> tokens;
        do {
            // Parameters in the order of their names, as the signature wants them.
            const std::string continued = token.empty() ? "" : "continuation-token=" + escaped(token) + "&";
            const Answer a =
                ask(HttpRequest::Method::kGet,
                    fmt::format("{}?{}list-type=2&prefix={}", bucket, continued, escaped(prefix)), {});
            if (!good(a)) return failed("listing", a);
            if (Status s = read_page(a.body, prefix, out, token); !s.ok()) return s;
            if (!token.empty() && !tokens.insert(token).second)
                return Status(
                    ErrorCode::kProtocol,
                    fmt::format("listing: expected another NextContinuationToken, found '{}' again", token));
        } while (!token.empty());
        return out;
    }

  private:
    static Status read_page(const std::vector<std::uint8_t>& body, const std::string& prefix,
                            std::vector<StoredObject>& out, std::string& token) {
        pugi::xml_document document;
        const auto parsed = document.load_buffer(body.data(), body.size());
        const pugi::xml_node page = document.child("ListBucketResult");
        if (!parsed || !page) return {ErrorCode::kProtocol, "listing: the answer is not a ListBucketResult"};
        for (const pugi::xml_node entry : page.children("Contents")) {
            const std::string key = entry.child_value("Key");
            if (!key.starts_with(prefix)) continue;
            out.push_back({key.substr(prefix.size()), entry.child("Size").text().as_ullong(),
                           listed_time(entry.child_value("LastModified"))});
        }
        token.clear();
        if (!page.child("IsTruncated").text().as_bool()) return {};
        token = page.child_value("NextContinuationToken");
        if (!token.empty()) return {};
        // Taken for the last, the page would have all that follows it collected.
        return {ErrorCode::kProtocol,
                "listing: IsTruncated is true, expected a NextContinuationToken and found none"};
    }

    Answer ask(HttpRequest::Method method, const std::string& url, std::span<const std::uint8_t> body) {
        const RetryPolicy policy;
        for (std::size_t attempt = 1;; ++attempt) {
            HttpRequest request;
            request.method = method;
            request.url = url;
            request.body.assign(body.begin(), body.end());
            Answer answer = exchange(std::move(request));
            if (good(answer)) return answer;
            const auto delay = retry_delay(policy, attempt, answer.result, random_);
            if (!delay) return answer;
            std::this_thread::sleep_for(*delay);
        }
    }

    Answer exchange(HttpRequest request) {
        Collect handler;
        Transport::Id id = 0;
        client_.loop().run([&] { id = client_.transport().start(std::move(request), handler); });
        std::future<void> done = handler.done.get_future();
        Time silent = handler.moved.load() + patience_;
        while (done.wait_until(silent) != std::future_status::ready) {
            const Time later = handler.moved.load() + patience_;
            if (later == silent) return give_up(id);
            silent = later;
        }
        return std::move(handler.answer);
    }

    Answer give_up(Transport::Id id) {
        client_.loop().run([&] { client_.transport().cancel(id); });
        Answer late;
        late.result.status = {ErrorCode::kTimeout,
                              fmt::format("silence for {:g} seconds", to_seconds(patience_))};
        return late;
    }

    std::string shown_;
    std::string url_;
    bool s3_;
    Duration patience_;
    Client client_;
    std::mt19937_64 random_{std::random_device()()};
};

}  // namespace

Result<std::unique_ptr<Destination>> http_destination(const std::string& url, HttpOptions options,
                                                      const Variables& variables, Duration patience) {
    if (Status s = check_destination(url); !s.ok()) return s;
    Result<Location> location = locate(url, variables);
    if (!location.ok()) return location.status();
    options.s3 = std::move(location.value().s3);
    return std::unique_ptr<Destination>(
        std::make_unique<Server>(url, location.value().url, std::move(options), patience));
}

Result<std::unique_ptr<Destination>> open_destination(const std::string& target, const HttpOptions& options,
                                                      const Variables& variables) {
    return is_url(target) ? http_destination(target, options, variables) : folder_destination(target);
}

}  // namespace kvcast::streamer
