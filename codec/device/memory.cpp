#include "codec/device/memory.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

namespace kvcast::device {

namespace {

// Making a device current makes a context on it, of some 100 MB: none on one that nobody has used yet.
bool is_in_use(int device) {
    using ContextState = int (*)(int device, unsigned* flags, int* active);
    constexpr unsigned kSince = 12000;
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found = {};
    const cudaError_t e = cudaGetDriverEntryPointByVersion("cuDevicePrimaryCtxGetState", &entry, kSince,
                                                           cudaEnableDefault, &found);
    if (e != cudaSuccess || entry == nullptr) return true;
    unsigned flags = 0;
    int active = 0;
    return reinterpret_cast<ContextState>(entry)(device, &flags, &active) != 0 || active != 0;
}

}  // namespace

Status device_status(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return {};
    cudaGetLastError();
    return {ErrorCode::kDevice, fmt::format("{}: CUDA says: {}", what, cudaGetErrorString(error))};
}

Status require_device() {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error == cudaSuccess && count > 0) return {};
    return {ErrorCode::kNoDevice,
            fmt::format("no GPU that CUDA can use was found here: {}",
                        error == cudaSuccess ? "there is none" : cudaGetErrorString(error))};
}

Result<int> current_device() {
    int device = 0;
    Status s = device_status(cudaGetDevice(&device), "asking for the current device");
    if (!s.ok()) return s;
    return device;
}

OnDevice::OnDevice(int device) {
    if (cudaGetDevice(&before_) == cudaSuccess && before_ == device) return;
    restores_ = is_in_use(before_);
    cudaSetDevice(device);  // where it fails, so does what comes next, and says so
}

OnDevice::~OnDevice() {
    if (restores_) cudaSetDevice(before_);
}

template <MemoryKind Kind>
Memory<Kind>::Memory(Memory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

template <MemoryKind Kind>
Memory<Kind>& Memory<Kind>::operator=(Memory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
}

template <MemoryKind Kind>
void Memory<Kind>::release() {
    if (data_ == nullptr) return;
    Kind == MemoryKind::kDevice ? cudaFree(data_) : cudaFreeHost(data_);
    data_ = nullptr;
    bytes_ = 0;
}

template <MemoryKind Kind>
Status Memory<Kind>::reserve(std::size_t bytes) {
    bytes = std::max<std::size_t>(bytes, 1);
    if (bytes <= bytes_) return {};
    release();
    void* data = nullptr;
    const cudaError_t error =
        Kind == MemoryKind::kDevice ? cudaMalloc(&data, bytes) : cudaMallocHost(&data, bytes);
    if (error != cudaSuccess) return device_status(error, fmt::format("allocating {} bytes", bytes).c_str());
    data_ = static_cast<std::byte*>(data);
    bytes_ = bytes;
    return {};
}

template class Memory<MemoryKind::kDevice>;
template class Memory<MemoryKind::kPinned>;

Result<Stream> Stream::make() {
    cudaStream_t stream = nullptr;
    Status s = device_status(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "making a stream");
    if (!s.ok()) return s;
    Stream made;
    made.stream_.reset(stream);
    return made;
}

Status Stream::wait() const {
    return device_status(cudaStreamSynchronize(get()), "waiting for the device");
}

Status Stream::wait_for(const Event& event) const {
    return device_status(cudaStreamWaitEvent(get(), event.get(), 0), "waiting for an event");
}

Status Stream::copy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) const {
    if (bytes == 0) return {};
    return device_status(cudaMemcpyAsync(to, from, bytes, kind, get()), "copying");
}

Status Stream::clear(void* at, std::size_t bytes) const {
    if (bytes == 0) return {};
    return device_status(cudaMemsetAsync(at, 0, bytes, get()), "clearing");
}

Result<Event> Event::make() {
    cudaEvent_t event = nullptr;
    Status s = device_status(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "making an event");
    if (!s.ok()) return s;
    Event made;
    made.event_.reset(event);
    return made;
}

Status Event::record(const Stream& stream) const {
    return device_status(cudaEventRecord(get(), stream.get()), "recording an event");
}

Status Event::wait() const {
    return device_status(cudaEventSynchronize(get()), "waiting for an event");
}

}  // namespace kvcast::device
