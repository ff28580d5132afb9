#include "bench/adaptation/decision_time.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <random>
#include <vector>

namespace kvcast::bench {
namespace {

using namespace streamer;

constexpr std::size_t kStates = 4000;
constexpr std::size_t kLevels = 12;
constexpr std::size_t kInFlight = 4;
constexpr std::size_t kTokens = 256;

std::vector<ChunkView> drawn_chunks(std::size_t count, std::mt19937& random) {
    std::vector<ChunkView> out(count);
    for (std::size_t i = 0; i < count; ++i) {
        out[i].first_token = i * kTokens;
        out[i].tokens = kTokens;
        double bytes = 4e6;
        for (unsigned level = 0; level < kLevels; ++level) {
            const double part = std::uniform_real_distribution<double>(0.6, 0.8)(random);
            out[i].levels.push_back({level, static_cast<std::uint64_t>(bytes), 0.01 * level, true});
            bytes *= part;
        }
        if (i + kInFlight < count) continue;
        out[i].status = ChunkStatus::kLoading;
        out[i].choice = random() % kLevels;
    }
    return out;
}

}  // namespace

DecisionTime time_decisions(const Rule& rule, std::size_t chunks) {
    std::mt19937 random(1);
    const auto drawn = [&](double low, double high) {
        return low * std::pow(high / low, std::uniform_real_distribution<double>(0, 1)(random));
    };
    const std::vector<ChunkView> views = drawn_chunks(chunks, random);
    std::vector<double> times;
    for (std::size_t i = 0; i < kStates; ++i) {
        ComputeModel compute;
        compute.bytes_per_token = 131072;
        compute.decode_bytes_per_second = 20e9;
        if (i % 2 == 0) compute.prefill = {{0, drawn(500, 20000)}, {32768, 400}};
        const double rate = drawn(1e6, 1e9);
        RuleState state;
        state.deadline = drawn(0.1, 100);
        state.chunks = views;
        state.network = {rate, rate, rate, rate, 0.01, 0, true};
        state.compute = &compute;
        state.transfers = i % 4 < 2 ? kInFlight : 0;  // CacheGen's rule decides with none in flight only
        state.most_transfers = kMostTransfers;
        const auto before = std::chrono::steady_clock::now();
        const Decision d = rule.decide(state);
        times.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - before).count());
        if (d.chunk >= views.size()) return {};  // the decision is used, so that it is not left out
    }
    std::ranges::sort(times);
    return {times[times.size() / 2], times[times.size() * 99 / 100]};
}

}  // namespace kvcast::bench
