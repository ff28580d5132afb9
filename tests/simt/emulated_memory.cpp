#include "tests/simt/device_memory.h"
#include "tests/simt/simt.h"

namespace kvcast::test {

struct DeviceBytes::Memory {
    simt::GuardedBytes bytes;
};

DeviceBytes::DeviceBytes(std::size_t bytes) : memory_(new Memory{simt::GuardedBytes(bytes)}) {}
DeviceBytes::DeviceBytes(std::span<const std::byte> content) : DeviceBytes(content.size()) {
    std::copy(content.begin(), content.end(), data());
}
DeviceBytes::~DeviceBytes() = default;
DeviceBytes::DeviceBytes(DeviceBytes&&) noexcept = default;
DeviceBytes& DeviceBytes::operator=(DeviceBytes&&) noexcept = default;

std::byte* DeviceBytes::data() const {
    return memory_->bytes.data();
}
std::size_t DeviceBytes::size() const {
    return memory_->bytes.size();
}
std::vector<std::byte> DeviceBytes::read() const {
    return {data(), data() + size()};
}
void DeviceBytes::forget() const {
    std::fill_n(data(), size(), std::byte{0xa5});
}
bool DeviceBytes::intact() const {
    return memory_->bytes.intact();
}

std::string finish() {
    return simt::take_failure();
}

std::size_t orders() {
    return KVCAST_ORDERS;
}
void set_order(std::size_t order) {
    simt::set_schedule(static_cast<simt::Schedule>(order));
}

}  // namespace kvcast::test
