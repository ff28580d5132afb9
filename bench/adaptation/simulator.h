// One session, simulated: a link that follows a trace, a decoder and a recomputing engine, driven by a rule
// exactly as a real session drives it (streamer/session.cpp), with the same estimate of throughput.
#pragma once

#include <vector>

#include "bench/adaptation/trace.h"
#include "streamer/rules/rule.h"

namespace kvcast::bench {

using streamer::ChunkView;
using streamer::ComputeModel;
using streamer::NetworkPrior;
using streamer::Rule;

struct Scenario {
    std::vector<ChunkView> chunks;  // all pending
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
    double kl = 0;  // mean over tokens; text has none
    double bytes = 0;
    std::size_t text_tokens = 0;
    std::size_t decisions = 0;
    double decision_seconds = 0;  // of real time, all decisions together
};

// Sessions end after this much time whatever the rule does.
inline constexpr Seconds kLongestSession = 120;

SessionResult simulate(const Scenario& scenario, const Rule& rule);

}  // namespace kvcast::bench
