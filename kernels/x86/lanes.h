// What the backends of x86-64 share.
#pragma once

#include <cstddef>
#include <cstdint>

// Before loops over what must stay in registers. Clang unrolls them unasked.
#ifdef __clang__
#define KVCAST_UNROLL
#else
#define KVCAST_UNROLL _Pragma("GCC unroll 16")
#endif

namespace kvcast::kernels::x86 {

// A mask of the first `count` of 32 lanes.
constexpr std::uint32_t first_lanes(std::size_t count) {
    return count >= 32 ? ~0u : (1u << count) - 1;
}

}  // namespace kvcast::kernels::x86
