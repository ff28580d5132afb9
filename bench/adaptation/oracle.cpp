#include "bench/adaptation/oracle.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace kvcast::bench {
namespace {

constexpr double kNever = std::numeric_limits<double>::infinity();
constexpr std::size_t kLeastBins = 2048;
constexpr std::size_t kBinsPerChunk = 1024;
constexpr std::size_t kMostBins = 1 << 17;  // 1 MiB for every chunk

}  // namespace

Oracle::Oracle(const std::vector<ChunkView>& chunks) : chunks_(chunks.size()) {
    bins_ = std::clamp(kBinsPerChunk * chunks_, kLeastBins, kMostBins);
    double finest = 0;
    for (const ChunkView& c : chunks) finest += static_cast<double>(c.levels.front().bytes);
    bin_bytes_ = finest / static_cast<double>(bins_ - 1);
    kl_.assign((chunks_ + 1) * bins_, 0);
    coarsest_.assign(chunks_ + 1, 0);
    smallest_.assign(chunks_ + 1, kNever);
    for (std::size_t i = chunks_; i-- > 0;) {
        coarsest_[i] = coarsest_[i + 1] + static_cast<double>(chunks[i].levels.back().bytes);
        smallest_[i] = std::min(smallest_[i + 1], static_cast<double>(chunks[i].levels.back().bytes));
        double* here = kl_.data() + i * bins_;
        const double* after = here + bins_;
        std::fill_n(here, bins_, kNever);
        for (const streamer::LevelView& l : chunks[i].levels) {
            const auto bins = static_cast<std::size_t>(static_cast<double>(l.bytes) / bin_bytes_);
            const double kl = l.kl * static_cast<double>(chunks[i].tokens);
            for (std::size_t b = bins; b < bins_; ++b) here[b] = std::min(here[b], after[b - bins] + kl);
        }
    }
}

double Oracle::least_kl(std::size_t first, double bytes) const {
    if (bytes < coarsest_[first]) return kNever;
    const auto bin =
        static_cast<std::size_t>(std::clamp(bytes / bin_bytes_, 0.0, static_cast<double>(bins_ - 1)));
    return kl_[first * bins_ + bin];
}

// The other way round: the least bytes of the suffix for which its sum of KL is at most `kl`.
double Oracle::least_bytes(std::size_t first, double kl) const {
    const double* row = kl_.data() + first * bins_;
    // KL falls with the bin; what a sum of products differs from itself in another order is let pass.
    const auto bin = std::partition_point(row, row + bins_, [&](double k) { return k > kl + 1e-9; }) - row;
    if (static_cast<std::size_t>(bin) == bins_) return kNever;
    return std::max(static_cast<double>(bin) * bin_bytes_, coarsest_[first]);
}

// Before this, not everything from `first` on can be decoded.
Seconds Oracle::decoded(const Scenario& s, std::size_t first) const {
    const std::size_t count = chunks_ - first;
    std::size_t tokens = 0, largest = 0;
    for (std::size_t i = first; i < chunks_; ++i) {
        tokens += s.chunks[i].tokens;
        largest = std::max(largest, s.chunks[i].tokens);
    }
    Seconds latest = 0;
    for (const std::size_t come : {std::size_t{1}, count / 4, count / 2, count * 3 / 4}) {
        if (come == 0 || come > count) continue;
        const Seconds arrival =
            s.trace->when(s.start + s.first_byte, static_cast<double>(come) * smallest_[first]) - s.start;
        const std::size_t done = std::min(tokens, (come - 1) * largest);
        latest = std::max(latest, arrival + s.compute.decode_time(tokens - done));
    }
    return latest;
}

Seconds Oracle::fastest(const Scenario& s, double kl) const {
    double tokens = 0;
    for (const ChunkView& c : s.chunks) tokens += static_cast<double>(c.tokens);
    Seconds best = kNever;
    std::size_t prefix = 0;
    for (std::size_t p = 0; p <= chunks_; ++p) {
        const Seconds text = s.compute.prefill_time(0, prefix);
        if (text >= best) break;
        const double bytes = p < chunks_ ? least_bytes(p, kl * tokens) : 0;
        if (bytes < kNever) {
            const Seconds all_decoded = decoded(s, p);
            const Seconds last = p < chunks_ ? s.compute.decode_time(s.chunks.back().tokens) : 0;
            const Seconds arrival =
                p < chunks_ ? s.trace->when(s.start + s.first_byte, bytes) - s.start + last : 0;
            best = std::min(best, std::max({text, arrival, all_decoded}));
        }
        if (p < chunks_) prefix += s.chunks[p].tokens;
    }
    return best;
}

SessionResult Oracle::solve(const Scenario& s) const {
    SessionResult best;
    best.missed = true;
    best.time = kNever;
    double best_kl = kNever, tokens = 0;
    std::size_t prefix = 0;
    for (const ChunkView& c : s.chunks) tokens += static_cast<double>(c.tokens);
    for (std::size_t p = 0; p <= chunks_; ++p) {
        const Seconds text = s.compute.prefill_time(0, prefix);
        const Seconds decode = p < chunks_ ? s.compute.decode_time(s.chunks.back().tokens) : 0;
        const Seconds all_decoded = decoded(s, p);
        const Seconds arrival =
            p < chunks_ ? s.trace->when(s.start + s.first_byte, coarsest_[p]) - s.start + decode : 0;
        const Seconds fastest = std::max({text, arrival, all_decoded});
        best.time = std::min(best.time, fastest);
        const Seconds network_end = s.deadline - decode;
        if (text <= s.deadline && all_decoded <= s.deadline && fastest <= s.deadline) {
            const double bytes = network_end > s.first_byte
                                     ? s.trace->bytes(s.start + s.first_byte, s.start + network_end)
                                     : 0;
            const double kl = p < chunks_ ? least_kl(p, bytes) : 0;
            best.missed = false;
            if (kl < best_kl) {
                best_kl = kl;
                best.text_tokens = prefix;
            }
        }
        if (p < chunks_) prefix += s.chunks[p].tokens;
    }
    if (best.missed) {
        best_kl = 0;
        for (const ChunkView& c : s.chunks) best_kl += c.levels.back().kl * static_cast<double>(c.tokens);
    }
    best.kl = best_kl / tokens;
    return best;
}

}  // namespace kvcast::bench
