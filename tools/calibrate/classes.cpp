#include "tools/calibrate/classes.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "codec/entropy/model.h"
#include "codec/klt/gain.h"
#include "codec/klt/klt_analysis.h"
#include "codec/klt/reconstruction.h"
#include "kernels/klt_choice.h"
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

    std::span<std::int16_t> row(std::size_t token) { return std::span(q).subspan(token * width, width); }
};

// How often a coefficient has which value beside which gain.
class ValueCounts {
  public:
    ValueCounts(const UnitCoefficients& unit, std::size_t coefficient) {
        const auto value = [&](std::size_t t) { return int{unit.q[t * unit.width + coefficient]}; };
        for (std::size_t t = 0; t < unit.gains.size(); ++t) most_ = std::max(most_, std::abs(value(t)));
        counts_.resize(kGains * values());
        for (std::size_t t = 0; t < unit.gains.size(); ++t) {
            const int gain = unit.gains[t] + kernels::kKltGainMost, column = value(t) + most_;
            ++counts_[static_cast<std::size_t>(gain) * values() + static_cast<std::size_t>(column)];
        }
    }

    // What coding all of them costs with a class at gain 0.
    std::uint64_t cost(std::int8_t base) const {
        std::uint64_t sum = 0;
        const std::uint32_t* count = counts_.data();
        for (int gain = -kernels::kKltGainMost; gain <= kernels::kKltGainMost; ++gain) {
            const unsigned c = klt_class(base, static_cast<std::int16_t>(gain));
            for (int value = -most_; value <= most_; ++value, ++count) {
                if (*count != 0) sum += *count * klt_cost(c, value);
            }
        }
        return sum;
    }

  private:
    static constexpr std::size_t kGains = kernels::kKltGainsTried;

    std::size_t values() const { return 2 * static_cast<std::size_t>(most_) + 1; }

    int most_ = 0;                       // magnitude
    std::vector<std::uint32_t> counts_;  // [gain][value]
};

// The class with which a coefficient costs least over all tokens, given their gains.
std::int8_t best_class(const UnitCoefficients& unit, std::size_t coefficient) {
    const ValueCounts counts(unit, coefficient);
    std::int8_t best = kLowest;
    std::uint64_t least = counts.cost(best);
    for (std::int8_t base = kLowest + 1; base <= kHighest; ++base) {
        const std::uint64_t cost = counts.cost(base);
        if (cost < least) best = base;
        least = std::min(least, cost);
    }
    return best;
}

void choose_gains(UnitCoefficients& unit, std::span<const std::int8_t> classes) {
    const GainChooser gains(classes);
    for (std::size_t t = 0; t < unit.gains.size(); ++t)
        unit.gains[t] = gains.cheapest(kernels::best_ops(), unit.row(t));
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
                states_.make_starts(ops(), l, p, {0, states_.ids()});
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
    // Classes [coefficient] of a unit; units come in order.
    std::vector<std::int8_t> fit(std::size_t layer, std::size_t plane, std::size_t part) {
        const CalibrationData& data = analysis_.calibration().data();
        UnitCoefficients unit;
        unit.width = data.part_width(plane);
        quantise(layer, plane, part, unit);
        std::vector<std::int8_t> classes(unit.width);
        for (int round = 0; round < kRounds; ++round) {
            for (std::size_t i = 0; i < unit.width; ++i) classes[i] = best_class(unit, i);
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
        std::vector<float> residual(width);
        std::vector<std::int16_t> integers(tokens * width);
        std::vector<float> units(tokens);
        const std::size_t plane_index = layer * analysis_.calibration().data().layout.planes.size() + plane;
        for (std::size_t t = 0; t < tokens; ++t) {
            const float* x = store_.row(plane_index, sample_.rows[t]) + part * width;
            for (std::size_t c = 0; c < width; ++c)
                residual[c] = x[c] * inverse_unit - static_cast<float>(sums_[t * width + c]);
            const int exponent = ops().share_exponent(residual.data(), width, integers.data() + t * width);
            units[t] = kernels::power_of_two(-exponent);
        }
        const std::size_t index = set_.index(layer, plane, part);
        std::vector<std::int32_t> coefficients(tokens * width);
        analysis_.multiply(ops(), index, integers.data(), tokens, width, coefficients.data());
        unit.q.resize(tokens * width);
        unit.gains.assign(tokens, 0);
        for (std::size_t t = 0; t < tokens; ++t) {
            const float inverse_step = units[t] * analysis_.fraction(index) / static_cast<float>(multiplier_);
            const std::int32_t* from = coefficients.data() + t * width;
            for (std::int16_t& q : unit.row(t)) {
                const float steps = std::nearbyint(static_cast<float>(*from++) * inverse_step);
                q = static_cast<std::int16_t>(
                    std::clamp(steps, -kernels::kKltCoefficientMost, kernels::kKltCoefficientMost));
            }
        }
    }

    void reconstruct(std::size_t layer, std::size_t plane, std::size_t part,
                     std::span<const std::int8_t> classes, UnitCoefficients& unit) {
        const std::size_t tokens = unit.gains.size(), width = unit.width;
        for (std::size_t t = 0; t < tokens; ++t) {
            const auto row = unit.row(t);
            for (std::size_t i = 0; i < width; ++i) {
                const unsigned c = klt_class(classes[i], unit.gains[t]);
                if (c != 0) bits_ += static_cast<double>(klt_cost(c, row[i])) / 256;
                row[i] = c == 0 ? std::int16_t{0} : kernels::scaled_coefficient(row[i], multiplier_);
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
