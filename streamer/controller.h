// Between events and rules: the state that a rule sees, the loop that asks it, and what its decisions change.
//
// A session and the simulator drive the same controller, each with its own clock, network and engine: they
// tell it what happened (take), and it tells them what to do (Owner). It has no clock, no thread and no
// randomness, so that the events of a session, played again, lead to the same decisions.
//
// Not thread-safe: one thread at a time. No exceptions but for memory exhaustion.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "streamer/rules/rule.h"

namespace kvcast::streamer {

struct ControllerOptions {
    Seconds deadline = std::numeric_limits<Seconds>::infinity();
    ComputeModel compute = {};
    NetworkPrior network = {};
    std::size_t transfers = kMostTransfers;  // in flight at once, at most
    // Of objects on their way or not yet decoded; a single larger one is taken alone.
    std::uint64_t memory_bytes = std::numeric_limits<std::uint64_t>::max();
};

inline constexpr std::size_t kNoChunk = static_cast<std::size_t>(-1);

// Something that happened to a session. Made by the functions below, which say what each kind has.
struct Event {
    enum class Kind : std::uint8_t {
        kRequest,     // something other than a chunk is asked for: the manifest, the calibration
        kFirstByte,   // a transfer's first byte, `seconds` after its request
        kBytes,       // `count` came for `chunk` (kNoChunk: for something else), which makes `received` of it
        kEnd,         // of what is not a chunk: `count` bytes in `seconds`
        kOther,       // `left` bytes are still to come before any chunk counts: the calibration's
        kArrived,     // the chunk is whole, and waits to be decoded
        kFailed,      // its transfer broke off, or its object is of no use: pending again
        kReady,       // it is with the sink
        kRecomputed,  // what the owner was told to recompute is there
        kExclude,     // the chunk's level of index `choice` is not to be had
        kInclude,     // it is, after all
        kLook,        // the rule is asked
    };
    Kind kind = Kind::kLook;
    Seconds time = 0;  // since the session began; never goes back
    std::size_t chunk = kNoChunk;
    std::size_t choice = 0;
    std::uint64_t count = 0;
    std::uint64_t received = 0;
    std::uint64_t left = 0;
    Seconds seconds = 0;

    static Event request(Seconds now) { return {.kind = Kind::kRequest, .time = now}; }
    static Event first_byte(Seconds now, std::size_t chunk, Seconds latency) {
        return {.kind = Kind::kFirstByte, .time = now, .chunk = chunk, .seconds = latency};
    }
    static Event bytes(Seconds now, std::size_t chunk, std::uint64_t count, std::uint64_t received) {
        return {.kind = Kind::kBytes, .time = now, .chunk = chunk, .count = count, .received = received};
    }
    static Event end(Seconds now, std::uint64_t count, Seconds seconds) {
        return {.kind = Kind::kEnd, .time = now, .count = count, .seconds = seconds};
    }
    static Event other(Seconds now, std::uint64_t left) {
        return {.kind = Kind::kOther, .time = now, .left = left};
    }
    static Event arrived(Seconds now, std::size_t chunk) {
        return {.kind = Kind::kArrived, .time = now, .chunk = chunk};
    }
    static Event failed(Seconds now, std::size_t chunk) {
        return {.kind = Kind::kFailed, .time = now, .chunk = chunk};
    }
    static Event ready(Seconds now, std::size_t chunk) {
        return {.kind = Kind::kReady, .time = now, .chunk = chunk};
    }
    static Event recomputed(Seconds now) { return {.kind = Kind::kRecomputed, .time = now}; }
    static Event exclude(Seconds now, std::size_t chunk, std::size_t choice) {
        return {.kind = Kind::kExclude, .time = now, .chunk = chunk, .choice = choice};
    }
    static Event include(Seconds now, std::size_t chunk, std::size_t choice) {
        return {.kind = Kind::kInclude, .time = now, .chunk = chunk, .choice = choice};
    }
    static Event look(Seconds now) { return {.kind = Kind::kLook, .time = now}; }
};

// One decision as the rule took it, and what it saw of the network.
struct DecisionRecord {
    Seconds time = 0;
    Decision decision;
    unsigned level = 0;       // of a load
    std::uint64_t bytes = 0;  // of a load
    ThroughputEstimate network;
};

// The engine is given the text of chunks [first, end).
struct RecomputeRecord {
    Seconds time = 0;
    std::size_t first = 0;
    std::size_t end = 0;
};

// All that a session's decisions depended on, and what they were.
struct Recording {
    ControllerOptions options;
    std::vector<ChunkView> chunks;  // as they were at first
    std::vector<Event> events;
    std::vector<DecisionRecord> decisions;
    std::vector<RecomputeRecord> recomputed;
};

class Controller {
  public:
    // Carries decisions out. Called from within take(kLook) only; calls take() from none of these.
    class Owner {
      public:
        virtual ~Owner() = default;
        virtual void start(std::size_t chunk,
                           std::size_t choice) = 0;  // a transfer; none of the chunk is left
        virtual void stop(std::size_t chunk) = 0;    // the chunk's transfer, in flight
        // All before `first` is in place. Answered by kRecomputed; asked for one range at a time.
        virtual void recompute(std::size_t first, std::size_t end) = 0;
        virtual void decided(const DecisionRecord& record) { (void)record; }
    };

    // `owner` outlives the controller. Records, if told to.
    Controller(std::shared_ptr<const Rule> rule, ControllerOptions options, Owner& owner,
               bool record = false);

    // The chunks there are: pending, text or present. Before the first event of any of them.
    // `bytes_per_token` of decoded KV.
    void begin(std::vector<ChunkView> chunks, std::uint64_t bytes_per_token);
    void take(const Event& event);

    const std::vector<ChunkView>& chunks() const { return views_; }
    const Throughput& network() const { return network_; }
    const ControllerOptions& options() const { return options_; }
    // Whether every chunk is loaded, recomputed or present.
    bool complete() const;
    // Whether a chunk's bytes are on their way.
    bool loading() const;
    // Rule::may_load.
    bool may_load(std::size_t chunk, std::size_t choice) const {
        return rule_->may_load(views_[chunk], choice, options_.deadline);
    }
    // Whether chunks that are whole, but wait for the other bytes, have to become text now, or would be late
    // (outlook.h, text_is_due).
    bool waits_in_vain(std::span<const std::size_t> waiting, Seconds now) const;
    // Whether the calibration would be late, and everything sooner there at levels that need none.
    bool is_better_off_uncalibrated(Seconds now) const;
    const std::optional<Recording>& recording() const { return recording_; }

  private:
    void look(Seconds now);
    RuleState state(Seconds now) const;
    bool sensible(const Decision& d) const;
    bool has_room(const Decision& d) const;
    void apply(const Decision& d, Seconds now);
    void stop(std::size_t chunk, Seconds now);
    void text_where_nothing_is_left(Seconds now);
    void recompute(Seconds now);
    Seconds compute_busy(Seconds now) const;

    const std::shared_ptr<const Rule> rule_;
    ControllerOptions options_;
    Owner& owner_;
    std::vector<ChunkView> views_;
    // What Throughput is told at a transfer's end.
    struct Begun {
        Seconds time = 0;  // of its request
        bool has_first_byte = false;
    };
    void end_transfer(Begun& begun, Seconds now, std::uint64_t bytes, Seconds seconds);

    std::vector<Begun> begun_;  // [chunk]
    Begun other_begun_;         // the manifest or the calibration
    Throughput network_;
    std::uint64_t other_bytes_ = 0;
    std::size_t computing_first_ = 0, computing_end_ = 0;  // what the engine works on; empty: nothing
    Seconds computing_since_ = 0;
    std::optional<Recording> recording_;
};

}  // namespace kvcast::streamer
