// What happened in a session, as a reader wants to see it: drawn from a recording of its events.
#pragma once

#include <string>
#include <vector>

#include "streamer/controller.h"

namespace kvcast::tools {

using streamer::Seconds;

// A chunk on its way at some level.
struct Attempt {
    std::size_t chunk = 0;
    unsigned level = 0;
    std::uint64_t bytes = 0;
    std::string reason;
    Seconds from = 0;
    Seconds to = 0;
    bool arrived = false;  // false: given up, or broken off
};

// A chunk that was left to the engine.
struct TextChunk {
    std::size_t chunk = 0;
    std::string reason;
    Seconds decided = 0;
};

// Work on chunks [first, end).
struct Work {
    std::size_t first = 0;
    std::size_t end = 0;
    Seconds from = 0;
    Seconds to = 0;
};

// What the rule saw at one look.
struct Moment {
    Seconds time = 0;
    streamer::ThroughputEstimate network;
    double bytes_in_flight = 0;  // still to come of transfers
};

struct Timeline {
    std::vector<Attempt> attempts;  // by time of decision
    std::vector<TextChunk> text;
    std::vector<Work> decoding;
    std::vector<Work> recomputing;
    std::vector<Moment> moments;  // ascending time
    Seconds end = 0;              // of the last event
    bool complete = false;
    std::size_t tokens = 0;
    std::size_t text_tokens = 0;
    std::size_t present_tokens = 0;  // neither loaded nor recomputed
    double kl = 0;  // mean over all tokens; text and present ones have none; negative: unknown of a level
                    // that was loaded
};

// Plays the recorded events again, with the recorded decisions.
Timeline timeline_of(const streamer::Recording& recording);

}  // namespace kvcast::tools
