#include "streamer/http/s3.h"

#include <fmt/format.h>

namespace kvcast::streamer {

Result<S3Location> locate_s3(const std::string& url,
                             const std::function<const char*(const char*)>& environment) {
    const auto read = [&](const char* name, const char* fallback) {
        const char* value = environment(name);
        return std::string(value != nullptr && *value != 0 ? value : fallback);
    };
    const std::string key = url.substr(5);
    if (key.empty() || key.starts_with('/') ||
        key.find_first_not_of("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~/") !=
            std::string::npos) {
        return Status(ErrorCode::kBadArgument,
                      fmt::format("{}: expected s3://BUCKET/PREFIX of letters, digits and -._~/", url));
    }
    S3Location out;
    S3Credentials& c = out.credentials;
    c.access_key = read("AWS_ACCESS_KEY_ID", "");
    c.secret_key = read("AWS_SECRET_ACCESS_KEY", "");
    c.session_token = read("AWS_SESSION_TOKEN", "");
    c.region = read("AWS_REGION", read("AWS_DEFAULT_REGION", "us-east-1").c_str());
    if (c.access_key.empty() || c.secret_key.empty())
        return Status(ErrorCode::kBadArgument, "s3:// URLs need AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY");
    std::string endpoint = read("AWS_ENDPOINT_URL_S3", read("AWS_ENDPOINT_URL", "").c_str());
    if (endpoint.empty()) endpoint = fmt::format("https://s3.{}.amazonaws.com", c.region);
    while (endpoint.ends_with('/')) endpoint.pop_back();
    out.url = fmt::format("{}/{}", endpoint, key);
    return out;
}

}  // namespace kvcast::streamer
