// Copies from global to shared memory that go on while their thread does other things. PTX ISA, "cp.async".
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace kvcast::kernels::cuda {

#ifdef KVCAST_SIMT

inline void copy_16(void* to, const void* from) {
    simt_copy_async(to, from, 16);
}
inline void commit_copies() {
    simt_commit_copies();
}
template <unsigned Open>
void wait_copies() {
    simt_wait_copies(Open);
}

#else

// 16 bytes; both addresses are multiples of 16.
__device__ __forceinline__ void copy_16(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
                 :
                 : "r"(static_cast<unsigned>(__cvta_generic_to_shared(to))), "l"(from)
                 : "memory");
}

// Ends a group of the thread's copies.
__device__ __forceinline__ void commit_copies() {
    asm volatile("cp.async.commit_group;" : : : "memory");
}

// Until all but the last `Open` groups are done. Other threads see them after a barrier.
template <unsigned Open>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" : : "n"(Open) : "memory");
}

#endif

}  // namespace kvcast::kernels::cuda
