// Bandwidth over time.
#pragma once

#include <string>
#include <vector>

#include "streamer/throughput.h"

namespace kvcast::bench {

using streamer::Seconds;

// Piecewise constant; begins again when it is over.
class Trace {
  public:
    struct Sample {
        Seconds time = 0;  // from here on
        double bytes_per_second = 0;
    };

    // Lines "seconds Mbit/s", ascending from 0; the rate is multiplied by `scale`. Throws tools::Error.
    static Trace load(const std::string& path, double scale);
    Trace(std::string name, std::vector<Sample> samples, Seconds length);

    const std::string& name() const { return name_; }
    Seconds length() const { return length_; }
    double rate(Seconds at) const;
    Seconds next_change(Seconds at) const;  // after `at`
    // Bytes between two times, and the time from which on `bytes` have come since `from`.
    double bytes(Seconds from, Seconds to) const;
    Seconds when(Seconds from, double bytes) const;

  private:
    std::size_t index(Seconds within) const;
    double up_to(Seconds at) const;

    std::string name_;
    std::vector<Sample> samples_;
    std::vector<double> before_;  // bytes before each sample
    Seconds length_ = 0;
    double total_ = 0;
};

}  // namespace kvcast::bench
