// The two things that CUDA and the SIMT emulator spell differently, and the launch that they share.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <utility>

namespace kvcast::kernels::cuda {

// The launch's dynamic shared memory, aligned to 16 bytes.
template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
#ifdef KVCAST_SIMT
    return reinterpret_cast<T*>(simt::dynamic_shared());
#else
    extern __shared__ __align__(16) unsigned char kvcast_shared[];
    return reinterpret_cast<T*>(kvcast_shared);
#endif
}

struct Shape {
    std::uint32_t blocks;
    std::uint32_t threads;
    std::size_t shared_bytes = 0;  // at most 48 KiB
};

// One launch; nothing where there are no blocks.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), Shape shape, cudaStream_t stream,
                   Arguments&&... arguments) {
    if (shape.blocks == 0) return cudaSuccess;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3{shape.blocks, 1, 1};
    config.blockDim = dim3{shape.threads, 1, 1};
    config.dynamicSmemBytes = shape.shared_bytes;
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

}  // namespace kvcast::kernels::cuda
