#include "tools/calibrate/classes.h"

#include <algorithm>
#include <cmath>

#include "codec/entropy/model.h"
#include "codec/klt/klt_encoder.h"
#include "codec/klt/reconstruction.h"
#include "tools/common/file.h"

namespace kvcast::calibrate {
namespace {

constexpr int kRounds = 3;   // of gains given classes, and classes given gains
constexpr int kLowest = -8;  // classes below 1 come to life with a gain
constexpr int kHighest = 31;

// Coefficients of one unit at all sample tokens.
struct UnitCoefficients {
    std::size_t width = 0;
    std::vector<std::int16_t> q;      // [token][width]
    std::vector<std::int16_t> gains;  // [token]

    std::size_t begin(std::size_t g) const { return kernels::klt_group_begin(static_cast<std::uint32_t>(g)); }
    std::size_t end(std::size_t g) const {
        return kernels::klt_group_end(static_cast<std::uint32_t>(g), static_cast<std::uint32_t>(width));
    }
    std::span<const std::int16_t> group(std::size_t token, std::size_t g) const {
        return std::span(q).subspan(token * width + begin(g), end(g) - begin(g));
    }
};

// The class with which a group costs least over all tokens, given their gains.
int best_class(const UnitCoefficients& unit, std::size_t g) {
    std::vector<double> cost(static_cast<std::size_t>(kHighest - kLowest + 1));
    const std::size_t tokens = unit.gains.size();
    for (std::size_t t = 0; t < tokens; ++t) {
        // Costs of this group by class are shared by all bases that lead to the class.
        std::uint64_t by_class[entropy::kClasses];
        bool known[entropy::kClasses] = {};
        for (int base = kLowest; base <= kHighest; ++base) {
            const unsigned c = klt_class(static_cast<std::int8_t>(base), unit.gains[t]);
            if (!known[c]) {
                by_class[c] = klt_group_cost(unit.group(t, g), c);
                known[c] = true;
            }
            cost[static_cast<std::size_t>(base - kLowest)] += static_cast<double>(by_class[c]);
        }
    }
    return kLowest + static_cast<int>(std::min_element(cost.begin(), cost.end()) - cost.begin());
}

void choose_gains(UnitCoefficients& unit, std::span<const std::int8_t> classes) {
    for (std::size_t t = 0; t < unit.gains.size(); ++t) {
        const auto q = std::span<const std::int16_t>(unit.q).subspan(t * unit.width, unit.width);
        unit.gains[t] = static_cast<std::int16_t>(cheapest_klt_gain(kernels::best_ops(), q, classes.data()));
    }
}

class LevelFitter {
  public:
    LevelFitter(const RowStore& store, const SampleTokens& sample, const KltAnalysis& analysis,
                std::size_t set, unsigned multiplier)
        : store_(store),
          sample_(sample),
          analysis_(analysis),
          set_(analysis.calibration().set(set)),
          multiplier_(multiplier) {
        states_.reset(analysis.calibration(), set_, sample.token_ids);
    }

    // Appends the level's classes to all units of the set.
    void fit_all(CalibrationData& data) {
        for (std::size_t l = 0; l < data.layout.layers; ++l) {
            for (std::size_t p = 0; p < data.layout.planes.size(); ++p) {
                for (std::size_t part = 0; part < data.parts[p]; ++part) {
                    const std::vector<std::int8_t> classes = fit(l, p, part);
                    std::vector<std::int8_t>& all = data.units[set_.index(l, p, part)].classes;
                    all.insert(all.end(), classes.begin(), classes.end());
                }
            }
        }
    }

    double bits() const { return bits_; }

  private:
    // Classes [group] of a unit; units come in order.
    std::vector<std::int8_t> fit(std::size_t layer, std::size_t plane, std::size_t part) {
        const CalibrationData& data = analysis_.calibration().data();
        UnitCoefficients unit;
        unit.width = data.part_width(plane);
        quantise(layer, plane, part, unit);
        const std::size_t groups = data.groups(plane);
        std::vector<std::int8_t> classes(groups);
        for (int round = 0; round < kRounds; ++round) {
            for (std::size_t g = 0; g < groups; ++g)
                classes[g] = static_cast<std::int8_t>(best_class(unit, g));
            choose_gains(unit, classes);
        }
        reconstruct(layer, plane, part, classes, unit);
        return classes;
    }

    const kernels::Ops& ops() const { return kernels::best_ops(); }

    void quantise(std::size_t layer, std::size_t plane, std::size_t part, UnitCoefficients& unit) {
        const std::size_t tokens = sample_.rows.size(), width = unit.width;
        const kernels::Scale scale = set_.unit(layer, plane, part).scale;
        const float inverse_unit =
            1 / (static_cast<float>(scale.mantissa) * kernels::power_of_two(scale.exponent));
        sums_.resize(tokens * width);
        states_.predict(ops(), layer, plane, part, {0, tokens}, sums_.data());
        std::vector<float> residual(tokens * width), coefficients(tokens * width);
        const std::size_t plane_index = layer * analysis_.calibration().data().layout.planes.size() + plane;
        for (std::size_t t = 0; t < tokens; ++t) {
            const float* x = store_.row(plane_index, sample_.rows[t]) + part * width;
            for (std::size_t c = 0; c < width; ++c) {
                residual[t * width + c] = x[c] * inverse_unit - static_cast<float>(sums_[t * width + c]);
            }
        }
        ops().analyse(residual.data(), width, analysis_.matrix(set_.index(layer, plane, part)), width, width,
                      tokens, coefficients.data());
        unit.q.resize(tokens * width);
        unit.gains.assign(tokens, 0);
        const float inverse_step = 1 / static_cast<float>(multiplier_);
        for (std::size_t i = 0; i < unit.q.size(); ++i) {
            const float q = std::nearbyint(coefficients[i] * inverse_step);
            unit.q[i] = static_cast<std::int16_t>(std::clamp(q, -30000.0f, 30000.0f));
        }
    }

    void reconstruct(std::size_t layer, std::size_t plane, std::size_t part,
                     std::span<const std::int8_t> classes, UnitCoefficients& unit) {
        const std::size_t tokens = unit.gains.size(), width = unit.width;
        for (std::size_t t = 0; t < tokens; ++t) {
            for (std::size_t g = 0; g < classes.size(); ++g) {
                const unsigned c = klt_class(classes[g], unit.gains[t]);
                if (c != 0) bits_ += static_cast<double>(klt_group_cost(unit.group(t, g), c)) / 256;
                std::int16_t* const q = unit.q.data() + t * width + unit.begin(g);
                for (std::size_t j = 0; j < unit.group(t, g).size(); ++j)
                    q[j] = c == 0 ? std::int16_t{0} : kernels::scaled_coefficient(q[j], multiplier_);
            }
        }
        states_.reconstruct(ops(), layer, plane, part, {0, tokens}, unit.q.data(), 1, sums_.data());
    }

    const RowStore& store_;
    const SampleTokens& sample_;
    const KltAnalysis& analysis_;
    Calibration::Set set_;
    unsigned multiplier_;
    KltStates states_;
    std::vector<std::int32_t> sums_;
    double bits_ = 0;
};

}  // namespace

void fit_classes(CalibrationData& data, std::span<const LevelChoice> levels, const RowStore& store,
                 const SampleTokens& sample, const std::function<void()>& tick) {
    const auto bytes = write_calibration(data);
    if (!bytes.ok()) throw tools::Error(bytes.status().message());
    const auto calibration = Calibration::read(bytes.value());
    if (!calibration.ok()) throw tools::Error(calibration.status().message());
    const auto analysis = KltAnalysis::make(calibration.value());
    if (!analysis.ok()) throw tools::Error(analysis.status().message());

    const double values = static_cast<double>(sample.rows.size() * data.layout.values_per_token());
    data.levels.clear();
    for (const LevelChoice& level : levels) data.levels.push_back({level.multiplier, 0, 0, level.set});
    for (CalibrationUnit& unit : data.units) unit.classes.clear();
    for (std::size_t set = 0; set < data.sets; ++set) {
        for (CalibrationLevel& level : data.levels) {
            LevelFitter fitter(store, sample, *analysis.value(), set, level.multiplier);
            fitter.fit_all(data);
            if (level.set == set)
                level.millibits = static_cast<std::uint32_t>(std::lround(1000 * fitter.bits() / values));
            tick();
        }
    }
}

}  // namespace kvcast::calibrate
