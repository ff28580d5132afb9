// Types of elements as constants, and what elements are stored as.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/math.h"

namespace kvcast::kernels::x86 {

template <Dtype D>
using ElementOf = std::conditional_t<D == Dtype::kF32, std::uint32_t, std::uint16_t>;

// Calls run(d) with the type as a constant.
template <typename Run>
void with_dtype(Dtype dtype, Run&& run) {
    switch (dtype) {
        case Dtype::kBf16:
            return run(std::integral_constant<Dtype, Dtype::kBf16>());
        case Dtype::kF16:
            return run(std::integral_constant<Dtype, Dtype::kF16>());
        default:
            return run(std::integral_constant<Dtype, Dtype::kF32>());
    }
}

}  // namespace kvcast::kernels::x86
