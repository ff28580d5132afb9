// Device memory for tests of the device API, with two backings: the SIMT emulator's guard pages
// (emulated_memory.cpp), and a GPU (gpu_memory.cpp). The same tests run on both.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace kvcast::test {

// Bytes that end at a guard, or with a pattern on both sides where there are none. They hold 0xa5 at first.
class DeviceBytes {
  public:
    explicit DeviceBytes(std::size_t bytes);
    explicit DeviceBytes(std::span<const std::byte> content);
    ~DeviceBytes();
    DeviceBytes(DeviceBytes&&) noexcept;
    DeviceBytes& operator=(DeviceBytes&&) noexcept;

    std::byte* data() const;  // device
    std::size_t size() const;
    std::vector<std::byte> read() const;
    void forget() const;  // what it holds: 0xa5 again

    // Nothing was written beside them.
    bool intact() const;

  private:
    struct Memory;
    std::unique_ptr<Memory> memory_;
};

template <typename T>
DeviceBytes to_device(std::span<const T> items) {
    return DeviceBytes(std::as_bytes(items));
}

// Waits for the device. What the emulator or the device found wrong with the launches since, if anything.
std::string finish();

// In how many orders threads can be run, and the choice of one.
std::size_t orders();
void set_order(std::size_t order);

}  // namespace kvcast::test
