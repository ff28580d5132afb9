// Sums over many simulated sessions, as tables and figures.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "bench/adaptation/simulator.h"

namespace kvcast::bench {

// One session beside what the oracle makes of it.
struct Outcome {
    const Scenario* scenario = nullptr;
    const SessionResult* got = nullptr;
    const SessionResult* oracle = nullptr;  // in time if anyone is, with the least KL
    Seconds fastest = 0;  // the oracle's shortest time for the KL that was got; 0: not known
};

// What became of all sessions of one rule in one family of traces.
struct Tally {
    std::vector<double> times;
    std::vector<double> parts;  // of the deadline
    std::size_t missed = 0;
    std::size_t oracle_missed = 0;
    double fastest = 0;
    double kl = 0;
    double gain = 0;  // KL below the coarsest level's, where the oracle is in time; 0 where the rule is not
    double oracle_gain = 0;  // over the same sessions
    double bytes = 0;
    double text = 0;  // share of tokens
    double decision_seconds = 0;
    std::size_t decisions = 0;

    void add(const Outcome& outcome);
    double quantile(double q) const;  // of the times
    double mean_time() const;
};

// [family of traces, rule]; "oracle" among the rules.
using Tallies = std::map<std::pair<std::string, std::string>, Tally>;

void print_table(const Tallies& tallies);

// misses.svg and times.svg in `folder`: deadlines missed, and how the times are spread. Throws tools::Error.
void draw_figures(const Tallies& tallies, const std::vector<std::string>& rules, const std::string& folder);

}  // namespace kvcast::bench
