// The choice of a token's gain: what its coefficients cost in the classes that gains lead to.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

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

// The gain with which a token's coefficients of a unit cost least.
int cheapest_klt_gain(const kernels::Ops& ops, std::span<const std::int16_t> q,
                      std::span<const ClassRun> runs);

}  // namespace kvcast
