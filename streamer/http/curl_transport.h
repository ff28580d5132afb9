// HTTP/1.1 and HTTP/2 over TLS or not, by libcurl's multi interface on an event loop.
//
// Keep-alive and multiplexing come from libcurl's connection cache. Redirects are followed, five at most, and
// never from https to http. Bodies are taken as they come: no content coding is asked for or undone.
// Certificates are always verified. Proxies are taken from the environment, as libcurl does.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "streamer/transport.h"

namespace kvcast::streamer {

// Signature Version 4 for the service "s3".
struct S3Credentials {
    std::string access_key;
    std::string secret_key;
    std::string session_token;  // may be empty
    std::string region = "us-east-1";

    friend bool operator==(const S3Credentials&, const S3Credentials&) = default;
};

struct HttpOptions {
    std::string ca_file;  // PEM, instead of the system's authorities; empty: those
    std::string user_agent = "kvcast";
    std::size_t connections_per_host = 8;                // with HTTP/1.1; requests beyond wait for one
    Duration connect_timeout = std::chrono::seconds(3);  // names, TCP and TLS
    bool http2_without_tls = false;                      // HTTP/2 by prior knowledge on http:// URLs
    std::optional<S3Credentials> s3;
};

class CurlTransport final : public Transport {
  public:
    // Constructed, used and destroyed on the loop's thread (no calls to handlers come from the destructor).
    // Throws std::runtime_error where libcurl cannot be initialised.
    CurlTransport(EventLoop& loop, HttpOptions options);
    ~CurlTransport() override;
    CurlTransport(const CurlTransport&) = delete;
    CurlTransport& operator=(const CurlTransport&) = delete;

    Id start(HttpRequest request, HttpHandler& handler) override;
    void cancel(Id id) override;

  private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

}  // namespace kvcast::streamer
