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

// A callback for nlohmann::json::parse. Values of unknown keys are skipped, however many they hold.
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
    void forget() {
        containers_ = values_ = 0;
        for (Inside& i : inside_) i = {};
    }

  private:
    static constexpr int kNowhere = kDeepest + 1;
    // nlohmann's parser looks at all that an object or list has got whenever an object ends within it.
    static constexpr std::size_t kMostSiblings = 256, kMostBesideContainers = 32;

    std::span<const std::string_view> known_;
    std::size_t most_containers_;
    std::size_t most_values_;
    std::size_t containers_ = 0;
    std::size_t values_ = 0;
    // Of the object or list that is open at a depth: what it has got.
    struct Inside {
        std::size_t containers = 0;
        std::size_t plain = 0;  // other values
    };
    Inside inside_[kDeepest + 2] = {};
    int skipped_ = kNowhere;  // depth of the unknown key whose value is passed
};

}  // namespace kvcast::streamer
