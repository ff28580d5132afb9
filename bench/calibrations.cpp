#include "bench/calibrations.h"

#include <bit>
#include <random>
#include <stdexcept>

namespace kvcast::bench {
namespace {

std::shared_ptr<const Calibration> made(const CalibrationData& data) {
    const auto bytes = write_calibration(data);
    if (!bytes.ok()) throw std::runtime_error(bytes.status().message());
    auto calibration = Calibration::read(bytes.value());
    if (!calibration.ok()) throw std::runtime_error(calibration.status().message());
    return std::move(calibration.value());
}

// Row norms stay below CalibrationLimits::kRowNorm up to a width of 1024.
ShiftedMatrix hadamard(std::size_t width) {
    constexpr std::int16_t entry = 63;
    ShiftedMatrix m = {width, width, {}, std::vector<std::uint8_t>(width, 10)};
    for (std::size_t o = 0; o < width; ++o) {
        for (std::size_t i = 0; i < width; ++i)
            m.entries.push_back(std::popcount(o & i) % 2 == 0 ? entry : -entry);
    }
    return m;
}

PredictionTerm dense_term(std::size_t width, std::size_t layers_back, std::size_t plane,
                          std::mt19937& random) {
    PredictionTerm term;
    term.layers_back = layers_back;
    term.plane = plane;
    term.matrix = {width, width, {}, std::vector<std::uint8_t>(width, 12)};
    for (std::size_t i = 0; i < width * width; ++i)
        term.matrix.entries.push_back(static_cast<std::int16_t>(random() % 61) - 30);
    return term;
}

}  // namespace

std::shared_ptr<const Calibration> first_stage(const Calibration& whole) {
    CalibrationData data = whole.data();
    for (CalibrationUnit& unit : data.units) {
        std::erase_if(unit.terms, [](const PredictionTerm& t) {
            return t.source == PredictionTerm::Source::kTokens || t.layers_back > 1;
        });
    }
    return made(data);
}

std::shared_ptr<const Calibration> dense_first_stage(const Layout& layout, const std::string& model,
                                                     std::size_t coded) {
    std::mt19937 random(1);
    CalibrationData data;
    data.model = model;
    data.layout = layout;
    data.parts.assign(layout.planes.size(), 1);
    data.levels = {{512, 10000, 600, 0}};
    for (std::size_t layer = 0; layer < layout.layers; ++layer) {
        for (std::size_t plane = 0; plane < layout.planes.size(); ++plane) {
            const std::size_t width = layout.planes[plane].width();
            CalibrationUnit unit;
            unit.scale = {128, -17};
            unit.bias.assign(width, 0);
            unit.feature_factors.assign(width, kernels::kLeastFeatureFactor);
            unit.transform = hadamard(width);
            if (layer != 0) unit.terms.push_back(dense_term(width, 1, plane, random));
            if (plane != 0) unit.terms.push_back(dense_term(width, 0, 0, random));
            for (std::size_t i = 0; i < width; ++i) unit.classes.push_back(i < coded ? 6 : 0);
            data.units.push_back(std::move(unit));
        }
    }
    return made(data);
}

}  // namespace kvcast::bench
