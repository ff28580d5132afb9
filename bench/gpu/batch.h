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

// How decoded planes lie in memory: contiguous, or in pages as an engine keeps them, in no order.
struct Output {
    const char* name;
    Dtype dtype = Dtype::kBf16;
    bool paged = false;
};
inline constexpr std::size_t kPageTokens = 16;

// The same chunk `count` times, each with its own payload and its own output.
class DecodeBatch {
  public:
    DecodeBatch(const std::vector<std::uint8_t>& object, std::size_t count, const device::KltOnDevice& klt,
                const Output& output)
        : header_(read_header(object).value()), output_(output) {
        const auto payload = std::as_bytes(std::span(object).subspan(header_.header_bytes));
        for (std::size_t page = pages(); page-- > 0;)
            page_list_.push_back(static_cast<std::int32_t>(page));  // the last one first
        page_table_.emplace_back(std::as_bytes(std::span(page_list_)));
        for (std::size_t i = 0; i < count; ++i) {
            payloads_.emplace_back(payload);
            std::size_t bytes = 0;
            for (std::size_t p = 0; p < planes(); ++p) bytes += plane_bytes(p);
            outputs_.emplace_back(bytes);
            auto& targets = targets_.emplace_back();
            auto* at = static_cast<std::byte*>(outputs_.back().data());
            for (std::size_t p = 0; p < planes(); at += plane_bytes(p++)) targets.push_back(target(p, at));
        }
        std::vector<device::ChunkSource> sources;
        for (std::size_t i = 0; i < count; ++i) {
            sources.push_back({.header = &header_,
                               .payload = payloads_[i].data(),
                               .payload_bytes = payloads_[i].size(),
                               .planes = targets_[i],
                               .dtype = output.dtype,
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

    void run(const Stream& stream) const {
        check(device::decode_batch(plan_, image_[0].data(), workspace_[0].data(),
                                   static_cast<std::uint32_t*>(status_[0].data()), stream.get()));
    }

    // What was decoded before: what is verified then was decoded since.
    void forget(const Stream& stream) const {
        for (const DeviceBuffer& output : outputs_) output.forget(stream);
        status_[0].forget(stream);
    }

    void verify(const std::vector<std::byte>& expected) const {
        const auto bytes = status_[0].read();
        std::vector<std::uint32_t> words(plan_.blocks());
        std::memcpy(words.data(), bytes.data(), bytes.size());
        if (const Status s = plan_.batch_status(words); !s.ok()) throw Error(s.message());
        for (const DeviceBuffer& output : outputs_) {
            if (in_order(output.read()) != expected)
                throw Error("the device decodes other values than the CPU");
        }
    }

    std::size_t workspace_bytes() const { return plan_.workspace_bytes(); }

  private:
    std::size_t planes() const { return header_.layout.layers * header_.layout.planes.size(); }
    std::size_t row_bytes(std::size_t plane) const {
        return header_.layout.planes[plane % header_.layout.planes.size()].width() *
               kernels::dtype_bytes(output_.dtype);
    }
    std::size_t pages() const { return (header_.tokens + kPageTokens - 1) / kPageTokens; }
    std::size_t plane_bytes(std::size_t plane) const {
        return (output_.paged ? pages() * kPageTokens : header_.tokens) * row_bytes(plane);
    }
    device::DevicePlane target(std::size_t plane, std::byte* at) const {
        device::DevicePlane out = {.rows = at, .row_bytes = row_bytes(plane)};
        if (output_.paged) {
            out.pages = static_cast<const std::int32_t*>(page_table_[0].data());
            out.page_tokens = kPageTokens;
            out.page_bytes = kPageTokens * row_bytes(plane);
        }
        return out;
    }
    // Planes as contiguous rows.
    std::vector<std::byte> in_order(std::vector<std::byte> found) const {
        if (!output_.paged) return found;
        std::vector<std::byte> out;
        auto plane = found.cbegin();
        for (std::size_t p = 0; p < planes(); plane += static_cast<std::ptrdiff_t>(plane_bytes(p++))) {
            for (std::size_t t = 0; t < header_.tokens; ++t) {
                const auto page = static_cast<std::size_t>(page_list_[t / kPageTokens]);
                const auto row = plane + static_cast<std::ptrdiff_t>((page * kPageTokens + t % kPageTokens) *
                                                                     row_bytes(p));
                out.insert(out.end(), row, row + static_cast<std::ptrdiff_t>(row_bytes(p)));
            }
        }
        return out;
    }

    ChunkHeader header_;
    Output output_;
    std::vector<std::int32_t> page_list_;
    std::vector<DeviceBuffer> page_table_;  // one
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

    void run(const Stream& stream) const {
        check(device::encode_batch(plan_, image_[0].data(), workspace_[0].data(), report_[0].data(),
                                   stream.get()));
    }

    // What was encoded before.
    void forget(const Stream& stream) const {
        for (const DeviceBuffer& payload : payloads_) payload.forget(stream);
        report_[0].forget(stream);
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
