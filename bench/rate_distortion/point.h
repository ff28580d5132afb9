// A codec in the rate-distortion bench. To add one: one file in codecs/ with a Registration; nothing else
// changes.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "tools/common/kv_cache.h"

namespace kvcast::bench {

// What points may need beside the cache itself.
struct Setup {
    Executor* executor = nullptr;
    std::size_t chunk_tokens = 256;
    std::string layer_steps;  // file of measured multipliers; empty: none for this model
    std::string calibration;  // file of the calibrated profile; empty: none for this model
};

struct Coded {
    tools::KvCache decoded;
    double bits = 0;  // everything that a receiver needs but the token ids and calibration shared by all
};

// One codec at one setting: a point of its rate-distortion curve.
struct Point {
    std::string family;   // the curve's name in plots
    std::string setting;  // the point's name on the curve
    bool quick = false;   // part of the quick run
    std::function<Coded(const tools::KvCache&, const Setup&)> run;
    std::optional<unsigned> level = std::nullopt;  // of our own profiles, for the table of levels
};

// Called once, after options are known; returns no point where the setup lacks what the codec needs.
using PointsFunction = std::vector<Point> (*)(const Setup&);

// A static object of this type in a codec's file adds its points.
struct Registration {
    explicit Registration(PointsFunction function);
};

// Points of all codecs that are linked in, by family.
std::vector<Point> all_points(const Setup& setup);

}  // namespace kvcast::bench
