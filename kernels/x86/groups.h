// How decoders are taken side by side.
#pragma once

#include <cstddef>
#include <type_traits>

namespace kvcast::kernels::x86 {

// Calls run(n, d) for groups of n decoders from d on: as many of Most as there are, then of half as many, and
// so on. `n` is a constant.
template <std::size_t Most, typename Run>
void for_groups(std::size_t decoders, Run&& run, std::size_t first = 0) {
    for (; first + Most <= decoders; first += Most) run(std::integral_constant<std::size_t, Most>(), first);
    if constexpr (Most > 1) for_groups<Most / 2>(decoders, run, first);
}

// Strips of each of so many decoders.
constexpr std::size_t strips_each(std::size_t strips, std::size_t decoders) {
    return decoders == 0 ? 0 : strips / decoders;
}

}  // namespace kvcast::kernels::x86
