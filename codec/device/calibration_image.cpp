#include "codec/device/calibration_image.h"

#include "codec/device/image.h"

namespace kvcast::device {

CalibrationImage::CalibrationImage(std::shared_ptr<const Calibration> calibration)
    : calibration_(std::move(calibration)) {
    const CalibrationData& data = calibration_->data();
    for (const CalibrationUnit& unit : data.units) units_.push_back(make_unit(unit));
    for (std::size_t set = 0; set < data.sets; ++set) {
        for (std::size_t layer = 0; layer < data.layout.layers; ++layer) {
            for (std::size_t plane = 0; plane < data.parts.size(); ++plane)
                add_classes(calibration_->set(set), layer, plane);
        }
    }
    std::vector<std::uint16_t> multipliers;
    for (const CalibrationLevel& level : data.levels)
        multipliers.push_back(static_cast<std::uint16_t>(level.multiplier));
    multipliers_ = append<std::uint16_t>(bytes_, multipliers);
}

CalibrationImage::Unit CalibrationImage::make_unit(const CalibrationUnit& unit) {
    Unit out;
    std::vector<std::uint32_t> channels;
    for (std::size_t c = 0; c < unit.bias.size(); ++c)
        channels.push_back(kernels::cuda::channel_word(unit.bias[c], unit.feature_factors[c]));
    out.channels = append_by_output(bytes_, channels);
    out.transform = append_matrix(bytes_, unit.transform);
    for (const PredictionTerm& term : unit.terms) out.terms.push_back(append_matrix(bytes_, term.matrix));
    return out;
}

void CalibrationImage::add_classes(const Calibration::Set& set, std::size_t layer, std::size_t plane) {
    std::vector<std::int8_t> classes;
    for (std::size_t part = 0; part < calibration_->data().parts[plane]; ++part) {
        const auto& more = set.unit(layer, plane, part).classes;
        classes.insert(classes.end(), more.begin(), more.end());
    }
    units_[set.index(layer, plane, 0)].classes = append<std::int8_t>(bytes_, classes);
}

}  // namespace kvcast::device
