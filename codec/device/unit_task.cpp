#include "codec/device/unit_task.h"

#include <algorithm>

namespace kvcast::device {
namespace {

namespace cuda = kernels::cuda;

struct Features {
    std::uint64_t offset;
    std::size_t stride;
    std::size_t inputs;
    bool in_image;
    bool narrow;
};

void add_term(cuda::UnitTask& task, const DeviceCalibration& calibration, const Features& f,
              const MatrixImage& m) {
    task.terms[task.term_count++] = {.features = f.offset,
                                     .matrix = calibration.at<std::uint8_t>(m.entries),
                                     .shifts = calibration.at<std::uint8_t>(m.shifts),
                                     .limbs = m.limbs,
                                     .slots = m.slots,
                                     .stride = u32(f.stride),
                                     .inputs = u32(f.inputs),
                                     .resident = cuda::kNone,
                                     .in_image = f.in_image,
                                     .narrow = f.narrow};
}

}  // namespace

std::vector<std::uint64_t> take_features(Workspace& workspace, const Calibration& calibration,
                                         std::size_t tokens) {
    const Layout& layout = calibration.data().layout;
    const std::size_t planes = layout.planes.size(), kept = (calibration.reach() + 1) * planes;
    std::vector<std::uint64_t> out;
    for (std::size_t i = 0; i < layout.layers * planes; ++i)
        out.push_back(i < kept ? workspace.take(tokens * layout.planes[i % planes].width()) : out[i - kept]);
    return out;
}

cuda::UnitTask predicted_unit(const DeviceCalibration& calibration, UnitPlace place,
                              const UnitMemory& memory) {
    const CalibrationData& data = calibration.image.calibration().data();
    const std::size_t index = calibration.set.index(place.layer, place.plane, place.part);
    const CalibrationUnit& unit = data.units[index];
    const CalibrationImage::Unit& where = calibration.image.unit(index);
    const std::size_t planes = data.layout.planes.size(), width = data.part_width(place.plane);
    const auto features_of = [&](std::size_t layer, std::size_t plane) {
        return memory.features[layer * planes + plane] + place.part * data.part_width(plane);
    };
    cuda::UnitTask task = {};
    for (std::size_t n = 0; n < unit.terms.size(); ++n) {
        const PredictionTerm& term = unit.terms[n];
        const bool tokens = term.source == PredictionTerm::Source::kTokens;
        const Features features = {
            tokens ? memory.token_features : features_of(place.layer - term.layers_back, term.plane),
            tokens ? data.tokens.features : data.layout.planes[term.plane].width(), term.matrix.inputs,
            tokens, true};
        add_term(task, calibration, features, where.terms[n]);
    }
    task.channels = calibration.at<std::uint32_t>(where.channels);
    task.states = memory.states.empty() ? cuda::kNowhere
                                        : memory.states[place.layer * planes + place.plane] +
                                              place.part * width * sizeof(std::int16_t);
    task.features = features_of(place.layer, place.plane);
    task.stride = u32(data.layout.planes[place.plane].width());
    task.width = task.outputs = u32(width);
    task.tokens = u32(memory.tokens);
    return task;
}

void add_transform(cuda::UnitTask& task, const DeviceCalibration& calibration, UnitPlace place,
                   std::uint64_t coefficients, std::size_t inputs) {
    add_term(task, calibration, {coefficients, task.stride, inputs, false, false},
             calibration.image.unit(calibration.set.index(place.layer, place.plane, place.part)).transform);
}

std::vector<std::int8_t> unpack_features(const TokenTable& table, std::span<const std::int32_t> token_ids) {
    std::vector<std::int8_t> features(token_ids.size() * table.features);
    for (std::size_t i = 0; i < token_ids.size(); ++i) {
        const auto offset = static_cast<std::ptrdiff_t>(i * table.features);
        std::ranges::copy(table.row(token_ids[i]), features.begin() + offset);
    }
    return features;
}

}  // namespace kvcast::device
