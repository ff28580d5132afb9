// One HTTP exchange, whoever carries it out: libcurl (http/curl_transport.h), or a simulated network in
// tests.
//
// Everything happens on the event loop's thread. A transport does not retry: see download.h.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "codec/format/error.h"
#include "streamer/event_loop.h"

namespace kvcast::streamer {

// Bytes first to first + count - 1 of an object; without count, to its end.
struct ByteRange {
    std::uint64_t first = 0;
    std::optional<std::uint64_t> count = std::nullopt;
};

struct HttpRequest {
    enum class Method : std::uint8_t { kGet, kHead, kPut, kDelete };

    Method method = Method::kGet;
    std::string url = {};
    std::optional<ByteRange> range = std::nullopt;
    std::string if_range = {};              // an entity tag: the range only if the object is still that one
    std::vector<std::string> headers = {};  // "Name: value"
    std::vector<std::uint8_t> body = {};    // of a PUT
};

struct HttpHead {
    int status = 0;
    std::optional<std::uint64_t> content_length;
    // Of a 206: where the body starts, and the object's size where the server says it.
    std::optional<std::uint64_t> range_first;
    std::optional<std::uint64_t> object_bytes;
    std::string etag;
    std::string last_modified;
};

struct HttpResult {
    Status status;        // kOk: the whole answer came, whatever its HTTP status
    int http_status = 0;  // 0: none came
    std::optional<Duration> retry_after;
};

// Throws nothing.
class HttpHandler {
  public:
    virtual ~HttpHandler() = default;
    // A connection is there, and the request is sent on it; again after a redirect. Maybe from within
    // start(). Until then the request may have waited for others to the same host to end.
    virtual void on_connected() {}
    // A part of the request's body is on its way.
    virtual void on_sent() {}
    // Once, before the body; after redirects. False ends the exchange: on_end() follows with kCancelled.
    virtual bool on_head(const HttpHead& head) = 0;
    // Parts of the body, in order. False as above.
    virtual bool on_body(std::span<const std::uint8_t> bytes) = 0;
    // Last call. Never from within start().
    virtual void on_end(const HttpResult& result) = 0;
};

class Transport {
  public:
    using Id = std::uint64_t;

    virtual ~Transport() = default;
    // Starts an exchange, or queues it; the handler must live until on_end() or cancel(). Throws
    // std::bad_alloc.
    virtual Id start(HttpRequest request, HttpHandler& handler) = 0;
    // No call to the handler after this. Unknown and past ids are ignored.
    virtual void cancel(Id id) = 0;
};

}  // namespace kvcast::streamer
