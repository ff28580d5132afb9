// What codec/device/coder.h is in builds without CUDA.
#include "codec/device/coder.h"

namespace kvcast::device {
// Parameters are those of builds that use them.
// NOLINTBEGIN(performance-unnecessary-value-param)
namespace {

Status no_device() {
    return {
        ErrorCode::kNoDevice,
        "this build of kvcast has no CUDA: configure with -D KVCAST_CUDA=ON, which needs the CUDA toolkit, "
        "12.8 or later"};
}

}  // namespace

struct DeviceEncoder::State {};
struct DeviceDecoder::State {};

DeviceEncoder::DeviceEncoder(std::unique_ptr<State> state) : state_(std::move(state)) {}
DeviceEncoder::~DeviceEncoder() = default;
DeviceEncoder::DeviceEncoder(DeviceEncoder&&) noexcept = default;
DeviceEncoder& DeviceEncoder::operator=(DeviceEncoder&&) noexcept = default;
Result<DeviceEncoder> DeviceEncoder::open(EncodeOptions) {
    return no_device();
}
Status DeviceEncoder::encode(const ChunkInput&, std::vector<std::uint8_t>&, Hash&) {
    return no_device();
}

DeviceDecoder::DeviceDecoder(std::unique_ptr<State> state) : state_(std::move(state)) {}
DeviceDecoder::~DeviceDecoder() = default;
DeviceDecoder::DeviceDecoder(DeviceDecoder&&) noexcept = default;
DeviceDecoder& DeviceDecoder::operator=(DeviceDecoder&&) noexcept = default;
Result<DeviceDecoder> DeviceDecoder::open(DecodeOptions) {
    return no_device();
}
Status DeviceDecoder::set_calibration(std::shared_ptr<const Calibration>) {
    return no_device();
}
Status DeviceDecoder::decode(std::span<const std::uint8_t>, const Placement&) {
    return no_device();
}
Status DeviceDecoder::decode_layers(std::span<const std::uint8_t>, std::size_t, std::size_t,
                                    std::span<const PlaneBuffer>) {
    return no_device();
}

// NOLINTEND(performance-unnecessary-value-param)
}  // namespace kvcast::device
