// What elements of a type are stored as.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/math.h"

namespace kvcast::kernels::x86 {

template <Dtype D>
using ElementOf = std::conditional_t<D == Dtype::kF32, std::uint32_t, std::uint16_t>;

}  // namespace kvcast::kernels::x86
