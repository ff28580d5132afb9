#include "tests/codec/synthetic_calibration.h"

#include <cstdio>
#include <cstdlib>

namespace kvcast::test {
namespace {

class Numbers {
  public:
    explicit Numbers(std::uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}

    // Uniform in -most..most.
    std::int32_t within(std::int32_t most) {
        state_ ^= state_ << 13;
        state_ ^= state_ >> 7;
        state_ ^= state_ << 17;
        return static_cast<std::int32_t>(state_ >> 33) % (2 * most + 1) - most;
    }

  private:
    std::uint64_t state_;
};

ShiftedMatrix make_matrix(Numbers& numbers, std::size_t outputs, std::size_t inputs, std::int32_t most,
                          std::int32_t diagonal, std::size_t shift = 8) {
    ShiftedMatrix m = {outputs, inputs, {}, {}};
    for (std::size_t o = 0; o < outputs; ++o) {
        for (std::size_t i = 0; i < inputs; ++i)
            m.entries.push_back(static_cast<std::int16_t>(numbers.within(most) + (o == i ? diagonal : 0)));
        m.shifts.push_back(static_cast<std::uint8_t>(shift + o % 2));
    }
    return m;
}

PredictionTerm make_term(Numbers& numbers, std::size_t outputs, std::size_t inputs, std::size_t back,
                         std::size_t plane) {
    PredictionTerm term;
    term.layers_back = back;
    term.plane = plane;
    term.matrix = make_matrix(numbers, outputs, inputs, 12, 40);
    return term;
}

CalibrationUnit make_unit(Numbers& numbers, const CalibrationData& data, std::size_t layer, std::size_t plane,
                          std::size_t set) {
    const std::size_t width = data.part_width(plane);
    CalibrationUnit unit;
    unit.scale = {200, -17};
    for (std::size_t i = 0; i < width; ++i) {
        unit.bias.push_back(static_cast<std::int16_t>(numbers.within(300)));
        unit.feature_factors.push_back(static_cast<std::int16_t>(128 + 32639 * i / width));
    }
    unit.transform = set == 0 ? make_matrix(numbers, width, width, 150, 16000)
                              : make_matrix(numbers, width, width, 2, 120, 4);
    for (std::size_t back = 2; back >= 1; --back) {
        if (layer >= back) unit.terms.push_back(make_term(numbers, width, width, back, plane));
    }
    if (plane == 1 && data.parts[0] == data.parts[1])
        unit.terms.push_back(make_term(numbers, width, data.part_width(0), 0, 0));
    if (data.tokens.features != 0) {
        PredictionTerm& term = unit.terms.emplace_back();
        term.source = PredictionTerm::Source::kTokens;
        term.matrix = make_matrix(numbers, width, data.tokens.features, 100, 0);
    }
    for (std::size_t level = 0; level < data.levels.size(); ++level) {
        for (std::size_t i = 0; i < width; ++i)  // falling, but not everywhere
            unit.classes.push_back(
                static_cast<std::int8_t>(14 - static_cast<int>(16 * level + i + 5 * (i % 3)) / 8));
    }
    return unit;
}

TokenTable make_tokens(const CalibrationShape& shape) {
    TokenTable out;
    out.features = shape.features;
    out.vocabulary = shape.features == 0 ? 0 : 500;  // many ids lie beyond it
    for (std::size_t f = 0; f < shape.features; ++f) out.shifts.push_back(f < shape.wide ? 0 : 4);
    for (std::size_t i = 0; i < out.vocabulary * out.features; ++i) {
        const int value = static_cast<int>(i * i * 31 >> 8 & 255) - 128,
                  unit = 1 << out.shifts[i % out.features];
        out.rows.push_back(static_cast<std::int8_t>(value / unit * unit));
    }
    return out;
}

}  // namespace

CalibrationData make_calibration_data(const Layout& layout, const CalibrationShape& shape) {
    Numbers numbers(shape.seed);
    CalibrationData data;
    data.model = "test model";
    data.layout = layout;
    data.parts = shape.parts;
    data.sets = 2;
    data.levels = {{4, 1000, 3000, 0}, {10, 5000, 2000, 0}, {330, 20000, 1000, 1}};
    data.tokens = make_tokens(shape);
    for (std::size_t set = 0; set < data.sets; ++set) {
        for (std::size_t l = 0; l < layout.layers; ++l) {
            for (std::size_t p = 0; p < layout.planes.size(); ++p) {
                for (std::size_t part = 0; part < shape.parts[p]; ++part)
                    data.units.push_back(make_unit(numbers, data, l, p, set));
            }
        }
    }
    return data;
}

std::vector<std::uint8_t> calibration_bytes(const CalibrationData& data) {
    auto bytes = write_calibration(data);
    if (!bytes.ok()) {
        std::fprintf(stderr, "%s\n", bytes.status().message().c_str());
        std::abort();
    }
    return std::move(bytes.value());
}

std::shared_ptr<const Calibration> make_calibration(const Layout& layout, const CalibrationShape& shape) {
    return Calibration::read(calibration_bytes(make_calibration_data(layout, shape))).value();
}

}  // namespace kvcast::test
