// Publishing to servers that take PUT: WebDAV as nginx and Apache have it, and S3-compatible stores (those
// can be listed, and so collected).
#pragma once

#include <memory>
#include <string>

#include "streamer/destination.h"
#include "streamer/http/curl_transport.h"
#include "streamer/http/location.h"

namespace kvcast::streamer {

inline constexpr Duration kPatience = std::chrono::seconds(60);

// `url` is http://, https:// or s3:// (location.h says where its server and keys come from). Requests that
// fail for the moment are repeated. `patience`: how long neither side may say anything before a request is
// given up; one whose bytes flow may take any time. kBadArgument as check_destination() and locate() have it.
Result<std::unique_ptr<Destination>> http_destination(const std::string& url, HttpOptions options,
                                                      const Variables& variables,
                                                      Duration patience = kPatience);

// That, or a folder.
Result<std::unique_ptr<Destination>> open_destination(const std::string& target, const HttpOptions& options,
                                                      const Variables& variables);

}  // namespace kvcast::streamer
