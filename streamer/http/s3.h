// s3:// URLs: which server they mean, and with what credentials.
#pragma once

#include <functional>
#include <string>

#include "codec/format/error.h"
#include "streamer/http/curl_transport.h"

namespace kvcast::streamer {

struct S3Location {
    std::string url;  // http(s)://endpoint/bucket/key, path style
    S3Credentials credentials;
};

inline bool is_s3(const std::string& url) {
    return url.starts_with("s3://");
}

// Reads AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION (or AWS_DEFAULT_REGION,
// us-east-1) and AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL (https://s3.REGION.amazonaws.com). kBadArgument
// where keys are missing or the URL has characters that would need escaping.
Result<S3Location> locate_s3(const std::string& url,
                             const std::function<const char*(const char*)>& environment);

}  // namespace kvcast::streamer
