#include "tools/model/json.h"

#include <fmt/format.h>

#include <cmath>
#include <cstdint>
#include <limits>

#include "tools/common/file.h"

namespace kvcast::model {

using nlohmann::json;

json parse_json_file(const std::string& path) {
    const tools::MappedFile file(path);
    const auto* text = reinterpret_cast<const char*>(file.bytes().data());
    json value = json::parse(text, text + file.bytes().size(), nullptr, false);
    if (value.is_discarded())
        throw tools::Error(fmt::format("{}: expected JSON, found something else", path));
    return value;
}

JsonObject::JsonObject(const json& value, std::string name) : value_(&value), name_(std::move(name)) {
    if (!value.is_object()) {
        throw tools::Error(fmt::format("{}: expected a JSON object, found {}", name_, value.type_name()));
    }
}

const json* JsonObject::find(const std::string& key) const {
    const auto found = value_->find(key);
    return found == value_->end() || found->is_null() ? nullptr : &*found;
}

void JsonObject::fail(const std::string& key, const std::string& expected) const {
    const json* found = find(key);
    if (found == nullptr)
        throw tools::Error(fmt::format("{}: '{}' is missing, expected {}", name_, key, expected));
    std::string shown = found->dump(-1, ' ', true, json::error_handler_t::replace);
    if (shown.size() > 80) shown = shown.substr(0, 80) + "...";
    throw tools::Error(fmt::format("{}: '{}' is {}, expected {}", name_, key, shown, expected));
}

std::size_t JsonObject::count(const std::string& key) const {
    constexpr std::uint64_t kMax = std::numeric_limits<std::int32_t>::max();
    const json* found = find(key);
    const bool integer = found != nullptr && found->is_number_unsigned();
    if (!integer || found->get<std::uint64_t>() < 1 || found->get<std::uint64_t>() > kMax) {
        fail(key, "an integer from 1 to 2^31 - 1");
    }
    return found->get<std::size_t>();
}

std::size_t JsonObject::count(const std::string& key, std::size_t otherwise) const {
    return find(key) == nullptr ? otherwise : count(key);
}

double JsonObject::positive(const std::string& key) const {
    const json* found = find(key);
    const double value = found != nullptr && found->is_number() ? found->get<double>() : 0;
    if (!(value > 0) || !std::isfinite(value)) fail(key, "a number above 0");
    return value;
}

double JsonObject::positive(const std::string& key, double otherwise) const {
    return find(key) == nullptr ? otherwise : positive(key);
}

bool JsonObject::flag(const std::string& key, bool otherwise) const {
    const json* found = find(key);
    if (found == nullptr) return otherwise;
    if (!found->is_boolean()) fail(key, "true or false");
    return found->get<bool>();
}

std::string JsonObject::text(const std::string& key, const std::string& otherwise) const {
    const json* found = find(key);
    if (found == nullptr) return otherwise;
    if (!found->is_string()) fail(key, "a string");
    return found->get<std::string>();
}

std::optional<JsonObject> JsonObject::object(const std::string& key) const {
    const json* found = find(key);
    if (found == nullptr) return std::nullopt;
    return JsonObject(*found, fmt::format("{}: '{}'", name_, key));
}

}  // namespace kvcast::model
