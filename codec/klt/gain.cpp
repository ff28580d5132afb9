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

// What coefficients cost in each class beyond what a zero does, and what a zero costs. Classes are limited to
// 0..31: a row repeats its ends, so that the costs with each gain stand one after another whatever the class
// at gain 0 is.
class CostTable {
  public:
    CostTable() : costs_((2 * kMost + 1) * kernels::kValueCostStride), zeros_(kernels::kValueCostStride) {
        constexpr int first = kFirst - kGainMost, last = kLast + kGainMost;
        for (std::size_t place = 0; place <= std::size_t{last - first}; ++place) {
            const unsigned c = klt_class(static_cast<std::int8_t>(static_cast<int>(place) + first), 0);
            const auto zero = static_cast<std::int32_t>(klt_cost(c, 0));
            zeros_[place] = zero;
            for (int q = -kMost; q <= kMost; ++q)
                costs_[row(q) + place] = static_cast<std::int32_t>(klt_cost(c, q)) - zero;
        }
    }

    // Where a class at gain 0 has its costs with the lowest gain.
    static std::uint16_t place(std::int8_t base) {
        return static_cast<std::uint16_t>(std::clamp(int{base}, kFirst, kLast) - kFirst);
    }

    // As Ops::value_costs reads them.
    const std::int32_t* beyond_zero() const { return &costs_[row(0)]; }
    const std::int32_t* zero() const { return zeros_.data(); }

  private:
    static constexpr int kMost = kernels::kValueCostMost;
    static constexpr int kFirst = -kGainMost, kLast = static_cast<int>(kernels::kClasses) - 1 + kGainMost;
    static_assert(kLast - kFirst + static_cast<int>(kernels::kValueCosts) <= kernels::kValueCostStride);

    static std::size_t row(int q) {
        return static_cast<std::size_t>((q + kMost) * kernels::kValueCostStride);
    }

    AlignedVector<std::int32_t> costs_;
    AlignedVector<std::int32_t> zeros_;
};

const CostTable& cost_table() {
    static const CostTable table;
    return table;
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

GainChooser::GainChooser(std::span<const std::int8_t> classes) : classes_(classes) {
    const CostTable& table = cost_table();
    for (const std::int8_t base : classes) {
        places_.push_back(CostTable::place(base));
        for (std::size_t i = 0; i < kGains; ++i) zeros_[i] += table.zero()[places_.back() + i];
    }
}

// Coefficients beyond the table: those of fine levels that spread most.
void GainChooser::add_far(std::span<const std::int16_t> q, Costs& costs) const {
    constexpr int most = kernels::kValueCostMost;
    for (std::size_t j = 0; j < q.size(); ++j) {
        if (q[j] >= -most && q[j] <= most) continue;
        for (std::size_t i = 0; i < kGains; ++i) {
            const int gain = static_cast<int>(i) - kGainMost;
            const unsigned c = klt_class(classes_[j], static_cast<std::int16_t>(gain));
            costs[i] +=
                static_cast<std::int64_t>(klt_cost(c, q[j])) - static_cast<std::int64_t>(klt_cost(c, 0));
        }
    }
}

std::int16_t GainChooser::cheapest(const kernels::Ops& ops, std::span<const std::int16_t> q) const {
    std::int32_t sums[kernels::kValueCosts];
    std::copy(zeros_.begin(), zeros_.end(), sums);
    const bool all = ops.value_costs(q.data(), places_.data(), q.size(), cost_table().beyond_zero(), sums);
    Costs costs;
    std::copy_n(sums, kGains, costs.begin());
    if (!all) add_far(q, costs);
    int best = kGainMost;
    for (int n = 1; n < static_cast<int>(kGains); ++n) {
        const int at = kernels::klt_gain_tried(n) + kGainMost;
        if (costs[at] < costs[best]) best = at;
    }
    return static_cast<std::int16_t>(best - kGainMost);
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
