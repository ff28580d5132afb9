// What the network has shown so far. Aggregate: all transfers of a session together, over the wall time in
// which at least one of them had bytes to bring; the wait for a first byte is kept apart from the rate.
//
// A plain value without clock or lock: the session and the simulator feed it with their own time.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace kvcast::streamer {

// Seconds since the session began.
using Seconds = double;

// What may be known before the first byte: from earlier sessions, or a guess.
struct NetworkPrior {
    double bytes_per_second = 12.5e6;
    Seconds first_byte = 0.05;
    double doubt = 2;  // relative error to expect of the rate until something is measured
};

struct ThroughputEstimate {
    double mean = 0;      // bytes per second, over recent time
    double robust = 0;    // the mean discounted by how much it has erred lately, the prior by its doubt
    double cautious = 0;  // the mean discounted by its largest error of late, the prior by its doubt
    double last = 0;      // of the last whole transfer alone, as CacheGen takes it
    Seconds first_byte = 0;
    Seconds silence = 0;    // since a byte came, where one is awaited longer than usual
    bool measured = false;  // false: all of it is the prior
};

class Throughput {
  public:
    explicit Throughput(const NetworkPrior& prior) : prior_(prior) {}

    // Times never go back.
    void on_request(Seconds now);
    void on_first_byte(Seconds now, Seconds latency);
    void on_bytes(Seconds now, std::uint64_t bytes);
    // A transfer ends, whole or not: `bytes` in `seconds` since its request; whether it had its first byte.
    void on_end(Seconds now, std::uint64_t bytes, Seconds seconds, bool had_first_byte);

    ThroughputEstimate estimate(Seconds now) const;

    // What a next session on the same link may begin with; the prior itself where nothing was measured.
    NetworkPrior experience(Seconds now) const;
    // Whether anything of that was seen.
    bool measured(Seconds now) const { return estimate(now).measured; }

    std::uint64_t bytes() const { return bytes_; }  // of all transfers

  private:
    // A stretch of busy time.
    struct Slice {
        double bytes = 0;
        Seconds time = 0;
    };
    static constexpr std::size_t kSlices = 8;
    static constexpr std::size_t kErrors = 5;

    bool silent(Seconds now) const;
    Seconds first_byte() const;
    void close_slice();
    Slice recent() const;

    NetworkPrior prior_;
    std::array<Slice, kSlices> slices_ = {};  // newest first
    std::size_t count_ = 0;
    Slice open_ = {};
    std::size_t in_flight_ = 0;
    std::size_t busy_ = 0;  // transfers past their first byte
    Seconds last_change_ = 0;
    Seconds last_byte_ = 0;
    Seconds first_byte_ = 0;                   // smoothed; 0: not measured
    double error_ = 0;                         // smoothed relative error of predictions
    std::array<double, kErrors> errors_ = {};  // newest first
    double last_transfer_ = 0;
    std::uint64_t bytes_ = 0;
};

}  // namespace kvcast::streamer
