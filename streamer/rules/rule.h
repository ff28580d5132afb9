// What to do next with a publication's chunks: load one at some level, have some recomputed from text, or
// wait.
//
// A rule is a pure function of the state below: no clock, no randomness, no memory. The session asks it
// whenever something has changed (a transfer ended, bytes came, a timer went off) until it answers kWait. The
// same functions run in a simulator.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "streamer/throughput.h"

namespace kvcast::streamer {

// One chunk at one level.
struct LevelView {
    unsigned level = 0;  // 0 is lossless, then from finest to coarsest
    std::uint64_t bytes = 0;
    double kl = 0;       // expected divergence in nats; unknown: the level's number, so that order is kept
    bool usable = true;  // false: tried in vain, excluded by the caller, or its calibration is out of reach
    bool kl_known = true;
    bool calibrated = false;  // of no use before RuleState::other_bytes are there
};

enum class ChunkStatus : std::uint8_t {
    kPending,     // nothing decided
    kLoading,     // its bytes are on their way
    kDecoding,    // verified or being verified; the network has done its part
    kReady,       // handed to the sink
    kText,        // to be recomputed
    kRecomputed,  // recomputed
    kPresent,     // with the engine from the start: neither loaded nor recomputed, and of no level
};

struct ChunkView {
    std::size_t first_token = 0;
    std::size_t tokens = 0;
    std::vector<LevelView> levels;  // ascending level
    ChunkStatus status = ChunkStatus::kPending;
    std::size_t choice = 0;      // index into levels, from kLoading on
    std::uint64_t received = 0;  // of the choice, while kLoading
    std::size_t present = 0;     // leading tokens that the engine has: as text the chunk is what follows them
};

// The speed of prefill at a position of the context, tokens per second; linear between points, constant
// beyond.
struct PrefillSpeed {
    std::size_t position = 0;
    double tokens_per_second = 0;
};

// What computing costs the caller.
struct ComputeModel {
    std::vector<PrefillSpeed> prefill;     // ascending position; empty: text cannot be recomputed
    double decode_bytes_per_second = 1e9;  // of decoded KV
    std::uint64_t bytes_per_token = 0;     // of decoded KV; the session fills it in

    bool can_recompute() const { return !prefill.empty(); }
    Seconds prefill_time(std::size_t first_token, std::size_t tokens) const;
    Seconds prefill_time(const ChunkView& c) const {
        return prefill_time(c.first_token + c.present, c.tokens - c.present);
    }
    Seconds decode_time(std::size_t tokens) const;
};

// Objects in flight at once, at most: rules start two, and more only where waits for first bytes would leave
// the link idle.
inline constexpr std::size_t kMostTransfers = 32;

// Neither there nor on its way from network or text: pending, or a transfer that may still be given up.
inline bool is_missing(const ChunkView& c) {
    return c.status == ChunkStatus::kPending || c.status == ChunkStatus::kLoading;
}

// What is still to come of a chunk that is loading.
inline double bytes_to_come(const ChunkView& c) {
    return static_cast<double>(c.levels[c.choice].bytes - c.received);
}

struct RuleState {
    Seconds now = 0;
    Seconds deadline = std::numeric_limits<Seconds>::infinity();
    std::span<const ChunkView> chunks;
    ThroughputEstimate network;
    const ComputeModel* compute = nullptr;
    std::size_t transfers = 0;       // in flight
    std::size_t most_transfers = 1;  // a rule starts none beyond that
    std::uint64_t other_bytes = 0;   // still to come before any chunk counts: the calibration
    Seconds compute_busy = 0;        // until text that was asked for before is recomputed
};

struct Decision {
    enum class Kind : std::uint8_t {
        kWait,
        kLoad,  // `chunk` at `choice`; a chunk that is loading starts anew
        kText,  // `chunk` is recomputed; a transfer of it is abandoned
    };
    Kind kind = Kind::kWait;
    std::size_t chunk = 0;
    std::size_t choice = 0;  // index into the chunk's levels
    std::string reason;      // one line for people
};

class Rule {
  public:
    virtual ~Rule() = default;
    virtual const char* name() const = 0;
    // Const and pure. Where a chunk has no usable level and nothing else is decided, the caller turns it into
    // text.
    virtual Decision decide(const RuleState& state) const = 0;
    // Whether it might load the chunk at one of its levels, as long as those that are usable now are: what
    // only other levels need is not fetched beforehand. Any of them before a deadline; without one the
    // finest.
    virtual bool may_load(const ChunkView& chunk, std::size_t choice, Seconds deadline) const;
};

// Index of the finest usable level that is not finer than `level`; else the coarsest usable one; npos: none.
inline constexpr std::size_t kNoLevel = static_cast<std::size_t>(-1);
std::size_t nearest_level(const ChunkView& chunk, unsigned level);
std::size_t coarsest_level(const ChunkView& chunk);

}  // namespace kvcast::streamer
