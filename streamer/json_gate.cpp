#include "streamer/json_gate.h"

#include <algorithm>

namespace kvcast::streamer {

bool JsonGate::operator()(int depth, Json::parse_event_t event, const Json& parsed) {
    using Event = Json::parse_event_t;
    if (depth > kDeepest) throw JsonRefused{"nested too deeply"};
    switch (event) {
        case Event::key: {
            if (depth > skipped_) return false;
            const bool is_known =
                std::ranges::find(known_, parsed.get_ref<const std::string&>()) != known_.end();
            skipped_ = is_known ? kNowhere : depth;
            return is_known;
        }
        case Event::object_start:
        case Event::array_start:
            if (depth >= skipped_) return false;
            if (++containers_ > most_containers_)
                throw JsonRefused{"more objects and lists than there can be"};
            if (++inside_[depth].containers > kMostSiblings || inside_[depth].plain > kMostBesideContainers)
                throw JsonRefused{"a longer list than there can be"};
            inside_[depth + 1] = {};
            return true;
        case Event::value:
            if (depth >= skipped_) return false;
            if (++values_ > most_values_) throw JsonRefused{"more values than there can be"};
            ++inside_[depth].plain;
            return true;
        case Event::object_end:
        case Event::array_end:
            if (depth < skipped_) skipped_ = kNowhere;
            return true;
    }
    return true;
}

}  // namespace kvcast::streamer
