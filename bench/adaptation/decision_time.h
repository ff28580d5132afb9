// How long a rule takes to decide.
#pragma once

#include <cstddef>

#include "streamer/rules/rule.h"

namespace kvcast::bench {

struct DecisionTime {
    double p50 = 0;  // seconds
    double p99 = 0;
};

// Over drawn states in which `chunks` chunks, but for a few in flight, are still to be decided: links of 1
// MB/s to 1 GB/s, 0.1 to 100 s left, with and without an engine. Real time of one thread, each decision timed
// once.
DecisionTime time_decisions(const streamer::Rule& rule, std::size_t chunks);

}  // namespace kvcast::bench
