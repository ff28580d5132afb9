#include <optional>

#include "codec/device.h"
#include "codec/device/coder.h"
#include "codec/device/image.h"
#include "codec/device/memory.h"

namespace kvcast::device {

struct DeviceEncoder::State {
    State(EncodeOptions o, int on, Stream s) : options(std::move(o)), device(on), stream(std::move(s)) {}

    Status load_calibration();
    Status run(const ChunkInput& input, std::vector<std::uint8_t>& object, Hash& chain);
    Status upload(const ChunkInput& input);
    Status launch(const EncodePlan& plan);

    EncodeOptions options;
    int device;
    std::optional<CalibrationImage> calibration;
    std::optional<AnalysisImage> analysis;
    DeviceMemory calibration_bytes, analysis_bytes;
    DeviceMemory rows, image, workspace, report, payload;
    std::vector<DevicePlane> planes;  // of the chunk, in rows
    std::vector<std::byte> host_report;
    std::vector<std::uint8_t> host_payload;
    Stream stream;  // last: ends before the memory that it uses
};

Status DeviceEncoder::State::load_calibration() {
    if (options.profile != Profile::kKlt) return {};
    if (options.calibration == nullptr)
        return {ErrorCode::kMissingCalibration, "the klt profile needs a calibration, none was given"};
    auto inverted = AnalysisImage::make(options.calibration);
    if (!inverted.ok()) return inverted.status();
    analysis.emplace(std::move(inverted.value()));
    calibration.emplace(options.calibration);
    if (Status s = calibration_bytes.reserve(calibration->bytes().size()); !s.ok()) return s;
    if (Status s = analysis_bytes.reserve(analysis->bytes().size()); !s.ok()) return s;
    Status s = stream.copy(calibration_bytes.data(), calibration->bytes().data(), calibration->bytes().size(),
                           cudaMemcpyHostToDevice);
    if (!s.ok()) return s;
    s = stream.copy(analysis_bytes.data(), analysis->bytes().data(), analysis->bytes().size(),
                    cudaMemcpyHostToDevice);
    return s.ok() ? stream.wait() : s;
}

// The chunk's rows, contiguous on the device.
Status DeviceEncoder::State::upload(const ChunkInput& input) {
    const Layout& layout = *input.layout;
    const std::size_t tokens = input.token_ids.size();
    std::size_t bytes = 0;
    for (std::size_t i = 0; i < input.planes.size(); ++i)
        bytes += round_up(tokens * layout.row_bytes(i), kAlignment);
    if (Status s = rows.reserve(bytes); !s.ok()) return s;
    planes.clear();
    std::byte* to = rows.data();
    for (std::size_t i = 0; i < input.planes.size(); ++i) {
        const PlaneRows& from = input.planes[i];
        const cudaError_t e =
            cudaMemcpy2DAsync(to, layout.row_bytes(i), from.rows, from.row_bytes, layout.row_bytes(i), tokens,
                              cudaMemcpyHostToDevice, stream.get());
        if (e != cudaSuccess) return device_status(e, "copying planes");
        planes.push_back({.rows = to, .row_bytes = layout.row_bytes(i)});
        to += round_up(tokens * layout.row_bytes(i), kAlignment);
    }
    return {};
}

Status DeviceEncoder::State::launch(const EncodePlan& plan) {
    if (Status s = image.reserve(plan.image().size()); !s.ok()) return s;
    if (Status s = workspace.reserve(plan.workspace_bytes()); !s.ok()) return s;
    if (Status s = report.reserve(plan.report_bytes()); !s.ok()) return s;
    Status s = stream.copy(image.data(), plan.image().data(), plan.image().size(), cudaMemcpyHostToDevice);
    if (!s.ok()) return s;
    s = device_status(encode_batch(plan, image.data(), workspace.data(), report.data(), stream.get()),
                      "encoding");
    if (!s.ok()) return s;
    host_report.resize(plan.report_bytes());
    return stream.copy(host_report.data(), report.data(), host_report.size(), cudaMemcpyDeviceToHost);
}

Status DeviceEncoder::State::run(const ChunkInput& input, std::vector<std::uint8_t>& object, Hash& chain) {
    const auto most = EncodePlan::greatest_payload(input, options);
    if (!most.ok()) return most.status();
    if (Status s = payload.reserve(most.value()); !s.ok()) return s;
    if (Status s = upload(input); !s.ok()) return s;
    const ChunkToEncode chunk = {input, planes, payload.data(), payload.size()};
    KltOnDevice klt = {};
    if (calibration) klt = {&*calibration, calibration_bytes.data(), &*analysis, analysis_bytes.data()};
    const auto made = EncodePlan::make({&chunk, 1}, options, klt);
    if (!made.ok()) return made.status();
    if (Status s = launch(made.value()); !s.ok()) return s;
    if (Status s = stream.wait(); !s.ok()) return s;
    host_payload.resize(made.value().payload_bytes(0, host_report));
    Status s = stream.copy(host_payload.data(), payload.data(), host_payload.size(), cudaMemcpyDeviceToHost);
    if (s.ok()) s = stream.wait();
    if (!s.ok()) return s;
    auto written = made.value().object(0, host_report, host_payload);
    if (!written.ok()) return written.status();
    object = std::move(written.value());
    chain = made.value().chain(0);
    return {};
}

DeviceEncoder::DeviceEncoder(std::unique_ptr<State> state) : state_(std::move(state)) {}
DeviceEncoder::~DeviceEncoder() {
    if (!state_) return;
    const OnDevice scope(state_->device);
    state_.reset();
}
DeviceEncoder::DeviceEncoder(DeviceEncoder&&) noexcept = default;
DeviceEncoder& DeviceEncoder::operator=(DeviceEncoder&& other) noexcept {
    state_.swap(other.state_);
    return *this;
}

Result<DeviceEncoder> DeviceEncoder::open(EncodeOptions options) {
    if (Status s = require_device(); !s.ok()) return s;
    const auto device = current_device();
    if (!device.ok()) return device.status();
    auto stream = Stream::make();
    if (!stream.ok()) return stream.status();
    auto state = std::make_unique<State>(std::move(options), device.value(), std::move(stream.value()));
    if (Status s = state->load_calibration(); !s.ok()) return s;
    return DeviceEncoder(std::move(state));
}

Status DeviceEncoder::encode(const ChunkInput& input, std::vector<std::uint8_t>& object, Hash& chain) {
    const OnDevice scope(state_->device);
    Status s = state_->run(input, object, chain);
    // Whatever failed, nothing may be under way when the caller's planes go.
    Status waited = state_->stream.wait();
    return s.ok() ? waited : s;
}

}  // namespace kvcast::device
