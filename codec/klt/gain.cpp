#include "codec/klt/gain.h"

#include <algorithm>
#include <array>
#include <cstdlib>

#include "codec/aligned_vector.h"
#include "codec/entropy/model.h"
#include "kernels/klt_choice.h"

namespace kvcast {
namespace {

using kernels::klt_class;

constexpr int kGainMost = kernels::kKltGainMost;
constexpr std::size_t kGains = kernels::kKltGainsTried;

// What coefficients cost with each class. Classes are limited to 0..31: a row repeats its ends, so that the
// costs with each gain stand one after another whatever the class at gain 0 is.
class CostTable {
  public:
    static constexpr int kMost = kernels::kValueCostMost;

    CostTable() : costs_((2 * kMost + 1) * kernels::kValueCostStride) {
        for (int q = -kMost; q <= kMost; ++q) {
            for (int base = kFirst; base <= kLast; ++base) {
                for (int gain = -kGainMost; gain <= kGainMost; ++gain) {
                    const unsigned c =
                        klt_class(static_cast<std::int8_t>(base), static_cast<std::int16_t>(gain));
                    costs_[at(q, base) + static_cast<std::size_t>(gain + kGainMost)] =
                        static_cast<std::uint32_t>(klt_cost(c, q));
                }
            }
        }
    }

    // Of zero, with each gain; those of other coefficients are as many strides away.
    const std::uint32_t* of(int base) const { return &costs_[at(0, std::clamp(base, kFirst, kLast))]; }

  private:
    static constexpr int kFirst = -kGainMost, kLast = static_cast<int>(kernels::kClasses) - 1 + kGainMost;
    static_assert(kLast - kFirst + static_cast<int>(kernels::kValueCosts) <= kernels::kValueCostStride);

    static std::size_t at(int q, int base) {
        return static_cast<std::size_t>((q + kMost) * kernels::kValueCostStride + base - kFirst);
    }

    AlignedVector<std::uint32_t> costs_;
};

const CostTable& cost_table() {
    static const CostTable table;
    return table;
}

using GainCosts = std::array<std::uint64_t, kGains>;

// Adds what coefficients of one class at gain 0 cost with each gain.
void add_run(const kernels::Ops& ops, std::span<const std::int16_t> q, std::int8_t base, GainCosts& costs) {
    constexpr std::size_t kAtOnce = 8192;  // whose costs are below 2^18 each
    if (q.size() > kAtOnce) {
        add_run(ops, q.first(kAtOnce), base, costs);
        return add_run(ops, q.subspan(kAtOnce), base, costs);
    }
    std::uint32_t sums[kernels::kValueCosts];
    if (ops.value_costs(q.data(), q.size(), cost_table().of(base), sums)) {
        for (std::size_t i = 0; i < kGains; ++i) costs[i] += sums[i];
        return;
    }
    for (std::size_t i = 0; i < kGains; ++i) {
        const unsigned c = klt_class(base, static_cast<std::int16_t>(static_cast<int>(i) - kGainMost));
        for (const std::int16_t v : q) costs[i] += klt_cost(c, v);
    }
}

}  // namespace

// Small coefficients cost what their magnitudes do.
std::uint64_t klt_cost(unsigned spread_class, std::int32_t q) {
    const std::int32_t magnitude = std::abs(q);
    if (spread_class == 0)
        return std::uint64_t{kernels::kKltLostCost} * static_cast<std::uint64_t>(magnitude);
    return entropy::value_cost(spread_class, magnitude <= kernels::kKltSymmetricCost ? magnitude : q);
}

std::vector<ClassRun> class_runs(std::span<const std::int8_t> classes) {
    std::vector<ClassRun> runs;
    for (std::uint32_t i = 0; i < classes.size(); ++i) {
        if (runs.empty() || runs.back().base != classes[i]) runs.push_back({i, i, classes[i]});
        ++runs.back().end;
    }
    return runs;
}

int cheapest_klt_gain(const kernels::Ops& ops, std::span<const std::int16_t> q,
                      std::span<const ClassRun> runs) {
    GainCosts costs = {};
    for (const ClassRun& run : runs) add_run(ops, q.subspan(run.begin, run.end - run.begin), run.base, costs);
    int best = kGainMost;
    for (int i = 1; i < static_cast<int>(kGains); ++i) {
        const int at = kernels::klt_gain_tried(i) + kGainMost;
        if (costs[at] < costs[best]) best = at;
    }
    return best - kGainMost;
}

void level_gains(const TokenStrips& strips, std::span<std::int16_t> gains) {
    for (const TokenStrip& strip : strips.strips()) {
        const auto tokens = strips.tokens(strip);
        const std::int16_t gain = gains[tokens[tokens.size() / 2]];
        for (const std::uint32_t t : tokens) gains[t] = gain;
    }
}

std::size_t coded_coefficients(const CalibrationUnit& unit, std::size_t level) {
    return leading_coded(unit.classes_of(level), kernels::kKltGainMost);
}

void drop_uncoded(std::span<const ClassRun> runs, std::int16_t gain, std::int16_t* q) {
    for (const ClassRun& run : runs) {
        if (klt_class(run.base, gain) == 0) std::fill(q + run.begin, q + run.end, std::int16_t{0});
    }
}

}  // namespace kvcast
