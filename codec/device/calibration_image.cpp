#include "codec/device/calibration_image.h"

#include "codec/device/image.h"
#include "kernels/cuda/limbs.h"

namespace kvcast::device {

CalibrationImage::Matrix CalibrationImage::add(const ShiftedMatrix& m) {
    const kernels::cuda::LimbMatrix limbs = kernels::cuda::to_limbs(m.entries, m.outputs, m.inputs);
    return {append<std::uint8_t>(bytes_, limbs.bytes), limbs.limbs, append<std::uint8_t>(bytes_, m.shifts)};
}

CalibrationImage::CalibrationImage(std::shared_ptr<const Calibration> calibration)
    : calibration_(std::move(calibration)) {
    const CalibrationData& data = calibration_->data();
    for (const std::size_t parts : data.parts) {
        first_unit_.push_back(units_per_layer_);
        units_per_layer_ += parts;
    }
    for (std::size_t layer = 0; layer < data.layout.layers; ++layer) {
        for (std::size_t plane = 0; plane < data.parts.size(); ++plane) {
            std::vector<std::int8_t> classes;
            for (std::size_t part = 0; part < data.parts[plane]; ++part) {
                const CalibrationUnit& unit = calibration_->unit(layer, plane, part);
                Unit& u = units_.emplace_back();
                u.bias = append<std::int32_t>(bytes_, unit.bias);
                u.transform = add(unit.transform);
                for (const PredictionTerm& term : unit.terms) u.terms.push_back(add(term.matrix));
                classes.insert(classes.end(), unit.classes.begin(), unit.classes.end());
            }
            classes_.push_back(append<std::int8_t>(bytes_, classes));
        }
    }
    std::vector<std::uint16_t> multipliers;
    for (const CalibrationLevel& level : data.levels)
        multipliers.push_back(static_cast<std::uint16_t>(level.multiplier));
    multipliers_ = append<std::uint16_t>(bytes_, multipliers);
}

const CalibrationImage::Unit& CalibrationImage::unit(std::size_t layer, std::size_t plane,
                                                     std::size_t part) const {
    return units_[layer * units_per_layer_ + first_unit_[plane] + part];
}

std::size_t CalibrationImage::classes(std::size_t layer, std::size_t plane) const {
    return classes_[layer * first_unit_.size() + plane];
}

}  // namespace kvcast::device
