// What kvpublish and kvfetch ask for in the same way.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "streamer/destination.h"
#include "streamer/http/curl_transport.h"
#include "streamer/signature.h"

namespace kvcast::tools {

// A folder, or an http://, https:// or s3:// URL. Throws Error.
std::unique_ptr<streamer::Destination> open_destination(const std::string& target,
                                                        const streamer::HttpOptions& http);

// Throw Error.
streamer::PrivateKey load_private_key(const std::string& path);
streamer::PublicKey load_public_key(const std::string& path);

bool is_url(const std::string& text);

// "90", "90s", "15m", "12h" or "7d", in seconds. Throws Error.
std::int64_t parse_duration(const std::string& text);

// Throws Error with the status' sentence.
void require(const Status& status);
template <typename T>
T require(Result<T> result) {
    require(result.status());
    return std::move(result.value());
}

}  // namespace kvcast::tools
