// Publishing to servers that take PUT: WebDAV as nginx and Apache have it, and S3-compatible stores (those
// can be listed, and so collected).
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "streamer/destination.h"
#include "streamer/http/curl_transport.h"

namespace kvcast::streamer {

// `url` is http://, https:// or s3:// (s3.h says where its server and keys come from). Requests that fail for
// the moment are repeated.
Result<std::unique_ptr<Destination>> http_destination(
    const std::string& url, HttpOptions options, const std::function<const char*(const char*)>& environment);

}  // namespace kvcast::streamer
