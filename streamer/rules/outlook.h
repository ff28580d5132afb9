// How long what is left of a session takes: the model of time that rules share.
//
// With r the rate that is counted on, B the bytes still to come of transfers in flight and of the
// calibration, a those of the calibration alone, b_i the bytes of pending chunk i at the level it would have,
// w the wait for a first byte, d the decoding of one chunk and D that of everything that is not decoded yet:
//
//   N    = w + (B + sum b_i) / r                       the network has done its part
//   n    = w + bytes of the chunk that comes next / r  the decoder has something to do; 0 where it has;
//                                                      a / r at least
//   load = max(N + d, n + D)
//
// The decoder follows the network: with even chunks, either it waits for the last one (first term), or it
// works without a pause from the first one on (second term). w counts only where nothing has come of what is
// in flight, if anything is. Every chunk is taken to wait for the calibration.
//
// Source of the terms: pipelined loading as in CacheGen (arXiv 2310.07240, section 6), with the first byte's
// wait and the decoder's start of our own.
#pragma once

#include <array>

#include "streamer/rules/rule.h"

namespace kvcast::streamer {

// Pending chunks that are to be loaded.
struct Load {
    double bytes = 0;
    std::size_t tokens = 0;
    double next_bytes = 0;  // of the one that is requested next
};

class Outlook {
  public:
    // One pass over the chunks. `state` outlives the outlook.
    explicit Outlook(const RuleState& state);

    Seconds left() const { return left_; }  // until the deadline; negative behind it
    bool any_in_flight() const { return in_flight_ > 0; }
    bool any_pending() const { return pending_ > 0; }
    std::size_t first_pending() const { return first_pending_; }  // number of chunks: none
    std::size_t last_pending() const { return last_pending_; }

    // Until `pending` and everything in flight is decoded, at `rate` bytes per second.
    Seconds load_time(const Load& pending, double rate) const;

    // Whether another transfer may start: two are in flight at any time, more where the link would run dry
    // before the first byte of a later request could come.
    bool wants_transfer() const;

  private:
    const RuleState& s_;
    Seconds left_ = 0;
    std::size_t pending_ = 0;
    std::size_t first_pending_ = 0;
    std::size_t last_pending_ = 0;
    std::size_t in_flight_ = 0;
    bool bytes_come_ = false;   // of a chunk in flight
    double bytes_to_come_ = 0;  // of transfers in flight and of the calibration
    double next_bytes_ = 0;     // least to come of one transfer
    std::size_t tokens_to_come_ = 0;
    std::size_t decoding_tokens_ = 0;
    std::size_t chunk_tokens_ = 0;  // of the largest chunk that is not decoded
};

// Loads of the pending chunks from one index on, at each of several levels.
struct LevelLoads {
    static constexpr std::size_t kMost = 256;  // levels have 8 bits

    std::size_t count = 0;
    std::array<unsigned, kMost> level;  // ascending
    std::array<double, kMost> bytes;
    std::size_t tokens = 0;
};

// Levels are the usable ones of the last pending chunk; each chunk counts at nearest_level().
LevelLoads loads_from(const RuleState& state, std::size_t first);

// Bytes of the chunk at nearest_level(); 0 where it has none. Quick where `hint` is that level's index.
inline double bytes_at(const ChunkView& chunk, unsigned level, std::size_t hint) {
    const auto& levels = chunk.levels;
    if (hint >= levels.size() || levels[hint].level != level || !levels[hint].usable)
        hint = nearest_level(chunk, level);
    return hint == kNoLevel ? 0 : static_cast<double>(levels[hint].bytes);
}

// Times the time left: what takes longer to load will not be in time, even if the link gets better.
inline constexpr double kHope = 2;

// Until everything that is missing is recomputed, after what the engine has to do already.
Seconds text_time(const RuleState& state);

// Whether the moment has come to recompute everything that is missing: loading is late, and text must begin
// now to be in time within `margin` of the time left, or loading is beyond hope; where text is late too, it
// must take half as long.
bool text_is_due(Seconds load, Seconds text, Seconds left, double margin);

// "812 ms are left", or that there is no deadline.
std::string what_is_left(Seconds left);

}  // namespace kvcast::streamer
