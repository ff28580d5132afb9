// Sessions, simulated: a link that follows a trace, and for every session a decoder and a recomputing engine,
// driven by the controller that drives real sessions too (streamer/controller.h).
#pragma once

#include <vector>

#include "bench/adaptation/trace.h"
#include "streamer/controller.h"

namespace kvcast::bench {

using streamer::ChunkView;
using streamer::ComputeModel;
using streamer::NetworkPrior;
using streamer::Recording;
using streamer::Rule;

struct Scenario {
    std::vector<ChunkView> chunks;  // pending, or present
    ComputeModel compute;
    const Trace* trace = nullptr;
    Seconds start = 0;          // in the trace
    Seconds first_byte = 0.01;  // from a request to its first byte
    Seconds deadline = 1;
    std::size_t transfers = streamer::kMostTransfers;
    NetworkPrior prior;
};

struct SessionResult {
    Seconds time = 0;  // to the last chunk
    bool missed = false;
    double kl = 0;  // mean over tokens; text and present ones have none
    double bytes = 0;
    std::size_t text_tokens = 0;
    std::size_t decisions = 0;
    double decision_seconds = 0;         // of real time, all decisions together
    std::optional<Recording> recording;  // if it was asked for
};

// Sessions end after this much time whatever the rule does.
inline constexpr Seconds kLongestSession = 120;

SessionResult simulate(const Scenario& scenario, const Rule& rule, bool record = false);

// Sessions on one link, whose rate all transfers in flight share evenly, whosever they are. The link is that
// of the first scenario; session i begins `gap` after session i - 1. Results in the scenarios' order.
std::vector<SessionResult> simulate_together(const std::vector<Scenario>& scenarios, const Rule& rule,
                                             Seconds gap);

// The decisions and recomputed ranges that the recorded events lead to with this rule, as a new recording.
// With the rule that was recorded they are the recorded ones.
Recording replay(const Recording& recording, const Rule& rule);

}  // namespace kvcast::bench
