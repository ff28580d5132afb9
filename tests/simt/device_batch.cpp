#include "tests/simt/device_batch.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <random>

namespace kvcast::test {
namespace {

constexpr std::size_t kPageTokens = 8;
constexpr std::size_t kSlot = 5;  // of the chunk's first token in its first page
constexpr std::uint8_t kUnwritten = 0xa5;

std::size_t round_up(std::size_t n, std::size_t unit) {
    return (n + unit - 1) / unit * unit;
}

}  // namespace

DeviceChunk::DeviceChunk(std::span<const std::uint8_t> object, const DeviceOptions& options)
    : options_(options) {
    auto read = read_header(object);
    EXPECT_TRUE(read.ok()) << read.status().message();
    header_ = std::move(read.value());
    const auto bytes = object.subspan(header_.header_bytes, header_.payload_bytes());
    payload_ = std::make_unique<simt::Guarded<std::uint8_t>>(bytes);
    if (options.calibration != nullptr) {
        calibration_ = std::make_unique<device::CalibrationImage>(options.calibration);
        const auto image = calibration_->bytes();
        calibration_bytes_ =
            std::make_unique<simt::Guarded<std::byte>>(round_up(image.size(), device::kAlignment));
        std::memcpy(calibration_bytes_->data(), image.data(), image.size());
    }
    const std::size_t unit = kernels::dtype_bytes(options.dtype.value_or(header_.layout.dtype));
    std::mt19937 random(7);
    for (std::size_t i = 0; i < header_.layout.layers * header_.layout.planes.size(); ++i) {
        const PlaneShape& shape = header_.layout.planes[i % header_.layout.planes.size()];
        const std::size_t width = shape.width() * unit;
        Plane p;
        p.heads = shape.heads;
        p.head_bytes = shape.head_dim * unit;
        if (options.rows == Rows::kContiguous) {
            p.memory = std::make_unique<simt::Guarded<std::uint8_t>>(header_.tokens * width);
            p.target = {.rows = p.memory->data(), .row_bytes = width};
        } else {
            const std::size_t pages = (kSlot + header_.tokens + kPageTokens - 1) / kPageTokens;
            std::vector<std::int32_t> order(pages);
            for (std::size_t n = 0; n < pages; ++n) order[n] = static_cast<std::int32_t>(n);
            std::shuffle(order.begin(), order.end(), random);
            p.pages = std::make_unique<simt::Guarded<std::int32_t>>(order);
            p.memory = std::make_unique<simt::Guarded<std::uint8_t>>(pages * kPageTokens * width);
            const bool outside = options.rows == Rows::kPagedHeadsOutside;
            p.target = {.rows = p.memory->data(),
                        .row_bytes = outside ? p.head_bytes : width,
                        .head_bytes = outside ? p.head_bytes * kPageTokens : 0,
                        .pages = p.pages->data(),
                        .page_tokens = kPageTokens,
                        .page_bytes = kPageTokens * width,
                        .slot = kSlot};
        }
        targets_.push_back(p.target);
        planes_.push_back(std::move(p));
    }
}

device::ChunkSource DeviceChunk::source() const {
    return {.header = &header_,
            .payload = payload_->data(),
            .payload_bytes = payload_->size(),
            .planes = targets_,
            .dtype = options_.dtype,
            .base_position = header_.base_position + options_.move,
            .calibration = calibration_.get(),
            .calibration_bytes = calibration_bytes_ == nullptr ? nullptr : calibration_bytes_->data()};
}

std::size_t DeviceChunk::offset(const Plane& p, std::size_t token, std::size_t head) const {
    const device::PlaneTarget& t = p.target;
    const std::size_t head_bytes = t.head_bytes != 0 ? t.head_bytes : p.head_bytes;
    if (t.pages == nullptr) return token * t.row_bytes + head * head_bytes;
    const std::size_t s = t.slot + token;
    return static_cast<std::size_t>(t.pages[s / t.page_tokens]) * t.page_bytes +
           s % t.page_tokens * t.row_bytes + head * head_bytes;
}

std::vector<std::uint8_t> DeviceChunk::plane(std::size_t index) const {
    const Plane& p = planes_[index];
    std::vector<std::uint8_t> out;
    for (std::size_t t = 0; t < header_.tokens; ++t) {
        for (std::size_t h = 0; h < p.heads; ++h) {
            const std::uint8_t* at = p.memory->data() + offset(p, t, h);
            out.insert(out.end(), at, at + p.head_bytes);
        }
    }
    return out;
}

bool DeviceChunk::intact() const {
    bool intact = payload_->intact();
    for (const Plane& p : planes_) {
        std::vector<bool> ours(p.memory->size());
        for (std::size_t t = 0; t < header_.tokens; ++t) {
            for (std::size_t h = 0; h < p.heads; ++h)
                std::fill_n(ours.begin() + static_cast<std::ptrdiff_t>(offset(p, t, h)), p.head_bytes, true);
        }
        for (std::size_t i = 0; i < ours.size(); ++i)
            intact = intact && (ours[i] || (*p.memory)[i] == kUnwritten);
        intact = intact && p.memory->intact() && (p.pages == nullptr || p.pages->intact());
    }
    return intact;
}

BatchResult decode_on_device(std::span<const std::unique_ptr<DeviceChunk>> chunks) {
    std::vector<device::ChunkSource> sources;
    for (const auto& c : chunks) sources.push_back(c->source());
    const auto made = device::DecodePlan::make(sources);
    EXPECT_TRUE(made.ok()) << made.status().message();
    if (!made.ok()) return {};
    const device::DecodePlan& plan = made.value();
    const simt::Guarded<std::byte> image(round_up(plan.image().size(), device::kAlignment));
    std::memcpy(image.data(), plan.image().data(), plan.image().size());
    const simt::Guarded<std::byte> workspace(plan.workspace_bytes());
    const simt::Guarded<std::uint32_t> status(plan.blocks());
    BatchResult result;
    const cudaError_t error =
        device::decode_batch(plan, image.data(), workspace.data(), status.data(), nullptr);
    result.failure = simt::take_failure();
    EXPECT_EQ(error == cudaSuccess, result.failure.empty());
    EXPECT_TRUE(image.intact() && workspace.intact() && status.intact());
    EXPECT_EQ(std::memcmp(image.data(), plan.image().data(), plan.image().size()), 0);
    result.status.assign(status.begin(), status.end());
    return result;
}

std::vector<std::span<const std::uint8_t>> objects_of(std::span<const std::uint8_t> file) {
    std::vector<std::span<const std::uint8_t>> objects;
    while (!file.empty()) {
        const auto header = read_header(file);
        EXPECT_TRUE(header.ok()) << header.status().message();
        if (!header.ok()) break;
        const std::size_t bytes = header.value().header_bytes + header.value().payload_bytes();
        objects.push_back(file.first(bytes));
        file = file.subspan(bytes);
    }
    return objects;
}

}  // namespace kvcast::test
