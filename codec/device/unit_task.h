// Units of the klt profile as kernels take them, for plans of both directions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "codec/device/calibration_image.h"
#include "codec/device/image.h"
#include "kernels/cuda/tasks.h"

namespace kvcast::device {

// A calibration on the device, and the set of its units that is meant.
struct DeviceCalibration {
    const CalibrationImage& image;
    const void* bytes;
    Calibration::Set set;

    template <typename T>
    const T* at(std::size_t offset) const {
        return reinterpret_cast<const T*>(static_cast<const std::byte*>(bytes) + offset);
    }
};

struct UnitPlace {
    std::size_t layer;
    std::size_t plane;
    std::size_t part;
};

// Where a chunk's tokens have their features and states.
struct UnitMemory {
    std::uint64_t token_features;             // image: std::int8_t [token][features]
    std::span<const std::uint64_t> features;  // workspace: [layer][plane] of std::int8_t [token][width]
    std::span<const std::uint64_t> states;    // the same of std::int16_t; empty where nobody asks for them
    std::size_t tokens;
};

// Room for UnitMemory::features: layers beyond all predictions share it, so that units come layer by layer.
std::vector<std::uint64_t> take_features(Workspace& workspace, const Calibration& calibration,
                                         std::size_t tokens);

// Channels, predictions, states and features of a unit; the transform is still to be added.
kernels::cuda::UnitTask predicted_unit(const DeviceCalibration& calibration, UnitPlace place,
                                       const UnitMemory& memory);

// The transform of coefficients in the workspace, std::int16_t [token][width of the plane], the part's first;
// the first `inputs` of them, the others being zero.
void add_transform(kernels::cuda::UnitTask& task, const DeviceCalibration& calibration, UnitPlace place,
                   std::uint64_t coefficients, std::size_t inputs);

// Features of tokens, [token][features].
std::vector<std::int8_t> unpack_features(const TokenTable& table, std::span<const std::int32_t> token_ids);

}  // namespace kvcast::device
