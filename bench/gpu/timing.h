// Device memory, streams and graphs with owners, and the time that a graph takes.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <span>
#include <utility>
#include <vector>

namespace kvcast::bench {

// Throws tools::Error where a call of the runtime failed.
void check(cudaError_t error);

class Stream {
  public:
    Stream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
    ~Stream() { cudaStreamDestroy(stream_); }
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;

    cudaStream_t get() const { return stream_; }
    void wait() const { check(cudaStreamSynchronize(stream_)); }

  private:
    cudaStream_t stream_ = nullptr;
};

class DeviceBuffer {
  public:
    explicit DeviceBuffer(std::size_t bytes) : bytes_(bytes) {
        check(cudaMalloc(&data_, std::max<std::size_t>(bytes, 1)));
    }
    explicit DeviceBuffer(std::span<const std::byte> content) : DeviceBuffer(content.size()) {
        check(cudaMemcpy(data_, content.data(), content.size(), cudaMemcpyHostToDevice));
    }
    ~DeviceBuffer() { cudaFree(data_); }
    DeviceBuffer(DeviceBuffer&& other) noexcept
        : data_(std::exchange(other.data_, nullptr)), bytes_(other.bytes_) {}
    DeviceBuffer& operator=(DeviceBuffer&&) = delete;

    void* data() const { return data_; }
    std::size_t size() const { return bytes_; }
    std::vector<std::byte> read() const {
        std::vector<std::byte> out(bytes_);
        check(cudaMemcpy(out.data(), data_, bytes_, cudaMemcpyDeviceToHost));
        return out;
    }

    // Overwrites what is there.
    void forget(const Stream& stream) const { check(cudaMemsetAsync(data_, 0xa5, bytes_, stream.get())); }

  private:
    void* data_ = nullptr;
    std::size_t bytes_;
};

class Graph {
  public:
    // What `work` puts on the stream.
    template <typename Work>
    Graph(const Stream& stream, Work&& work) {
        cudaGraph_t graph = nullptr;
        check(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeGlobal));
        work();
        check(cudaStreamEndCapture(stream.get(), &graph));
        check(cudaGraphInstantiate(&executable_, graph, 0));
        check(cudaGraphDestroy(graph));
    }
    ~Graph() { cudaGraphExecDestroy(executable_); }
    Graph(const Graph&) = delete;
    Graph& operator=(const Graph&) = delete;

    void launch(const Stream& stream) const { check(cudaGraphLaunch(executable_, stream.get())); }

  private:
    cudaGraphExec_t executable_ = nullptr;
};

struct Times {
    double median = 0;  // seconds
    double least = 0;
};

// Of so many launches, after a few that do not count.
Times time(const Stream& stream, const Graph& graph, unsigned repetitions);

// A copy of `bytes` bytes on the device.
Times time_memcpy(const Stream& stream, std::size_t bytes, unsigned repetitions);

}  // namespace kvcast::bench
