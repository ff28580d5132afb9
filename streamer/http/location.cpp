#include "streamer/http/location.h"

#include <fmt/format.h>

#include <cstdlib>

namespace kvcast::streamer {
namespace {

Status bad(const std::string& url, const std::string& why) {
    return {ErrorCode::kBadArgument, fmt::format("{}: {}", url, why)};
}

Result<Location> locate_s3(const std::string& url, const Variables& variables) {
    const auto read = [&](const char* name, const char* fallback) {
        const char* value = variables(name);
        return std::string(value != nullptr && *value != 0 ? value : fallback);
    };
    const std::string key = url.substr(5);
    if (key.find_first_not_of("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~/") !=
        std::string::npos)
        return bad(url, "expected s3://BUCKET/PREFIX of letters, digits and -._~/");
    S3Credentials c;
    c.access_key = read("AWS_ACCESS_KEY_ID", "");
    c.secret_key = read("AWS_SECRET_ACCESS_KEY", "");
    c.session_token = read("AWS_SESSION_TOKEN", "");
    c.region = read("AWS_REGION", read("AWS_DEFAULT_REGION", "us-east-1").c_str());
    if (c.access_key.empty() || c.secret_key.empty())
        return bad(url, "s3:// URLs need AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY");
    std::string endpoint = read("AWS_ENDPOINT_URL_S3", read("AWS_ENDPOINT_URL", "").c_str());
    if (endpoint.empty()) endpoint = fmt::format("https://s3.{}.amazonaws.com", c.region);
    while (endpoint.ends_with('/')) endpoint.pop_back();
    return Location{fmt::format("{}/{}", endpoint, key), std::move(c)};
}

}  // namespace

const char* process_variables(const char* name) {
    return std::getenv(name);
}

bool is_url(const std::string& text) {
    return text.find("://") != std::string::npos;
}

bool is_s3(const std::string& url) {
    return url.starts_with("s3://");
}

Status check_url(const std::string& url) {
    if (!is_url(url)) return bad(url, "not a URL; a folder has to be served");
    const std::size_t colon = url.find("://");
    const std::string scheme = url.substr(0, colon), rest = url.substr(colon + 3);
    if (scheme != "http" && scheme != "https" && scheme != "s3")
        return bad(url, scheme + ":// is not supported, expected http://, https:// or s3://");
    if (rest.empty() || rest.find_first_of("/?#:") == 0)
        return bad(url, std::string("it names no ") + (scheme == "s3" ? "bucket" : "host"));
    return {};
}

Status check_destination(const std::string& target) {
    if (!is_url(target)) return {};
    if (Status s = check_url(target); !s.ok()) return s;
    if (target.find_first_of("?#") != std::string::npos)
        return bad(target, "a store's URL has no query and no fragment");
    return {};
}

Result<Location> locate(const std::string& url, const Variables& variables) {
    if (Status s = check_url(url); !s.ok()) return s;
    if (is_s3(url)) return locate_s3(url, variables);
    return Location{url, std::nullopt};
}

}  // namespace kvcast::streamer
