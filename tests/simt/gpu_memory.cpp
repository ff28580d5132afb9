#include <cstdio>
#include <cstdlib>

#include "tests/simt/device_memory.h"

namespace kvcast::test {
namespace {

constexpr std::size_t kMargin = 256;
constexpr int kPattern = 0xa5;

void check(cudaError_t error) {
    if (error == cudaSuccess) return;
    std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(error));
    std::exit(1);
}

}  // namespace

struct DeviceBytes::Memory {
    std::byte* begin;
    std::size_t bytes;
};

DeviceBytes::DeviceBytes(std::size_t bytes) : memory_(new Memory{nullptr, bytes}) {
    check(cudaMalloc(reinterpret_cast<void**>(&memory_->begin), bytes + 2 * kMargin));
    check(cudaMemset(memory_->begin, kPattern, bytes + 2 * kMargin));
}
DeviceBytes::DeviceBytes(std::span<const std::byte> content) : DeviceBytes(content.size()) {
    check(cudaMemcpy(data(), content.data(), content.size(), cudaMemcpyHostToDevice));
}
DeviceBytes::~DeviceBytes() {
    if (memory_ != nullptr) cudaFree(memory_->begin);
}
DeviceBytes::DeviceBytes(DeviceBytes&&) noexcept = default;
DeviceBytes& DeviceBytes::operator=(DeviceBytes&&) noexcept = default;

std::byte* DeviceBytes::data() const {
    return memory_->begin + kMargin;
}
std::size_t DeviceBytes::size() const {
    return memory_->bytes;
}
std::vector<std::byte> DeviceBytes::read() const {
    std::vector<std::byte> out(size());
    check(cudaMemcpy(out.data(), data(), size(), cudaMemcpyDeviceToHost));
    return out;
}
void DeviceBytes::forget() const {
    check(cudaMemset(data(), kPattern, size()));
    check(cudaDeviceSynchronize());
}
bool DeviceBytes::intact() const {
    std::vector<std::byte> margins(2 * kMargin);
    check(cudaMemcpy(margins.data(), memory_->begin, kMargin, cudaMemcpyDeviceToHost));
    check(cudaMemcpy(margins.data() + kMargin, data() + size(), kMargin, cudaMemcpyDeviceToHost));
    for (const std::byte b : margins) {
        if (b != std::byte{kPattern}) return false;
    }
    return true;
}

std::string finish() {
    const cudaError_t error = cudaDeviceSynchronize();
    return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

std::size_t orders() {
    return 1;
}
void set_order(std::size_t) {}

}  // namespace kvcast::test
