#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <optional>

#include "codec/device.h"
#include "codec/device/coder.h"
#include "codec/device/image.h"
#include "codec/device/memory.h"

namespace kvcast::device {
namespace {

// Stages that a chunk is cut into: the first bytes are soon on their way, and each stage still fills the
// device.
constexpr std::size_t kStages = 4;

// One of the two pinned buffers.
struct Staging {
    PinnedMemory memory;
    Event copied;  // out of the memory
};

struct Layers {
    std::size_t first;
    std::size_t end;
};

// Layers that have to be decoded for those that are wanted: in the klt profile all before them, and whole
// runs.
Layers needed_layers(const ChunkHeader& h, Layers wanted) {
    if (h.profile != Profile::kKlt) return wanted;
    return {0, std::min(round_up(wanted.end, h.klt.run_layers), h.layout.layers)};
}

// In stages of about as many layers each.
std::vector<Layers> stages_of(const ChunkHeader& h, Layers all) {
    const std::size_t unit = h.profile == Profile::kKlt ? h.klt.run_layers : 1;
    const std::size_t step = std::max(round_up((all.end - all.first + kStages - 1) / kStages, unit), unit);
    std::vector<Layers> stages;
    for (std::size_t first = all.first; first < all.end; first += step)
        stages.push_back({first, std::min(first + step, all.end)});
    return stages;
}

}  // namespace

struct DeviceDecoder::State {
    State(DecodeOptions o, int on, Stream copying, Stream decoding)
        : options(std::move(o)), device(on), copies(std::move(copying)), work(std::move(decoding)) {}

    Status load_calibration();
    Status decode(const ChunkDecoder& chunk, std::span<const std::uint8_t> payload,
                  std::span<const DevicePlane> planes, Layers wanted);
    Status begin(const DecodePlan& plan);
    Status stage(const ChunkDecoder& chunk, std::span<const std::uint8_t> payload, Layers layers,
                 std::size_t verified_end, Staging& buffer);
    Status finish(const DecodePlan& plan, Layers wanted);
    Result<std::vector<DevicePlane>> own_planes(const ChunkDecoder& chunk);
    Status read_back(std::span<const DevicePlane> from, std::span<const PlaneBuffer> to, std::size_t tokens);
    // Nothing is under way any more.
    Status wait() {
        Status copied = copies.wait(), decoded = work.wait();
        return copied.ok() ? decoded : copied;
    }

    DecodeOptions options;
    int device;
    std::optional<CalibrationImage> calibration;
    DeviceMemory calibration_bytes, payload, image, workspace, status, rows;
    PinnedMemory words;
    Staging staging[2];
    Stream copies, work;  // last: they end before the memory that they use
};

Status DeviceDecoder::State::load_calibration() {
    if (options.calibration == nullptr) return {};
    calibration.emplace(options.calibration);
    const auto bytes = calibration->bytes();
    if (Status s = calibration_bytes.reserve(bytes.size()); !s.ok()) return s;
    Status s = copies.copy(calibration_bytes.data(), bytes.data(), bytes.size(), cudaMemcpyHostToDevice);
    return s.ok() ? copies.wait() : s;
}

// What does not depend on the chunk's blocks.
Status DeviceDecoder::State::begin(const DecodePlan& plan) {
    const std::size_t status_bytes = plan.blocks() * sizeof(std::uint32_t);
    if (Status s = image.reserve(plan.image().size()); !s.ok()) return s;
    if (Status s = workspace.reserve(plan.workspace_bytes()); !s.ok()) return s;
    if (Status s = status.reserve(status_bytes); !s.ok()) return s;
    if (Status s = words.reserve(status_bytes); !s.ok()) return s;
    Status s = work.copy(image.data(), plan.image().data(), plan.image().size(), cudaMemcpyHostToDevice);
    if (s.ok()) s = work.clear(status.data(), status_bytes);
    if (!s.ok()) return s;
    return device_status(decode_begin(plan, image.data(), workspace.data(), work.get()), "decoding");
}

// Checks some layers and sets them on their way to the device; work that comes next has them.
Status DeviceDecoder::State::stage(const ChunkDecoder& chunk, std::span<const std::uint8_t> blocks,
                                   Layers layers, std::size_t verified_end, Staging& buffer) {
    std::size_t offset = 0, bytes = 0;
    for (std::size_t l = 0; l < layers.first; ++l) offset += chunk.header().layer_payload_bytes(l);
    for (std::size_t l = layers.first; l < layers.end; ++l) {
        if (l < verified_end) {
            if (Status s = chunk.verify_layer(l); !s.ok()) return s;
        }
        bytes += chunk.header().layer_payload_bytes(l);
    }
    const auto from = blocks.subspan(std::min(offset, blocks.size()));
    bytes = std::min(bytes, from.size());
    if (Status s = buffer.copied.wait(); !s.ok()) return s;
    if (Status s = buffer.memory.reserve(bytes); !s.ok()) return s;
    std::copy_n(reinterpret_cast<const std::byte*>(from.data()), bytes, buffer.memory.data());
    Status s = copies.copy(payload.data() + offset, buffer.memory.data(), bytes, cudaMemcpyHostToDevice);
    if (s.ok()) s = buffer.copied.record(copies);
    return s.ok() ? work.wait_for(buffer.copied) : s;
}

Status DeviceDecoder::State::finish(const DecodePlan& plan, Layers wanted) {
    Status s =
        work.copy(words.data(), status.data(), plan.blocks() * sizeof(std::uint32_t), cudaMemcpyDeviceToHost);
    if (s.ok()) s = work.wait();
    for (std::size_t i = 0; i < plan.blocks() && s.ok(); ++i) {
        std::uint32_t word = 0;
        std::memcpy(&word, words.data() + i * sizeof(word), sizeof(word));
        if (plan.block(i).layer < wanted.end) s = plan.block_status(i, word);
    }
    return s;
}

Status DeviceDecoder::State::decode(const ChunkDecoder& chunk, std::span<const std::uint8_t> blocks,
                                    std::span<const DevicePlane> planes, Layers wanted) {
    const ChunkHeader& h = chunk.header();
    if (Status s = payload.reserve(h.payload_bytes()); !s.ok()) return s;
    const ChunkSource source = {.header = &h,
                                .payload = payload.data(),
                                .payload_bytes = payload.size(),
                                .planes = planes,
                                .dtype = options.dtype,
                                .base_position = options.base_position,
                                .calibration = calibration ? &*calibration : nullptr,
                                .calibration_bytes = calibration_bytes.data()};
    const auto made = DecodePlan::make({&source, 1});
    if (!made.ok()) return made.status();
    const DecodePlan& plan = made.value();
    Status s = begin(plan);
    std::size_t next = 0;
    for (const Layers layers : stages_of(h, needed_layers(h, wanted))) {
        if (s.ok()) s = stage(chunk, blocks, layers, wanted.end, staging[next++ % 2]);
        if (!s.ok()) break;
        s = device_status(
            kvcast::device::decode_layers(plan, layers.first, layers.end, image.data(), workspace.data(),
                                          reinterpret_cast<std::uint32_t*>(status.data()), work.get()),
            "decoding");
    }
    if (s.ok()) s = finish(plan, wanted);
    Status waited = wait();  // whatever failed: the plan's image is read until then
    return s.ok() ? waited : s;
}

// Planes [layer][plane] of the chunk, contiguous in `rows`.
Result<std::vector<DevicePlane>> DeviceDecoder::State::own_planes(const ChunkDecoder& chunk) {
    const Layout& layout = chunk.header().layout;
    std::vector<std::size_t> offsets;
    std::size_t bytes = 0;
    for (std::size_t i = 0; i < layout.layers * layout.planes.size(); ++i) {
        offsets.push_back(bytes);
        bytes += round_up(chunk.header().tokens * layout.row_bytes(i, chunk.dtype()), kAlignment);
    }
    if (Status s = rows.reserve(bytes); !s.ok()) return s;
    std::vector<DevicePlane> planes;
    for (std::size_t i = 0; i < offsets.size(); ++i) {
        planes.push_back({.rows = rows.data() + offsets[i], .row_bytes = layout.row_bytes(i, chunk.dtype())});
    }
    return planes;
}

Status DeviceDecoder::State::read_back(std::span<const DevicePlane> from, std::span<const PlaneBuffer> to,
                                       std::size_t tokens) {
    Status s;
    for (std::size_t i = 0; i < to.size() && s.ok(); ++i) {
        s = device_status(cudaMemcpy2DAsync(to[i].rows, to[i].row_bytes, from[i].rows, from[i].row_bytes,
                                            from[i].row_bytes, tokens, cudaMemcpyDeviceToHost, work.get()),
                          "copying planes");
    }
    Status waited = work.wait();
    return s.ok() ? waited : s;
}

DeviceDecoder::DeviceDecoder(std::unique_ptr<State> state) : state_(std::move(state)) {}
DeviceDecoder::~DeviceDecoder() {
    if (!state_) return;
    const OnDevice scope(state_->device);
    state_.reset();
}
DeviceDecoder::DeviceDecoder(DeviceDecoder&&) noexcept = default;
DeviceDecoder& DeviceDecoder::operator=(DeviceDecoder&& other) noexcept {
    state_.swap(other.state_);
    return *this;
}

Result<DeviceDecoder> DeviceDecoder::open(DecodeOptions options) {
    if (Status s = require_device(); !s.ok()) return s;
    const auto device = current_device();
    if (!device.ok()) return device.status();
    auto copies = Stream::make(), work = Stream::make();
    auto first = Event::make(), second = Event::make();
    for (const Status& s : {copies.status(), work.status(), first.status(), second.status()}) {
        if (!s.ok()) return s;
    }
    auto state = std::make_unique<State>(std::move(options), device.value(), std::move(copies.value()),
                                         std::move(work.value()));
    state->staging[0].copied = std::move(first.value());
    state->staging[1].copied = std::move(second.value());
    if (Status s = state->load_calibration(); !s.ok()) return s;
    return DeviceDecoder(std::move(state));
}

Status DeviceDecoder::set_calibration(std::shared_ptr<const Calibration> calibration) {
    const OnDevice scope(state_->device);
    state_->options.calibration = std::move(calibration);
    state_->calibration.reset();
    Status s = state_->load_calibration();
    if (!s.ok()) {
        state_->options.calibration.reset();
        state_->calibration.reset();
    }
    return s;
}

Status DeviceDecoder::decode(std::span<const std::uint8_t> object, const Placement& place) {
    const OnDevice scope(state_->device);
    const auto chunk = ChunkDecoder::open(object, state_->options);
    if (!chunk.ok()) return chunk.status();
    const ChunkHeader& h = chunk.value().header();
    return state_->decode(chunk.value(), object.subspan(h.header_bytes), place(h), {0, h.layout.layers});
}

Status DeviceDecoder::decode_layers(std::span<const std::uint8_t> object, std::size_t first, std::size_t end,
                                    std::span<const PlaneBuffer> planes) {
    const OnDevice scope(state_->device);
    const auto chunk = ChunkDecoder::open(object, state_->options);
    if (!chunk.ok()) return chunk.status();
    const ChunkHeader& h = chunk.value().header();
    const std::size_t per_layer = h.layout.planes.size();
    if (first > end || end > h.layout.layers || planes.size() != (end - first) * per_layer)
        return {ErrorCode::kBadArgument,
                fmt::format("{} plane buffers for layers {} to {}", planes.size(), first, end)};
    const auto own = state_->own_planes(chunk.value());
    if (!own.ok()) return own.status();
    Status s = state_->decode(chunk.value(), object.subspan(h.header_bytes), own.value(), {first, end});
    if (!s.ok()) return s;
    return state_->read_back(std::span(own.value()).subspan(first * per_layer), planes, h.tokens);
}

}  // namespace kvcast::device
