// The emulated runtime: what is put on streams happens late, in order, and only where it may.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <array>
#include <functional>

namespace simt {
namespace {

class Runtime : public testing::Test {
  protected:
    void SetUp() override {
        cudaMalloc(&device_, sizeof(int));
        cudaStreamCreateWithFlags(&first_, cudaStreamNonBlocking);
        cudaStreamCreateWithFlags(&second_, cudaStreamNonBlocking);
        cudaEventCreateWithFlags(&event_, cudaEventDisableTiming);
    }
    void TearDown() override {
        cudaEventDestroy(event_);
        cudaStreamDestroy(first_);
        cudaStreamDestroy(second_);
        cudaFree(device_);
    }

    cudaError_t up(const int* from, cudaStream_t stream) const {
        return cudaMemcpyAsync(device_, from, sizeof(int), cudaMemcpyHostToDevice, stream);
    }
    cudaError_t down(int* to, cudaStream_t stream) const {
        return cudaMemcpyAsync(to, device_, sizeof(int), cudaMemcpyDeviceToHost, stream);
    }

    void* device_ = nullptr;
    cudaStream_t first_ = nullptr, second_ = nullptr;
    cudaEvent_t event_ = nullptr;
};

TEST_F(Runtime, CopiesWhenSomebodyWaits) {
    int from = 1, to = 0;
    EXPECT_EQ(up(&from, first_), cudaSuccess);
    EXPECT_EQ(down(&to, first_), cudaSuccess);
    from = 2;  // too early
    EXPECT_EQ(to, 0);
    EXPECT_EQ(cudaStreamSynchronize(first_), cudaSuccess);
    EXPECT_EQ(to, 2);
}

TEST_F(Runtime, DestroyingAStreamDoesNotWait) {
    int from = 1, to = 0;
    cudaStream_t stream = nullptr;
    cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    up(&from, stream);
    down(&to, stream);
    cudaStreamDestroy(stream);
    from = 2;
    EXPECT_EQ(to, 0);
    void* other = nullptr;
    cudaMalloc(&other, 1);
    cudaFree(other);
    EXPECT_EQ(to, 2);
}

TEST_F(Runtime, KeepsStreamsInOrderByEventsOnly) {
    const int from = 7;
    int early = 0, late = 0;
    up(&from, first_);
    cudaEventRecord(event_, first_);
    down(&early, second_);
    cudaStreamWaitEvent(second_, event_, 0);
    down(&late, second_);
    EXPECT_EQ(cudaStreamSynchronize(second_), cudaSuccess);
    EXPECT_NE(early, 7);
    EXPECT_EQ(late, 7);
}

TEST_F(Runtime, WaitsForAnEventAndNoFurther) {
    const int from = 3, next = 4;
    int to = 0;
    up(&from, first_);
    cudaEventRecord(event_, first_);
    up(&next, first_);
    EXPECT_EQ(cudaEventSynchronize(event_), cudaSuccess);
    down(&to, nullptr);  // at once
    EXPECT_EQ(to, 3);
    cudaStreamSynchronize(first_);  // what is left reads `next`
}

TEST_F(Runtime, RefusesCopiesBetweenOtherPlacesThanTheySay) {
    int here = 0;
    EXPECT_EQ(cudaMemcpyAsync(&here, &here, 1, cudaMemcpyHostToDevice, first_), cudaErrorInvalidValue);
    EXPECT_EQ(cudaMemcpyAsync(device_, device_, 1, cudaMemcpyHostToDevice, first_), cudaErrorInvalidValue);
    EXPECT_EQ(cudaMemcpyAsync(&here, &here, 1, cudaMemcpyDeviceToHost, first_), cudaErrorInvalidValue);
    EXPECT_EQ(cudaMemcpyAsync(device_, &here, 1000, cudaMemcpyHostToDevice, first_), cudaErrorInvalidValue);
}

TEST_F(Runtime, CopiesRowsOfOtherPitches) {
    const std::array<char, 6> from = {'a', 'b', '-', 'c', 'd', '-'};
    std::array<char, 4> to = {};
    cudaMemcpy2DAsync(device_, 2, from.data(), 3, 2, 2, cudaMemcpyHostToDevice, first_);
    cudaMemcpyAsync(to.data(), device_, 4, cudaMemcpyDeviceToHost, first_);
    cudaStreamSynchronize(first_);
    EXPECT_EQ(std::string(to.data(), 4), "abcd");
}

void never_meets(int* at) {
    if (threadIdx.x == 0) __syncwarp();
    if (threadIdx.x == 1) *at = 1;
}

TEST_F(Runtime, TellsOfALaunchThatFailedWhenItIsWaitedFor) {
    cudaLaunchConfig_t config = {};
    config.blockDim = {32, 1, 1};
    config.stream = first_;
    EXPECT_EQ(cudaLaunchKernelEx(&config, never_meets, static_cast<int*>(device_)), cudaSuccess);
    EXPECT_EQ(cudaStreamSynchronize(first_), cudaErrorLaunchFailure);
    EXPECT_NE(take_failure(), "");
    EXPECT_EQ(cudaStreamSynchronize(first_), cudaSuccess);
}

TEST_F(Runtime, CapturesAStreamAndRunsWhatCameAsOftenAsItIsLaunched) {
    int from = 1, to = 0;
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    EXPECT_EQ(cudaStreamBeginCapture(first_, cudaStreamCaptureModeGlobal), cudaSuccess);
    EXPECT_EQ(up(&from, first_), cudaSuccess);
    EXPECT_EQ(down(&to, first_), cudaSuccess);
    EXPECT_EQ(cudaStreamEndCapture(first_, &graph), cudaSuccess);
    EXPECT_EQ(cudaStreamSynchronize(first_), cudaSuccess);
    EXPECT_EQ(to, 0);
    EXPECT_EQ(cudaGraphInstantiate(&executable, graph, 0), cudaSuccess);
    EXPECT_EQ(cudaGraphDestroy(graph), cudaSuccess);
    for (from = 1; from < 3; ++from) {
        EXPECT_EQ(cudaGraphLaunch(executable, second_), cudaSuccess);
        EXPECT_EQ(cudaStreamSynchronize(second_), cudaSuccess);
        EXPECT_EQ(to, from);
    }
    EXPECT_EQ(cudaGraphExecDestroy(executable), cudaSuccess);
}

TEST_F(Runtime, RefusesWhileAStreamIsCapturedWhatWouldNotBeInTheGraph) {
    const auto spoils = [&](const std::function<cudaError_t()>& call) {
        cudaGraph_t graph = nullptr;
        EXPECT_EQ(cudaStreamBeginCapture(first_, cudaStreamCaptureModeGlobal), cudaSuccess);
        const bool refused = call() != cudaSuccess;
        const bool spoilt = cudaStreamEndCapture(first_, &graph) == cudaErrorStreamCaptureInvalidated;
        EXPECT_EQ(refused, spoilt);
        cudaGraphDestroy(graph);
        return spoilt;
    };
    void* memory = nullptr;
    int value = 0;
    EXPECT_TRUE(spoils([&] { return cudaMalloc(&memory, 16); }));
    EXPECT_TRUE(spoils([&] { return cudaMallocHost(&memory, 16); }));
    EXPECT_TRUE(spoils([&] { return cudaFree(device_); }));
    EXPECT_TRUE(spoils([&] { return cudaStreamSynchronize(first_); }));
    EXPECT_TRUE(spoils([&] { return cudaStreamSynchronize(second_); }));
    EXPECT_TRUE(spoils([&] { return cudaEventSynchronize(event_); }));
    EXPECT_TRUE(spoils([&] { return up(&value, nullptr); }));
    EXPECT_TRUE(spoils([&] { return cudaEventRecord(event_, first_); }));
    EXPECT_FALSE(spoils([&] { return up(&value, second_); }));
    EXPECT_EQ(cudaStreamSynchronize(first_), cudaSuccess);
    EXPECT_EQ(cudaStreamSynchronize(second_), cudaSuccess);
}

TEST_F(Runtime, HasNoMoreMemoryThanItIsGiven) {
    set_device_limit(1024);
    void* more = nullptr;
    EXPECT_EQ(cudaMalloc(&more, 4096), cudaErrorMemoryAllocation);
    set_device_limit(~std::size_t{0});
    EXPECT_EQ(cudaMalloc(&more, 4096), cudaSuccess);
    EXPECT_EQ(cudaFree(more), cudaSuccess);
    EXPECT_EQ(cudaFree(&more), cudaErrorInvalidValue);
}

}  // namespace
}  // namespace simt
