#include "tools/model/tokens.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <cstring>
#include <limits>

#include "tools/common/file.h"
#include "tools/model/json.h"

namespace kvcast::model {
namespace {

using nlohmann::json;
using tools::Error;

TokenIds raw_tokens(const std::string& path) {
    const tools::MappedFile file(path);
    if (file.bytes().size() % sizeof(std::int32_t) != 0) {
        throw Error(fmt::format("{}: {} bytes, expected a multiple of 4: raw int32 token ids", path,
                                file.bytes().size()));
    }
    TokenIds ids(file.bytes().size() / sizeof(std::int32_t));
    if (!ids.empty()) std::memcpy(ids.data(), file.bytes().data(), file.bytes().size());
    return ids;
}

const json& sequence(const json& parsed, const std::string& path, const std::string& name) {
    if (parsed.is_array()) {
        if (!name.empty())
            throw Error(fmt::format("{}: holds one array, expected an object with '{}'", path, name));
        return parsed;
    }
    if (!parsed.is_object())
        throw Error(fmt::format("{}: expected a JSON array or object of token ids", path));
    if (name.empty() && parsed.size() == 1) return *parsed.begin();
    const auto found = parsed.find(name);
    if (found != parsed.end()) return *found;
    std::vector<std::string> names;
    for (const auto& [key, value] : parsed.items()) names.push_back(key);
    throw Error(fmt::format("{}: {}; it holds {}", path,
                            name.empty() ? "which array to take is not said (--name)"
                                         : fmt::format("no array is named '{}'", name),
                            fmt::join(names, ", ")));
}

TokenIds ids_of(const json& array, const std::string& path) {
    constexpr std::uint64_t kMax = std::numeric_limits<std::int32_t>::max();
    if (!array.is_array())
        throw Error(fmt::format("{}: expected an array of token ids, found {}", path, array.type_name()));
    TokenIds ids;
    ids.reserve(array.size());
    for (const json& id : array) {
        if (!id.is_number_unsigned() || id.get<std::uint64_t>() > kMax) {
            throw Error(fmt::format("{}: token {} is {}, expected an integer from 0 to 2^31 - 1", path,
                                    ids.size(), id.is_number() ? id.dump() : id.type_name()));
        }
        ids.push_back(id.get<std::int32_t>());
    }
    return ids;
}

TokenIds json_tokens(const std::string& path, const std::string& name) {
    const json parsed = parse_json_file(path);
    return ids_of(sequence(parsed, path, name), path);
}

}  // namespace

TokenIds read_tokens(const std::string& path, const std::string& name, TokenFileKind kind) {
    TokenIds ids = kind == TokenFileKind::kRaw ? raw_tokens(path) : json_tokens(path, name);
    if (ids.empty()) throw Error(fmt::format("{}: holds no token ids", path));
    return ids;
}

std::map<std::string, TokenIds> read_token_sets(const std::string& path) {
    const json parsed = parse_json_file(path);
    if (!parsed.is_object() || parsed.empty())
        throw Error(fmt::format("{}: expected a JSON object of named arrays of token ids", path));
    std::map<std::string, TokenIds> sets;
    for (const auto& [name, array] : parsed.items()) sets[name] = ids_of(array, path);
    return sets;
}

}  // namespace kvcast::model
