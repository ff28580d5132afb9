// Tests that run in every order of threads.
#pragma once

#include <gtest/gtest.h>

#include <array>
#include <string>

#include "tests/simt/simt.h"

namespace kvcast::test {

inline auto all_orders() {
    return testing::Values(simt::Schedule::kForwards, simt::Schedule::kBackwards, simt::Schedule::kShuffled);
}

inline std::string order_name(const testing::TestParamInfo<simt::Schedule>& tested) {
    constexpr std::array names = {"Forwards", "Backwards", "Shuffled"};
    return names[static_cast<std::size_t>(tested.param)];
}

}  // namespace kvcast::test
