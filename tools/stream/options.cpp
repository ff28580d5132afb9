#include "tools/stream/options.h"

#include <fmt/format.h>

#include <charconv>
#include <limits>
#include <nlohmann/json.hpp>

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

std::int64_t parse_duration(const std::string& option, const std::string& text) {
    std::int64_t value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    const std::string unit(end, text.data() + text.size());
    const std::int64_t scale = unit == "s"   ? 1
                               : unit == "m" ? 60
                               : unit == "h" ? 3600
                               : unit == "d" ? 86400
                                             : 0;
    if (error != std::errc() || scale == 0 || value < 0 || value > 100LL * 365 * 86400 / scale)
        throw Error(fmt::format("{} is '{}', expected a time like 90s, 15m, 12h or 7d", option, text));
    return value * scale;
}

const CLI::Validator& level_list() {
    static const CLI::Validator validator(
        [](const std::string& text) {
            const std::string framed = "," + text + ",";
            return framed.find(",,") == std::string::npos
                       ? std::string()
                       : fmt::format("'{}' has an empty piece, expected all, or a list such as 0,2-5", text);
        },
        "LEVELS");
    return validator;
}

std::vector<std::int32_t> read_token_ids(const std::string& path) {
    const auto json = nlohmann::json::parse(text_of(path), nullptr, false);
    constexpr std::uint64_t kMost = std::numeric_limits<std::int32_t>::max();
    std::vector<std::int32_t> ids;
    bool good = json.is_array() && !json.empty();
    for (std::size_t i = 0; good && i < json.size(); ++i) {
        good = json[i].is_number_unsigned() && json[i].get<std::uint64_t>() <= kMost;
        if (good) ids.push_back(json[i].get<std::int32_t>());
    }
    if (!good)
        throw DamagedInput(fmt::format("{}: expected a JSON array of token ids from 0 to 2^31 - 1", path));
    return ids;
}

}  // namespace kvcast::tools
