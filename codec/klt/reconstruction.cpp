#include "codec/klt/reconstruction.h"

#include <algorithm>

namespace kvcast {
namespace {

// sums += matrix(multiplier * features), for some tokens.
void project(const kernels::Ops& ops, const ShiftedMatrix& m, const kernels::PackedMatrix& packed,
             const std::int16_t* features, std::size_t stride, std::size_t tokens, std::int32_t* sums,
             std::size_t sum_stride, unsigned multiplier) {
    ops.project({features, stride, m.inputs, m.entries.data(), &packed, m.shifts.data(), m.outputs, tokens,
                 sums, sum_stride, static_cast<std::int32_t>(multiplier)});
}

bool is_of_tokens(const PredictionTerm& term) {
    return term.source == PredictionTerm::Source::kTokens;
}

}  // namespace

void KltStates::reset(const Calibration& calibration, const Calibration::Set& set,
                      std::span<const std::int32_t> token_ids) {
    calibration_ = &calibration;
    set_ = set;
    const CalibrationData& data = calibration.data();
    const std::size_t planes = data.layout.planes.size(), tokens = token_ids.size();
    std::vector<std::int32_t> ids = {0};
    id_of_.assign(tokens, 0);
    if (calibration.has_token_terms()) {
        ids.assign(token_ids.begin(), token_ids.end());
        std::sort(ids.begin(), ids.end());
        ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
        for (std::size_t t = 0; t < tokens; ++t) {
            const auto at = std::lower_bound(ids.begin(), ids.end(), token_ids[t]);
            id_of_[t] = static_cast<std::uint32_t>(at - ids.begin());
        }
    }
    ids_ = ids.size();
    token_features_.resize(ids_ * data.tokens.features);
    for (std::size_t i = 0; i < ids_; ++i)
        data.tokens.unpack(ids[i], token_features_.data() + i * data.tokens.features);
    states_.resize(planes);
    for (std::size_t p = 0; p < planes; ++p) states_[p].resize(tokens * data.layout.planes[p].width());
    const std::size_t kept = (calibration.reach() + 1) * planes;
    features_.resize(kept);
    for (std::size_t i = 0; i < kept; ++i)
        features_[i].resize(tokens * data.layout.planes[i % planes].width());
    starts_.resize(2 * planes);
    for (std::size_t i = 0; i < 2 * planes; ++i)
        starts_[i].resize(ids_ * data.layout.planes[i % planes].width());
}

std::size_t KltStates::feature_slot(std::size_t layer, std::size_t plane) const {
    return layer % (calibration_->reach() + 1) * calibration_->data().layout.planes.size() + plane;
}

std::size_t KltStates::start_slot(std::size_t layer, std::size_t plane) const {
    return layer % 2 * calibration_->data().layout.planes.size() + plane;
}

void KltStates::make_starts(const kernels::Ops& ops, std::size_t layer, std::size_t plane, TokenSlice ids) {
    const CalibrationData& data = calibration_->data();
    const std::size_t features = data.tokens.features, width = data.part_width(plane);
    const std::size_t row = data.layout.planes[plane].width();
    for (std::size_t part = 0; part < data.parts[plane]; ++part) {
        const CalibrationUnit& unit = set_->unit(layer, plane, part);
        std::int32_t* sums = starts_[start_slot(layer, plane)].data() + ids.first * row + part * width;
        for (std::size_t i = 0; i < ids.count; ++i) std::copy_n(unit.bias.data(), width, sums + i * row);
        for (std::size_t i = 0; i < unit.terms.size(); ++i) {
            if (!is_of_tokens(unit.terms[i])) continue;
            project(ops, unit.terms[i].matrix, set_->packed(layer, plane, part).terms[i],
                    token_features_.data() + ids.first * features, features, ids.count, sums, row,
                    kernels::kFeatureWeight);
        }
    }
}

void KltStates::predict(const kernels::Ops& ops, std::size_t layer, std::size_t plane, std::size_t part,
                        TokenSlice slice, std::int32_t* sums) const {
    const CalibrationData& data = calibration_->data();
    const CalibrationUnit& unit = set_->unit(layer, plane, part);
    const std::size_t width = data.part_width(plane);
    const std::int32_t* starts = starts_[start_slot(layer, plane)].data() + part * width;
    for (std::size_t t = 0; t < slice.count; ++t) {
        const std::size_t id = id_of_[slice.first + t];
        std::copy_n(starts + id * data.layout.planes[plane].width(), width, sums + t * width);
    }
    for (std::size_t i = 0; i < unit.terms.size(); ++i) {
        const PredictionTerm& term = unit.terms[i];
        if (is_of_tokens(term)) continue;
        const std::size_t stride = data.layout.planes[term.plane].width();
        const std::int16_t* features = features_[feature_slot(layer - term.layers_back, term.plane)].data() +
                                       slice.first * stride + part * data.part_width(term.plane);
        project(ops, term.matrix, set_->packed(layer, plane, part).terms[i], features, stride, slice.count,
                sums, width, kernels::kFeatureWeight);
    }
}

void KltStates::reconstruct(const kernels::Ops& ops, std::size_t layer, std::size_t plane, std::size_t part,
                            TokenSlice slice, const std::int16_t* coefficients, unsigned multiplier,
                            std::int32_t* sums) {
    const CalibrationData& data = calibration_->data();
    const std::size_t width = data.part_width(plane), row = data.layout.planes[plane].width();
    const CalibrationUnit& unit = set_->unit(layer, plane, part);
    const Calibration::PackedUnit& packed = set_->packed(layer, plane, part);
    project(ops, unit.transform, packed.transform, coefficients, width, slice.count, sums, width, multiplier);
    const std::size_t first = slice.first * row + part * width;
    std::int16_t* const states = states_[plane].data() + first;
    std::int16_t* const features = features_[feature_slot(layer, plane)].data() + first;
    for (std::size_t t = 0; t < slice.count; ++t) {
        ops.saturate(sums + t * width, width, states + t * row);
        ops.state_features(states + t * row, unit.bias.data(), unit.feature_factors.data(), width,
                           features + t * row);
    }
}

}  // namespace kvcast
