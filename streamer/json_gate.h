// JSON from strangers, parsed without building what nobody asks for: a few bytes of text may stand for many
// times as much memory.
#pragma once

#include <cstddef>
#include <nlohmann/json.hpp>
#include <span>
#include <string_view>

namespace kvcast::streamer {

// Thrown by JsonGate; what is wrong.
struct JsonRefused {
    const char* what;
};

// A callback for nlohmann::json::parse. Values of unknown keys are skipped, whatever they hold.
class JsonGate {
  public:
    using Json = nlohmann::json;
    static constexpr int kDeepest = 32;

    // `known` outlives the gate. At most so many objects and lists are built, and so many other values.
    JsonGate(std::span<const std::string_view> known, std::size_t most_containers, std::size_t most_values)
        : known_(known), most_containers_(most_containers), most_values_(most_values) {}

    // Whether to keep what is parsed. Throws JsonRefused.
    bool operator()(int depth, Json::parse_event_t event, const Json& parsed);

    // What was built is gone, or has been counted by somebody else.
    void forget() { containers_ = values_ = 0; }

  private:
    static constexpr int kNowhere = kDeepest + 1;

    std::span<const std::string_view> known_;
    std::size_t most_containers_;
    std::size_t most_values_;
    std::size_t containers_ = 0;
    std::size_t values_ = 0;
    int skipped_ = kNowhere;  // depth of the unknown key whose value is passed
};

}  // namespace kvcast::streamer
