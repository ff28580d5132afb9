#include "codec/klt/reconstruction.h"

#include <algorithm>

namespace kvcast {
void KltStates::reset(const Calibration& calibration, const Calibration::Set& set,
                      std::span<const std::int32_t> token_ids) {
    calibration_ = &calibration;
    set_ = set;
    tokens_ = token_ids.size();
    const CalibrationData& data = calibration.data();
    const std::size_t planes = data.layout.planes.size();
    planes_.resize(std::max(planes_.size(), (calibration.reach() + 1) * planes));
    for (std::size_t i = 0; i < (calibration.reach() + 1) * planes; ++i)
        planes_[i].resize(tokens_ * data.layout.planes[i % planes].width());
    const std::size_t n = calibration.has_token_terms() ? data.tokens.features : 0;
    features_.resize(tokens_ * n);
    for (std::size_t t = 0; t < tokens_ && n != 0; ++t)
        data.tokens.unpack(token_ids[t], features_.data() + t * n);
}

std::size_t KltStates::slot(std::size_t layer, std::size_t plane) const {
    return layer % (calibration_->reach() + 1) * calibration_->data().layout.planes.size() + plane;
}

std::int16_t* KltStates::plane(std::size_t layer, std::size_t plane) {
    return planes_[slot(layer, plane)].data();
}

const std::int16_t* KltStates::plane(std::size_t layer, std::size_t plane) const {
    return planes_[slot(layer, plane)].data();
}

void KltStates::predict(const kernels::Ops& ops, std::size_t layer, std::size_t plane, std::size_t part,
                        TokenSlice slice, std::int32_t* sums) const {
    const CalibrationData& data = calibration_->data();
    const CalibrationUnit& unit = set_->unit(layer, plane, part);
    const std::size_t width = data.part_width(plane);
    for (std::size_t t = 0; t < slice.count; ++t) std::copy_n(unit.bias.data(), width, sums + t * width);
    const Calibration::Panels& panels = set_->panels(layer, plane, part);
    for (std::size_t i = 0; i < unit.terms.size(); ++i) {
        const PredictionTerm& term = unit.terms[i];
        const std::int16_t* features = nullptr;
        std::size_t stride = data.tokens.features;
        if (term.source == PredictionTerm::Source::kTokens) {
            features = features_.data() + slice.first * stride;
        } else {
            stride = data.layout.planes[term.plane].width();
            features = this->plane(layer - term.layers_back, term.plane) + slice.first * stride +
                       part * data.part_width(term.plane);
        }
        const ShiftedMatrix& m = term.matrix;
        ops.project({features, stride, m.inputs, m.entries.data(), panels.terms[i].data(), m.shifts.data(),
                     width, slice.count, sums, width, 1, &panels.term_tiles[i]});
    }
}

void KltStates::reconstruct(const kernels::Ops& ops, std::size_t layer, std::size_t plane, std::size_t part,
                            TokenSlice slice, const std::int16_t* coefficients, unsigned multiplier,
                            std::int32_t* sums) {
    const CalibrationData& data = calibration_->data();
    const ShiftedMatrix& transform = set_->unit(layer, plane, part).transform;
    const Calibration::Panels& panels = set_->panels(layer, plane, part);
    const std::size_t width = data.part_width(plane);
    ops.project({coefficients, width, width, transform.entries.data(), panels.transform.data(),
                 transform.shifts.data(), width, slice.count, sums, width,
                 static_cast<std::int32_t>(multiplier), &panels.transform_tiles});
    const std::size_t row = data.layout.planes[plane].width();
    std::int16_t* out = this->plane(layer, plane) + slice.first * row + part * width;
    for (std::size_t t = 0; t < slice.count; ++t) ops.saturate(sums + t * width, width, out + t * row);
}

}  // namespace kvcast
