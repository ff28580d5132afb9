// What could have been done by someone who knew the link's future.
//
// The oracle recomputes a prefix of p chunks (text is dearer the later it stands, and needs all before it)
// while it loads the others back to back. For the loaded suffix, a dynamic programme over (chunk, bytes)
// gives the least mean KL within a number of bytes; the trace says how many bytes come before the deadline,
// less the wait for the first byte and the decoding of the last chunk. The best p wins. Bytes are rounded
// down to bins of 1/1024 of a chunk at its finest, so that nobody is better than the oracle: a coarse level
// may have a fiftieth of the finest one's bytes, and wider bins would make it free.
//
// The decoder follows the network: when k of n loaded chunks have come, n - k + 1 are still to be decoded, so
// that nobody is done before  arrival of k chunks + decoding of n - k + 1,  for any k. The arrival of k
// chunks is that of k times the smallest one.
#pragma once

#include <vector>

#include "bench/adaptation/simulator.h"

namespace kvcast::bench {

class Oracle {
  public:
    // For any number of scenarios with these chunks.
    explicit Oracle(const std::vector<ChunkView>& chunks);

    // Of the scenario's own choices: no miss where one can be avoided, then the least KL; `time` is the
    // shortest in which everything can be there at the coarsest level or as text.
    SessionResult solve(const Scenario& scenario) const;

    // The shortest time in which everything can be there with a mean KL of at most `kl`: the same quality
    // floor for oracle and rule. Infinite where there is no such time.
    Seconds fastest(const Scenario& scenario, double kl) const;

  private:
    double least_bytes(std::size_t first, double kl) const;
    Seconds decoded(const Scenario& scenario, std::size_t first) const;

    double least_kl(std::size_t first, double bytes) const;

    std::vector<double> kl_;  // [first chunk][bin]: sum over tokens of the suffix; infinite: does not fit
    std::vector<double> coarsest_;  // [first chunk]: bytes of the suffix at its coarsest
    std::vector<double> smallest_;  // [first chunk]: bytes of the suffix's smallest chunk, at its coarsest
    std::size_t bins_ = 0;
    double bin_bytes_ = 1;
    std::size_t chunks_ = 0;
};

}  // namespace kvcast::bench
