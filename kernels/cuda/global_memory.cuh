// What coders ask of global memory: places that registers hold, and accesses of some lanes without a branch,
// or anything that a compiler would take for one.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace kvcast::kernels::cuda {

// A place of which the compiler knows nothing: it is kept as it is, not put together anew at every use.
template <typename T>
__device__ __forceinline__ T* fixed(T* place) {
#ifndef KVCAST_SIMT
    asm("" : "+l"(place));
#endif
    return place;
}

// The low half of `value`.
__device__ __forceinline__ void store_where(bool mine, std::uint16_t* to, std::uint32_t value) {
#ifdef KVCAST_SIMT
    if (mine) *to = static_cast<std::uint16_t>(value);
#else
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %0, 0; @p st.global.u16 [%1], %2; }"
                 :
                 : "r"(mine ? 1 : 0), "l"(to), "h"(static_cast<std::uint16_t>(value))
                 : "memory");
#endif
}

// Has what lies there at hand a little later.
__device__ __forceinline__ void expect_where(bool mine, const void* place) {
#ifndef KVCAST_SIMT
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %0, 0; @p prefetch.global.L1 [%1]; }"
                 :
                 : "r"(mine ? 1 : 0), "l"(place));
#else
    (void)mine, (void)place;
#endif
}

}  // namespace kvcast::kernels::cuda
