#include "tools/stream/options.h"

#include <fmt/format.h>

#include <charconv>
#include <cstdlib>

#include "streamer/http/http_destination.h"
#include "tools/common/file.h"

namespace kvcast::tools {
namespace {

std::string text_of(const std::string& path) {
    const MappedFile file(path);
    return {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()};
}

}  // namespace

void require(const Status& status) {
    if (!status.ok()) throw Error(status.message());
}

bool is_url(const std::string& text) {
    return text.find("://") != std::string::npos;
}

std::unique_ptr<streamer::Destination> open_destination(const std::string& target,
                                                        const streamer::HttpOptions& http) {
    if (is_url(target)) {
        return require(streamer::http_destination(
            target, http, [](const char* name) -> const char* { return std::getenv(name); }));
    }
    return require(streamer::folder_destination(target));
}

streamer::PrivateKey load_private_key(const std::string& path) {
    auto key = streamer::PrivateKey::from_pem(text_of(path));
    if (!key.ok()) throw Error(fmt::format("{}: {}", path, key.status().message()));
    return key.value();
}

streamer::PublicKey load_public_key(const std::string& path) {
    auto key = streamer::PublicKey::from_pem(text_of(path));
    if (!key.ok()) throw Error(fmt::format("{}: {}", path, key.status().message()));
    return key.value();
}

std::int64_t parse_duration(const std::string& text) {
    std::int64_t value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    const std::string unit(end, text.data() + text.size());
    const std::int64_t scale = unit.empty() || unit == "s" ? 1
                               : unit == "m"               ? 60
                               : unit == "h"               ? 3600
                               : unit == "d"               ? 86400
                                                           : 0;
    if (error != std::errc() || scale == 0 || value <= 0 || value > 100LL * 365 * 86400 / scale)
        throw Error(fmt::format("'{}' is not a time like 90s, 15m, 12h or 7d", text));
    return value * scale;
}

}  // namespace kvcast::tools
