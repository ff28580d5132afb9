// URLs of stores, http://, https:// and s3://: which server they mean, and with what credentials.
#pragma once

#include <functional>
#include <optional>
#include <string>

#include "codec/format/error.h"
#include "streamer/http/curl_transport.h"

namespace kvcast::streamer {

// Environment variables: the value of one, or null.
using Variables = std::function<const char*(const char* name)>;
const char* process_variables(const char* name);

// As opposed to a folder's path.
bool is_url(const std::string& text);

bool is_s3(const std::string& url);

// kBadArgument where a URL is of another scheme, or names no host (s3: no bucket).
Status check_url(const std::string& url);

// The same of where a publication goes, whose URL has no query and no fragment. Folders pass.
Status check_destination(const std::string& target);

struct Location {
    std::string url;  // http:// or https://; of an s3:// URL, endpoint/bucket/key, path style
    std::optional<S3Credentials> s3;
};

// Where a URL is. For s3:// reads AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION (or
// AWS_DEFAULT_REGION, us-east-1) and AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL
// (https://s3.REGION.amazonaws.com). kBadArgument as check_url(), and where keys are missing or an s3:// URL
// has characters that would need escaping.
Result<Location> locate(const std::string& url, const Variables& variables);

}  // namespace kvcast::streamer
