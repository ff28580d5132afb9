// CUDA's names, as far as the kernels use them, on the SIMT emulator (tests/simt/simt.h). A kernel source
// that includes <cuda_runtime.h> is compiled by a host compiler with this folder in front of its include
// path.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>

#include "tests/simt/runtime.h"
#include "tests/simt/simt.h"

// NOLINTBEGIN(bugprone-reserved-identifier): the names are CUDA's.
#define KVCAST_SIMT 1

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("simt_shared")))

using simt::blockDim;
using simt::blockIdx;
using simt::gridDim;
using simt::threadIdx;

#define SIMT_PLACE ::simt::Place place = {__builtin_FILE(), __builtin_LINE()}

// ---- warps

namespace simt {

template <typename T>
std::uint64_t to_payload(T value) {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
    std::uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    return bits;
}

template <typename T>
T shuffle(unsigned mask, T value, unsigned source, Place place) {
    const std::uint64_t bits = meet_warp(Primitive::kShuffle, mask, to_payload(value), source, place);
    T out;
    std::memcpy(&out, &bits, sizeof(T));
    return out;
}

}  // namespace simt

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, SIMT_PLACE) {
    const unsigned segment = ::simt::lane() & ~static_cast<unsigned>(width - 1);
    return ::simt::shuffle(
        mask, value, segment | (static_cast<unsigned>(source) & static_cast<unsigned>(width - 1)), place);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_PLACE) {
    const unsigned within = ::simt::lane() & static_cast<unsigned>(width - 1);
    return ::simt::shuffle(mask, value, ::simt::lane() - (within >= delta ? delta : 0), place);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_PLACE) {
    const unsigned within = ::simt::lane() & static_cast<unsigned>(width - 1);
    return ::simt::shuffle(
        mask, value, ::simt::lane() + (within + delta < static_cast<unsigned>(width) ? delta : 0), place);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, SIMT_PLACE) {
    const unsigned other = ::simt::lane() ^ static_cast<unsigned>(bits);
    const bool inside =
        (other & ~static_cast<unsigned>(width - 1)) <= (::simt::lane() & ~static_cast<unsigned>(width - 1));
    return ::simt::shuffle(mask, value, inside ? other : ::simt::lane(), place);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, SIMT_PLACE) {
    return static_cast<unsigned>(
        ::simt::meet_warp(::simt::Primitive::kBallot, mask, predicate != 0, 0, place));
}
inline int __all_sync(unsigned mask, int predicate, SIMT_PLACE) {
    return static_cast<int>(::simt::meet_warp(::simt::Primitive::kAll, mask, predicate != 0, 0, place));
}
inline int __any_sync(unsigned mask, int predicate, SIMT_PLACE) {
    return static_cast<int>(::simt::meet_warp(::simt::Primitive::kAny, mask, predicate != 0, 0, place));
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value, SIMT_PLACE) {
    return static_cast<unsigned>(::simt::meet_warp(::simt::Primitive::kReduceAdd, mask, value, 0, place));
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value, SIMT_PLACE) {
    return static_cast<unsigned>(::simt::meet_warp(::simt::Primitive::kReduceMax, mask, value, 0, place));
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value, SIMT_PLACE) {
    return static_cast<unsigned>(::simt::meet_warp(::simt::Primitive::kReduceMin, mask, value, 0, place));
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value, SIMT_PLACE) {
    return static_cast<unsigned>(::simt::meet_warp(::simt::Primitive::kReduceOr, mask, value, 0, place));
}
inline void __syncwarp(unsigned mask = 0xffffffffu, SIMT_PLACE) {
    ::simt::meet_warp(::simt::Primitive::kSyncWarp, mask, 0, 0, place);
}

inline void simt_mma_m16n8k32(std::int32_t (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                              bool signed_a, bool signed_b, SIMT_PLACE) {
    ::simt::multiply_matrices(d, a, b, signed_a, signed_b, place);
}

// ---- blocks

inline void __syncthreads(SIMT_PLACE) {
    ::simt::meet_block(::simt::Primitive::kSyncBlock, 0, place);
}
inline int __syncthreads_or(int predicate, SIMT_PLACE) {
    return static_cast<int>(::simt::meet_block(::simt::Primitive::kSyncBlockOr, predicate != 0, place));
}
inline int __syncthreads_and(int predicate, SIMT_PLACE) {
    return static_cast<int>(::simt::meet_block(::simt::Primitive::kSyncBlockAnd, predicate != 0, place));
}
inline int __syncthreads_count(int predicate, SIMT_PLACE) {
    return static_cast<int>(::simt::meet_block(::simt::Primitive::kSyncBlockCount, predicate != 0, place));
}
inline void simt_barrier_sync(unsigned barrier, unsigned threads, SIMT_PLACE) {
    ::simt::meet_some(barrier, threads, place);
}
inline void simt_barrier_arrive(unsigned barrier, unsigned threads) {
    ::simt::arrive(barrier, threads);
}
inline void simt_copy_async(void* to, const void* from, std::size_t bytes) {
    ::simt::copy_async(to, from, bytes);
}
inline void simt_commit_copies() {
    ::simt::commit_copies();
}
inline void simt_wait_copies(unsigned open_groups) {
    ::simt::wait_copies(open_groups);
}
inline void simt_mbarrier_init(void* at, unsigned count) {
    ::simt::make_barrier(at, count);
}
inline void simt_mbarrier_arrive(void* at) {
    ::simt::arrive_at(at);
}
// True, later at the latest.
inline bool simt_mbarrier_try_wait(void* at, unsigned parity, SIMT_PLACE) {
    ::simt::wait_at(at, parity, place);
    return true;
}

// ---- bits and loads

inline int __popc(unsigned x) {
    return std::popcount(x);
}
inline int __popcll(unsigned long long x) {
    return std::popcount(x);
}
inline int __clz(int x) {
    return std::countl_zero(static_cast<unsigned>(x));
}
// Bytes of y and x, 0 to 7 from x's lowest on, as the selector's nibbles name them.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const std::uint64_t both = std::uint64_t{y} << 32 | x;
    unsigned out = 0;
    for (unsigned i = 0; i < 4; ++i)
        out |= static_cast<unsigned>(both >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
    return out;
}
// The upper word of high:low, shifted.
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>((std::uint64_t{high} << 32 | low) << (shift & 31) >> 32);
}
inline int __ffs(int x) {
    return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1;
}
inline float __fmaf_rn(float a, float b, float c) {
    return std::fma(a, b, c);
}
template <typename T>
T __ldg(const T* p) {
    return *p;
}
[[noreturn]] inline void __trap() {
    ::simt::fail("__trap");
}

// ---- atomics: they order nothing else

namespace simt {

template <typename T, typename Next>
T change(T* at, Next next) {
    const std::atomic_ref<T> shared(*at);
    T old = shared.load(std::memory_order_relaxed);
    while (!shared.compare_exchange_weak(old, next(old), std::memory_order_relaxed)) {
    }
    return old;
}

}  // namespace simt

template <typename T>
T atomicAdd(T* at, T value) {
    return ::simt::change(at, [=](T old) { return static_cast<T>(old + value); });
}
template <typename T>
T atomicMax(T* at, T value) {
    return ::simt::change(at, [=](T old) { return std::max(old, value); });
}
template <typename T>
T atomicMin(T* at, T value) {
    return ::simt::change(at, [=](T old) { return std::min(old, value); });
}
template <typename T>
T atomicOr(T* at, T value) {
    return ::simt::change(at, [=](T old) { return static_cast<T>(old | value); });
}
template <typename T>
T atomicAnd(T* at, T value) {
    return ::simt::change(at, [=](T old) { return static_cast<T>(old & value); });
}
template <typename T>
T atomicExch(T* at, T value) {
    return ::simt::change(at, [=](T) { return value; });
}
template <typename T>
T atomicCAS(T* at, T expected, T value) {
    return ::simt::change(at, [=](T old) { return old == expected ? value : old; });
}

// ---- the runtime

struct alignas(8) int2 {
    int x, y;
};

struct alignas(8) uint2 {
    unsigned x, y;
};

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

using cudaStream_t = struct CUstream_st*;
using cudaEvent_t = struct CUevent_st*;
using cudaGraph_t = struct CUgraph_st*;
using cudaGraphExec_t = struct CUgraph_st*;

enum cudaError_t : int {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorNoDevice = 100,
    cudaErrorLaunchFailure = 719,
    cudaErrorStreamCaptureUnsupported = 900,
    cudaErrorStreamCaptureInvalidated = 901,
    cudaErrorStreamCaptureImplicit = 906
};
enum cudaMemcpyKind : int {
    cudaMemcpyHostToDevice = 1,
    cudaMemcpyDeviceToHost = 2,
    cudaMemcpyDeviceToDevice = 3
};

inline constexpr unsigned cudaStreamNonBlocking = 1;
inline constexpr unsigned cudaEventDisableTiming = 2;

struct cudaLaunchAttribute {};

struct cudaLaunchConfig_t {
    dim3 gridDim;
    dim3 blockDim;
    std::size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
    cudaLaunchAttribute* attrs = nullptr;
    unsigned numAttrs = 0;
};

namespace simt {

// At once, or when the stream gets there.
inline cudaError_t perform(cudaStream_t stream, std::function<bool()> work) {
    if (stream == nullptr) {
        if (!outside_capture()) return cudaErrorStreamCaptureImplicit;
        return work() ? cudaSuccess : cudaErrorLaunchFailure;
    }
    enqueue(stream, std::move(work));
    return cudaSuccess;
}

inline bool right_places(const void* to, std::size_t to_bytes, const void* from, std::size_t from_bytes,
                         cudaMemcpyKind kind) {
    const bool to_device = kind != cudaMemcpyDeviceToHost, from_device = kind != cudaMemcpyHostToDevice;
    return (to_device ? on_device(to, to_bytes) : on_host(to, to_bytes)) &&
           (from_device ? on_device(from, from_bytes) : on_host(from, from_bytes));
}

}  // namespace simt

// As CUDA's own: arguments are converted to the kernel's parameters here. What the emulator finds wrong is
// kept for simt::take_failure().
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
    const std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
    const dim3 g = config->gridDim, b = config->blockDim;
    return ::simt::perform(config->stream, [=, shared_bytes = config->dynamicSmemBytes] {
        auto failure = ::simt::launch(
            {g.x, g.y, g.z}, {b.x, b.y, b.z}, shared_bytes, [&] { std::apply(kernel, values); },
            reinterpret_cast<const void*>(kernel));
        if (failure) ::simt::record_failure(std::move(*failure));
        return !failure;
    });
}
enum cudaFuncAttribute : int { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int value) {
    return ::simt::allow_shared(reinterpret_cast<const void*>(kernel), static_cast<std::size_t>(value))
               ? cudaSuccess
               : cudaErrorInvalidValue;
}
// There is no driver below this runtime.
enum cudaDriverEntryPointQueryResult : int { cudaDriverEntryPointSymbolNotFound = 1 };
enum : unsigned long long { cudaEnableDefault = 0 };
inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** entry, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* found) {
    *entry = nullptr;
    *found = cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}
inline cudaError_t cudaGetLastError() {
    return cudaSuccess;
}
struct cudaFuncAttributes {
    std::size_t sharedSizeBytes;
};
// Shared memory of a kernel's own is memory of the program here.
template <typename... Parameters>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)(Parameters...)) {
    attributes->sharedSizeBytes = 0;
    return cudaSuccess;
}
enum cudaDeviceAttr : int {
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount ? static_cast<int>(::simt::multiprocessors())
                                                         : static_cast<int>(::simt::most_shared());
    return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* at, int value, std::size_t bytes, cudaStream_t stream) {
    return ::simt::perform(stream, [=] { return std::memset(at, value, bytes) != nullptr; });
}
inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess                 ? "no error"
           : error == cudaErrorMemoryAllocation ? "out of memory"
           : error == cudaErrorNoDevice         ? "no CUDA-capable device is detected"
           : error == cudaErrorInvalidValue     ? "invalid argument"
           : error == cudaErrorStreamCaptureUnsupported || error == cudaErrorStreamCaptureImplicit
               ? "operation not permitted when stream is capturing"
           : error == cudaErrorStreamCaptureInvalidated
               ? "operation failed due to a previous error during capture"
               : "failure in the emulator";
}

inline cudaError_t cudaGetDeviceCount(int* count) {
    *count = ::simt::devices();
    return *count == 0 ? cudaErrorNoDevice : cudaSuccess;
}
struct cudaDeviceProp {
    char name[256];
    int major, minor;
    int multiProcessorCount;
};
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
    *properties = {"SIMT emulator", 0, 0, static_cast<int>(::simt::multiprocessors())};
    return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
    *version = 0;
    return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) {
    *version = 0;
    return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
    return device < ::simt::devices() ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaMalloc(void** at, std::size_t bytes) {
    if (!::simt::outside_capture()) return cudaErrorStreamCaptureUnsupported;
    *at = ::simt::allocate(bytes);
    return *at == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}
inline cudaError_t cudaFree(void* at) {
    if (!::simt::outside_capture()) return cudaErrorStreamCaptureUnsupported;
    return at == nullptr || ::simt::release(at) ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaMallocHost(void** at, std::size_t bytes) {
    if (!::simt::outside_capture()) return cudaErrorStreamCaptureUnsupported;
    *at = ::operator new(bytes);
    return cudaSuccess;
}
inline cudaError_t cudaFreeHost(void* at) {
    if (!::simt::outside_capture()) return cudaErrorStreamCaptureUnsupported;
    ::simt::drain_all();
    ::operator delete(at);
    return cudaSuccess;
}
inline cudaError_t cudaMemcpy2DAsync(void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch,
                                     std::size_t width, std::size_t height, cudaMemcpyKind kind,
                                     cudaStream_t stream) {
    if (width > to_pitch || width > from_pitch) return cudaErrorInvalidValue;
    if (width == 0 || height == 0) return cudaSuccess;
    const bool right = ::simt::right_places(to, (height - 1) * to_pitch + width, from,
                                            (height - 1) * from_pitch + width, kind);
    if (!right) return cudaErrorInvalidValue;
    return ::simt::perform(stream, [=] {
        for (std::size_t row = 0; row < height; ++row) {
            std::memcpy(static_cast<std::byte*>(to) + row * to_pitch,
                        static_cast<const std::byte*>(from) + row * from_pitch, width);
        }
        return true;
    });
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                                   cudaStream_t stream) {
    return cudaMemcpy2DAsync(to, bytes, from, bytes, bytes, 1, kind, stream);
}

inline cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) {
    return cudaMemcpyAsync(to, from, bytes, kind, nullptr);
}

inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
    *stream = ::simt::make_stream();
    return cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    ::simt::destroy(stream);
    return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    if (!::simt::outside_capture()) return cudaErrorStreamCaptureUnsupported;
    return ::simt::drain(stream) ? cudaSuccess : cudaErrorLaunchFailure;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    *event = ::simt::make_event();
    return cudaSuccess;
}
inline cudaError_t cudaEventCreate(cudaEvent_t* event) {
    return cudaEventCreateWithFlags(event, 0);
}
// Nothing is said about speed.
inline cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
    *milliseconds = 1;
    return cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
    ::simt::destroy(event);
    return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    if (!::simt::outside_capture(stream)) return cudaErrorStreamCaptureUnsupported;
    ::simt::record(event, stream);
    return cudaSuccess;
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    if (!::simt::outside_capture(stream)) return cudaErrorStreamCaptureUnsupported;
    ::simt::wait(stream, event);
    return cudaSuccess;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    if (!::simt::outside_capture()) return cudaErrorStreamCaptureUnsupported;
    return ::simt::wait(event) ? cudaSuccess : cudaErrorLaunchFailure;
}

enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal };
inline cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    return ::simt::begin_capture(stream) ? cudaSuccess : cudaErrorStreamCaptureUnsupported;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    *graph = ::simt::end_capture(stream);
    return *graph == nullptr ? cudaErrorStreamCaptureInvalidated : cudaSuccess;
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
    *executable = ::simt::copy(graph);
    return cudaSuccess;
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    ::simt::launch(executable, stream);
    return cudaSuccess;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    ::simt::destroy(graph);
    return cudaSuccess;
}
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
    ::simt::destroy(executable);
    return cudaSuccess;
}
// NOLINTEND(bugprone-reserved-identifier)
