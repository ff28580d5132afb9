// The choice of a token's gain: what its coefficients cost in the classes that gains lead to, and what a
// strip makes of it.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "codec/klt/klt_chunk.h"
#include "kernels/klt_choice.h"
#include "kernels/ops.h"

namespace kvcast {

// What a coefficient costs in a class, in 1/256 bit. In class 0, which sets it to zero, it counts for its
// error.
std::uint64_t klt_cost(unsigned spread_class, std::int32_t q);

// Neighbouring coefficients that have the same class at gain 0.
struct ClassRun {
    std::uint32_t begin;
    std::uint32_t end;
    std::int8_t base;
};

// `classes` [coefficient] as runs, in order.
std::vector<ClassRun> class_runs(std::span<const std::int8_t> classes);

// The gains that suit tokens of a unit.
class GainChooser {
  public:
    // Classes [coefficient] at gain 0, of the coefficients that may be coded.
    explicit GainChooser(std::span<const std::int8_t> classes);

    // The gain with which a token's coefficients, as many as there are classes, cost least.
    std::int16_t cheapest(const kernels::Ops& ops, std::span<const std::int16_t> q) const;

  private:
    using Costs = std::array<std::int64_t, kernels::kKltGainsTried>;  // with each gain, the lowest one first

    void add_far(std::span<const std::int16_t> q, Costs& costs) const;

    std::span<const std::int8_t> classes_;
    std::vector<std::uint16_t> places_;  // [coefficient]: of its class in a table of costs
    std::array<std::int32_t, kernels::kValueCosts> zeros_ = {};  // as Ops::value_costs: of nothing but zeros
};

// Gives all tokens of a strip the gain of the one in its middle: the strip's classes are then those of each
// of its tokens, neither too wide for most nor too narrow. `gains` [token].
void level_gains(const TokenStrips& strips, std::span<std::int16_t> gains);

// Leading coefficients of a unit that may be coded at a level (counted from 0) with any gain that is tried.
std::size_t coded_coefficients(const CalibrationUnit& unit, std::size_t level);

// Zeros where a gain leaves no bits.
void drop_uncoded(std::span<const ClassRun> runs, std::int16_t gain, std::int16_t* q);

}  // namespace kvcast
