// The choice of a token's gain: what its coefficients cost in the classes that gains lead to.
#pragma once

#include <cstdint>
#include <span>

#include "kernels/ops.h"

namespace kvcast {

// What a group of coefficients costs in a class, in 1/256 bit. In class 0 every coefficient that is set to
// zero counts for its error.
std::uint64_t klt_group_cost(std::span<const std::int16_t> q, unsigned spread_class);

// The gain with which a token's coefficients of a unit cost least; `classes` [group].
int cheapest_klt_gain(const kernels::Ops& ops, std::span<const std::int16_t> q, const std::int8_t* classes);

}  // namespace kvcast
