// Chunk objects through decode_batch, every buffer of its own and guarded.
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "codec/decoder.h"
#include "codec/device.h"
#include "tests/codec/synthetic.h"
#include "tests/simt/device_memory.h"

namespace kvcast::test {

// How the output lies in memory.
enum class Rows : std::uint8_t { kContiguous, kPaged, kPagedHeadsOutside };

struct DeviceOptions {
    std::optional<Dtype> dtype = std::nullopt;
    std::uint64_t move = 0;  // added to the base position
    Rows rows = Rows::kContiguous;
    std::shared_ptr<const Calibration> calibration = nullptr;
};

// One object on its way through the device.
class DeviceChunk {
  public:
    DeviceChunk(std::span<const std::uint8_t> object, const DeviceOptions& options);

    device::ChunkSource source() const;
    const ChunkHeader& header() const { return header_; }

    // Plane [layer][plane] as contiguous rows.
    std::vector<std::uint8_t> plane(std::size_t index) const;

    // Nothing is written between, before or after the rows.
    bool intact() const;

    // What is written.
    void forget() const;

  private:
    struct Plane {
        std::optional<DeviceBytes> memory;
        std::optional<DeviceBytes> pages;
        std::vector<std::int32_t> page_list;
        device::DevicePlane target;
        std::size_t heads = 0;
        std::size_t head_bytes = 0;
    };

    Plane make_plane(std::size_t index, std::size_t unit) const;
    std::size_t offset(const Plane& p, std::size_t token, std::size_t head) const;

    ChunkHeader header_;
    DeviceOptions options_;
    std::unique_ptr<device::CalibrationImage> calibration_;
    std::optional<DeviceBytes> calibration_bytes_;
    std::optional<DeviceBytes> payload_;
    std::vector<Plane> planes_;
    std::vector<device::DevicePlane> targets_;
};

// Captures what `work` puts on a stream, which must neither wait nor allocate, and runs it so many times,
// with forget() before each. What went wrong, if anything.
std::string run_captured(const std::function<cudaError_t(cudaStream_t)>& work, unsigned runs,
                         const std::function<void()>& forget);

struct BatchResult {
    std::string failure;
    std::vector<std::uint32_t> status;
};

// Plans and decodes a batch, by a graph. The plan must succeed.
BatchResult decode_on_device(std::span<const std::unique_ptr<DeviceChunk>> chunks, unsigned runs = 1);

// One chunk in as many parts as may be, on the default stream: klt goes by waves then, not by chains.
BatchResult decode_in_parts(const std::unique_ptr<DeviceChunk>& chunk);

// An image at the end of memory that begins where the device API wants it.
DeviceBytes aligned(std::span<const std::byte> image);

// A committed vector, and the conformance case of a name.
std::vector<std::uint8_t> load_vector(const std::string& name);
Case case_of(const std::string& name);

// Conformance cases of the profiles delta and lossless.
std::vector<Case> uncalibrated_cases();

// What GoogleTest calls a case.
std::string case_name(const testing::TestParamInfo<Case>& tested);

// The chunk objects of a file.
std::vector<std::span<const std::uint8_t>> objects_of(std::span<const std::uint8_t> file);

}  // namespace kvcast::test
