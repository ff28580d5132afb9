// Typed access to a JSON object of a file; every failure is one sentence that names the file and the key.
#pragma once

#include <cstddef>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

namespace kvcast::model {

// Parses a whole file. Throws tools::Error.
nlohmann::json parse_json_file(const std::string& path);

// An object and what to call it. `get` functions throw tools::Error where a value is of another kind; a key
// that is null counts as missing.
class JsonObject {
  public:
    // Throws tools::Error where `value` is not an object. It must outlive this.
    JsonObject(const nlohmann::json& value, std::string name);

    std::size_t count(const std::string& key) const;  // an integer from 1 to 2^31 - 1; required
    std::size_t count(const std::string& key, std::size_t otherwise) const;
    double positive(const std::string& key) const;  // a finite number above 0; required
    double positive(const std::string& key, double otherwise) const;
    bool flag(const std::string& key, bool otherwise) const;
    std::string text(const std::string& key, const std::string& otherwise) const;
    std::optional<JsonObject> object(const std::string& key) const;
    const nlohmann::json* find(const std::string& key) const;  // nullptr where missing
    const std::string& name() const { return name_; }

    // Throws tools::Error: "NAME: 'KEY' is FOUND, expected EXPECTED".
    [[noreturn]] void fail(const std::string& key, const std::string& expected) const;

  private:
    const nlohmann::json* value_;
    std::string name_;
};

}  // namespace kvcast::model
