// Memory, streams and events of the CUDA device that is current, owned. Nothing throws: what can fail says
// kDevice, with CUDA's own words. One thread at a time per object.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>

#include "codec/format/error.h"

namespace kvcast::device {

// kOk, or kDevice: what was tried, and what CUDA says. The error is taken from the thread, in which the
// caller's own code would find it.
Status device_status(cudaError_t error, const char* what);

// kOk where there is a device that can be used, else kNoDevice.
Status require_device();

// The device that is current in this thread.
Result<int> current_device();

// Makes a device current in this thread, and the one before it at the end, where that was in use.
class OnDevice {
  public:
    explicit OnDevice(int device);
    ~OnDevice();
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

  private:
    int before_ = 0;
    bool restores_ = false;
};

enum class MemoryKind : std::uint8_t { kDevice, kPinned };

// Memory that grows when more is asked for, and never shrinks.
template <MemoryKind Kind>
class Memory {
  public:
    Memory() = default;
    ~Memory() { release(); }
    Memory(Memory&& other) noexcept;
    Memory& operator=(Memory&& other) noexcept;

    // Room for `bytes` bytes at a multiple of 256. Where that is more than before, addresses change and what
    // was there is lost; no work that uses it may be under way.
    Status reserve(std::size_t bytes);

    std::byte* data() const { return data_; }
    std::size_t size() const { return bytes_; }

  private:
    void release();

    std::byte* data_ = nullptr;
    std::size_t bytes_ = 0;
};

using DeviceMemory = Memory<MemoryKind::kDevice>;
using PinnedMemory = Memory<MemoryKind::kPinned>;

class Event;

// A stream that does not wait for the default one. Destroyed, it has done all of its work.
class Stream {
  public:
    static Result<Stream> make();

    cudaStream_t get() const { return stream_.get(); }

    // Blocks until everything on the stream is done.
    Status wait() const;
    // What comes next on the stream comes after the event.
    Status wait_for(const Event& event) const;
    // Either direction, or within the device; host memory stays as it is until then.
    Status copy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) const;
    Status clear(void* at, std::size_t bytes) const;

  private:
    struct Destroy {
        void operator()(cudaStream_t stream) const {
            cudaStreamSynchronize(stream);  // destroying does not wait
            cudaStreamDestroy(stream);
        }
    };
    std::unique_ptr<CUstream_st, Destroy> stream_;
};

class Event {
  public:
    static Result<Event> make();

    cudaEvent_t get() const { return event_.get(); }
    Status record(const Stream& stream) const;
    // Blocks until the stream is past the last record(); at once where there was none.
    Status wait() const;

  private:
    struct Destroy {
        void operator()(cudaEvent_t event) const { cudaEventDestroy(event); }
    };
    std::unique_ptr<CUevent_st, Destroy> event_;
};

}  // namespace kvcast::device
