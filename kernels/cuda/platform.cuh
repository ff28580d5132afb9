// What kernels share: lanes; dynamic shared memory, which the SIMT emulator spells differently; launches;
// finding a tile's task.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <utility>

#include "kernels/cuda/compiler.cuh"
#include "kernels/math.h"

namespace kvcast::kernels::cuda {

inline constexpr unsigned kFullWarp = 0xffffffffu;

__device__ __forceinline__ unsigned lane_id() {
    return threadIdx.x % kLanes;
}

// A number that is the same in all lanes, so that the compiler knows it to be: where it does not, it expects
// lanes to be apart at every exchange between them that follows.
__device__ __forceinline__ std::uint32_t uniform(std::uint32_t v) {
    return __reduce_min_sync(kFullWarp, v);
}

// Which warp of the block this is.
__device__ __forceinline__ std::uint32_t warp_id() {
    return uniform(threadIdx.x / kLanes);
}

// Waits for `threads` threads of the block, whole warps, at one of its kBarriers barriers; orders memory
// among them. __syncthreads() is at barrier 0. A kernel whose barriers the compiler does not know is given
// all of them, and a multiprocessor has 64.
inline constexpr std::uint32_t kBarriers = 16;
__device__ __forceinline__ void barrier_sync(std::uint32_t barrier, std::uint32_t threads) {
#ifdef KVCAST_SIMT
    simt_barrier_sync(barrier, threads);
#else
    asm volatile("barrier.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
#endif
}

// Counts at it, and does not wait.
__device__ __forceinline__ void barrier_arrive(std::uint32_t barrier, std::uint32_t threads) {
#ifdef KVCAST_SIMT
    simt_barrier_arrive(barrier, threads);
#else
    asm volatile("barrier.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
#endif
}

// Where warps of a block meet once: like __syncthreads(), for warps some of which still use its barrier. In
// shared memory.
class LastMeeting {
  public:
    // By one thread, and a barrier of all before they meet.
    __device__ __forceinline__ void prepare(std::uint32_t warps) {
#ifdef KVCAST_SIMT
        simt_mbarrier_init(&barrier_, warps);
#else
        asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(place()), "r"(warps) : "memory");
#endif
    }

    // By all lanes of a warp together. Orders memory among all lanes of all warps.
    __device__ __forceinline__ void meet() {
        __syncwarp();
        if (lane_id() == 0) arrive();
        while (!is_over()) {
        }
        __syncwarp();
    }

  private:
#ifdef KVCAST_SIMT
    void arrive() {
        simt_mbarrier_arrive(&barrier_);
    }
    bool is_over() {
        return simt_mbarrier_try_wait(&barrier_, 0);
    }
#else
    __device__ __forceinline__ std::uint32_t place() const {
        return static_cast<std::uint32_t>(__cvta_generic_to_shared(&barrier_));
    }
    __device__ __forceinline__ void arrive() {
        asm volatile("{ .reg .b64 phase; mbarrier.arrive.shared.b64 phase, [%0]; }" ::"r"(place())
                     : "memory");
    }
    // Takes its time where it is not.
    __device__ __forceinline__ bool is_over() {
        std::uint32_t over = 0;
#if __CUDA_ARCH__ >= 900
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], 0; selp.u32 %0, 1, 0, p; }"
                     : "=r"(over)
                     : "r"(place())
                     : "memory");
#else
        asm volatile(
            "{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], 0; selp.u32 %0, 1, 0, p; }"
            : "=r"(over)
            : "r"(place())
            : "memory");
        if (over == 0) __nanosleep(200);
#endif
        return over != 0;
    }
#endif

    std::uint64_t barrier_;
};

// body(i) for all i below `count`, which is the same in all lanes: a lane takes lane, lane + 32, ... All
// lanes go round equally often, as far as the compiler is concerned, too.
template <typename Body>
__device__ __forceinline__ void by_lanes(std::uint32_t count, Body body) {
    const std::uint32_t end = uniform(count);
    for (std::uint32_t at = 0; at < end; at += kLanes) {
        if (at + lane_id() < end) body(at + lane_id());
    }
    __syncwarp();
}

// The launch's dynamic shared memory, aligned to 256 bytes; in the emulator to what its size is a multiple
// of.
template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
#ifdef KVCAST_SIMT
    return reinterpret_cast<T*>(simt::dynamic_shared());
#else
    extern __shared__ __align__(256) unsigned char kvcast_shared[];
    return reinterpret_cast<T*>(kvcast_shared);
#endif
}

// The task that item `item` of a launch belongs to: the last of `count` tasks whose items, counted over all
// tasks, begin at or before it. The first one begins at 0.
template <auto First, typename Task>
__device__ std::uint32_t task_of(const Task* tasks, std::uint32_t count, std::uint32_t item) {
    std::uint32_t low = 0;
    for (std::uint32_t high = count; high - low > 1;) {
        const std::uint32_t middle = low + (high - low) / 2;
        (tasks[middle].*First <= item ? low : high) = middle;
    }
    return low;
}

// Where element i of stored bits goes: 4 bytes each for binary32, else 2.
__device__ __forceinline__ void put_bits(std::byte* out, Dtype dtype, std::uint64_t i, std::uint32_t bits) {
    if (dtype == Dtype::kF32) {
        reinterpret_cast<std::uint32_t*>(out)[i] = bits;
    } else {
        reinterpret_cast<std::uint16_t*>(out)[i] = static_cast<std::uint16_t>(bits);
    }
}

// What launches are cut to.
struct DeviceLimits {
    std::uint32_t multiprocessors;
    std::size_t shared_bytes;  // of a block of threads that asks for more than 48 KiB
};
inline cudaError_t device_limits(DeviceLimits& limits) {
    int device = 0, multiprocessors = 0, bytes = 0;
    cudaError_t e = cudaGetDevice(&device);
    if (e == cudaSuccess)
        e = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (e == cudaSuccess) e = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    limits = {static_cast<std::uint32_t>(multiprocessors), static_cast<std::size_t>(bytes)};
    return e;
}

struct Shape {
    std::uint32_t blocks;
    std::uint32_t threads;
    std::size_t shared_bytes = 0;  // beside what the kernel has of its own
};

// Any launch may have so much; more has to be allowed.
constexpr std::size_t kSharedByDefault = 32 << 10;

// Always the same, whatever a launch needs: the allowance is the kernel's, and other threads launch it, too.
template <typename... Parameters>
cudaError_t allow_most_shared(void (*kernel)(Parameters...)) {
    DeviceLimits device = {};
    cudaFuncAttributes own = {};
    cudaError_t e = device_limits(device);
    if (e == cudaSuccess) e = cudaFuncGetAttributes(&own, kernel);
    if (e != cudaSuccess) return e;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(device.shared_bytes - own.sharedSizeBytes));
}

// One launch; nothing where there are no blocks.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), Shape shape, cudaStream_t stream,
                   Arguments&&... arguments) {
    if (shape.blocks == 0) return cudaSuccess;
    if (shape.shared_bytes > kSharedByDefault) {
        if (const cudaError_t e = allow_most_shared(kernel); e != cudaSuccess) return e;
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3{shape.blocks, 1, 1};
    config.blockDim = dim3{shape.threads, 1, 1};
    config.dynamicSmemBytes = shape.shared_bytes;
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

}  // namespace kvcast::kernels::cuda
