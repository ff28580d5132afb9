#include "bench/gpu/timing.h"

#include <fmt/format.h>

#include "tools/common/file.h"

namespace kvcast::bench {
namespace {

constexpr unsigned kWarmUps = 3;

}  // namespace

void check(cudaError_t error) {
    if (error != cudaSuccess) throw tools::Error(fmt::format("CUDA: {}", cudaGetErrorString(error)));
}

Times time(const Stream& stream, const Graph& graph, unsigned repetitions) {
    cudaEvent_t begin = nullptr, end = nullptr;
    check(cudaEventCreate(&begin));
    check(cudaEventCreate(&end));
    std::vector<double> seconds;
    for (unsigned i = 0; i < kWarmUps + repetitions; ++i) {
        check(cudaEventRecord(begin, stream.get()));
        graph.launch(stream);
        check(cudaEventRecord(end, stream.get()));
        check(cudaEventSynchronize(end));
        float ms = 0;
        check(cudaEventElapsedTime(&ms, begin, end));
        if (i >= kWarmUps) seconds.push_back(static_cast<double>(ms) / 1000);
    }
    check(cudaEventDestroy(begin));
    check(cudaEventDestroy(end));
    std::sort(seconds.begin(), seconds.end());
    return {seconds[seconds.size() / 2], seconds.front()};
}

Times time_memcpy(const Stream& stream, std::size_t bytes, unsigned repetitions) {
    const DeviceBuffer from(bytes), to(bytes);
    const Graph graph(stream, [&] {
        check(cudaMemcpyAsync(to.data(), from.data(), bytes, cudaMemcpyDeviceToDevice, stream.get()));
    });
    return time(stream, graph, repetitions);
}

}  // namespace kvcast::bench
