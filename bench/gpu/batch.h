// Batches of equal chunks on the device, decoded and encoded, and compared with what a CPU made.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "bench/gpu/source.h"
#include "bench/gpu/timing.h"
#include "codec/device.h"
#include "tools/common/file.h"

namespace kvcast::bench {

using tools::Error;

// The same chunk `count` times, each with its own payload and its own output.
class Batch {
  public:
    Batch(const std::vector<std::uint8_t>& object, std::size_t count, const device::KltOnDevice& klt)
        : header_(read_header(object).value()) {
        const auto payload = std::as_bytes(std::span(object).subspan(header_.header_bytes));
        const std::size_t planes = header_.layout.layers * header_.layout.planes.size();
        for (std::size_t i = 0; i < count; ++i) {
            payloads_.emplace_back(payload);
            outputs_.emplace_back(header_.tokens * header_.layout.values_per_token() * 2);
            auto& targets = targets_.emplace_back();
            auto* rows = static_cast<std::byte*>(outputs_.back().data());
            for (std::size_t p = 0; p < planes; ++p) {
                const std::size_t row_bytes =
                    header_.layout.planes[p % header_.layout.planes.size()].width() * 2;
                targets.push_back({.rows = rows, .row_bytes = row_bytes});
                rows += header_.tokens * row_bytes;
            }
        }
        std::vector<device::ChunkSource> sources;
        for (std::size_t i = 0; i < count; ++i) {
            sources.push_back({.header = &header_,
                               .payload = payloads_[i].data(),
                               .payload_bytes = payloads_[i].size(),
                               .planes = targets_[i],
                               .dtype = Dtype::kBf16,
                               .calibration = klt.calibration,
                               .calibration_bytes = klt.calibration_bytes});
        }
        auto made = device::DecodePlan::make(sources);
        if (!made.ok()) throw Error(made.status().message());
        plan_ = std::move(made.value());
        image_.emplace_back(plan_.image());
        workspace_.emplace_back(plan_.workspace_bytes());
        status_.emplace_back(plan_.blocks() * sizeof(std::uint32_t));
    }

    void decode(const Stream& stream) const {
        check(device::decode_batch(plan_, image_[0].data(), workspace_[0].data(),
                                   static_cast<std::uint32_t*>(status_[0].data()), stream.get()));
    }

    void verify(const std::vector<std::byte>& expected) const {
        const auto bytes = status_[0].read();
        std::vector<std::uint32_t> words(plan_.blocks());
        std::memcpy(words.data(), bytes.data(), bytes.size());
        if (const Status s = plan_.batch_status(words); !s.ok()) throw Error(s.message());
        for (const DeviceBuffer& output : outputs_) {
            if (output.read() != expected) throw Error("the device decodes other values than the CPU");
        }
    }

    std::size_t workspace_bytes() const { return plan_.workspace_bytes(); }

  private:
    ChunkHeader header_;
    std::vector<DeviceBuffer> payloads_;
    std::vector<DeviceBuffer> outputs_;
    std::vector<std::vector<device::DevicePlane>> targets_;
    device::DecodePlan plan_;
    std::vector<DeviceBuffer> image_, workspace_, status_;  // one each
};

// A calibration with its inverses, both on the device.
class Calibrated {
  public:
    explicit Calibrated(const std::shared_ptr<const Calibration>& calibration)
        : image_(calibration),
          analysis_(inverted(calibration)),
          image_bytes_(image_.bytes()),
          analysis_bytes_(analysis_.bytes()) {}

    device::KltOnDevice on_device() const {
        return {&image_, image_bytes_.data(), &analysis_, analysis_bytes_.data()};
    }

  private:
    static device::AnalysisImage inverted(const std::shared_ptr<const Calibration>& calibration) {
        auto made = device::AnalysisImage::make(calibration);
        if (!made.ok()) throw Error(made.status().message());
        return std::move(made.value());
    }

    device::CalibrationImage image_;
    device::AnalysisImage analysis_;
    DeviceBuffer image_bytes_, analysis_bytes_;
};

// The same chunk `count` times, each from its own rows to its own payload.
class EncodeBatch {
  public:
    EncodeBatch(const Source& source, const EncodeOptions& options, std::size_t count,
                const device::KltOnDevice& klt) {
        const ChunkInput input = {&source.layout,       source.model, "", source.ids, 0,
                                  source.base_position, {},           {}, 0};
        const auto capacity = device::EncodePlan::greatest_payload(input, options);
        if (!capacity.ok()) throw Error(capacity.status().message());
        std::vector<device::ChunkToEncode> chunks;
        for (std::size_t i = 0; i < count; ++i) {
            auto& planes = planes_.emplace_back();
            for (std::size_t p = 0; p < source.planes.size(); ++p) {
                const std::size_t width = source.layout.planes[p % source.layout.planes.size()].width() * 2;
                std::vector<std::byte> rows(source.ids.size() * width);
                for (std::size_t t = 0; t < source.ids.size(); ++t) {
                    const auto* row =
                        static_cast<const std::byte*>(source.planes[p].rows) + t * source.planes[p].row_bytes;
                    std::copy_n(row, width, rows.data() + t * width);
                }
                memory_.emplace_back(rows);
                planes.push_back({.rows = memory_.back().data(), .row_bytes = width});
            }
            payloads_.emplace_back(capacity.value());
        }
        for (std::size_t i = 0; i < count; ++i)
            chunks.push_back({input, planes_[i], payloads_[i].data(), payloads_[i].size()});
        auto made = device::EncodePlan::make(chunks, options, klt);
        if (!made.ok()) throw Error(made.status().message());
        plan_ = std::move(made.value());
        image_.emplace_back(plan_.image());
        workspace_.emplace_back(plan_.workspace_bytes());
        report_.emplace_back(plan_.report_bytes());
    }

    void encode(const Stream& stream) const {
        check(device::encode_batch(plan_, image_[0].data(), workspace_[0].data(), report_[0].data(),
                                   stream.get()));
    }

    void verify(const std::vector<std::uint8_t>& expected) const {
        const auto report = report_[0].read();
        for (std::size_t i = 0; i < payloads_.size(); ++i) {
            const auto payload = payloads_[i].read();
            const auto object = plan_.object(
                i, report, {reinterpret_cast<const std::uint8_t*>(payload.data()), payload.size()});
            if (!object.ok()) throw Error(object.status().message());
            if (object.value() != expected) throw Error("the device writes other bytes than the CPU");
        }
    }

    std::size_t workspace_bytes() const { return plan_.workspace_bytes(); }

  private:
    std::vector<DeviceBuffer> memory_, payloads_;
    std::vector<std::vector<device::DevicePlane>> planes_;
    device::EncodePlan plan_;
    std::vector<DeviceBuffer> image_, workspace_, report_;  // one each
};

}  // namespace kvcast::bench
