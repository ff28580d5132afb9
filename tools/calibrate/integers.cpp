#include "tools/calibrate/integers.h"

#include <Eigen/Eigenvalues>
#include <algorithm>
#include <cmath>
#include <iterator>
#include <utility>

namespace kvcast::calibrate {
namespace {

using Limits = CalibrationLimits;

constexpr float kFeatureScale = 127.0f / 4;

// The finest scale, a power of two, whose states hold `largest`.
kernels::Scale scale_for(double largest) {
    const int exponent = static_cast<int>(std::ceil(std::log2(std::max(largest, 1e-30) / 32767)));
    return {128, std::clamp(exponent - 7, kernels::kMinExponent, kernels::kMaxExponent)};
}

// The largest shift with which a row keeps inside its bounds; 0 where none does.
unsigned shift_for(const double* row, std::size_t inputs, unsigned bits) {
    double norm = 0, largest = 0;
    for (std::size_t i = 0; i < inputs; ++i) {
        norm += std::abs(row[i]);
        largest = std::max(largest, std::abs(row[i]));
    }
    // Rounding adds at most half a unit per entry.
    const double room = static_cast<double>(Limits::kRowNorm) - 0.5 * static_cast<double>(inputs);
    const double most = std::ldexp(1.0, static_cast<int>(bits) - 1) - 1;
    for (unsigned shift = Limits::kShiftMax; shift >= Limits::kShiftMin; --shift) {
        if (std::ldexp(norm, static_cast<int>(shift)) <= room &&
            std::ldexp(largest, static_cast<int>(shift)) <= most)
            return shift;
    }
    return 0;
}

// The least shift with which rounding a row's entries adds no more than `most` to the variance of its output,
// for inputs whose variances sum to `energy`.
unsigned shift_for_noise(double most, double energy) {
    const double shift = 0.5 * std::log2(std::max(energy / (12 * most), 1e-30));
    return static_cast<unsigned>(
        std::clamp(std::ceil(shift), double{Limits::kShiftMin}, double{Limits::kShiftMax}));
}

// How finely a matrix is rounded.
struct Rounding {
    unsigned bits;
    std::vector<double> noise = {};  // [output]: variance that it may add; empty: as fine as bits allow
    double energy = 0;               // of the inputs
};

// False where a row does not fit.
bool to_shifted(const MatrixD& m, const Rounding& rounding, ShiftedMatrix& out) {
    out = {static_cast<std::size_t>(m.rows()), static_cast<std::size_t>(m.cols()), {}, {}};
    for (std::size_t o = 0; o < out.outputs; ++o) {
        const double* row = m.data() + o * out.inputs;
        unsigned shift = shift_for(row, out.inputs, rounding.bits);
        if (shift == 0) return false;
        if (!rounding.noise.empty())
            shift = std::min(shift, shift_for_noise(rounding.noise[o], rounding.energy));
        out.shifts.push_back(static_cast<std::uint8_t>(shift));
        for (std::size_t i = 0; i < out.inputs; ++i)
            out.entries.push_back(
                static_cast<std::int16_t>(std::lround(std::ldexp(row[i], static_cast<int>(shift)))));
    }
    return true;
}

MatrixD to_real(const ShiftedMatrix& m) {
    MatrixD out(static_cast<Eigen::Index>(m.outputs), static_cast<Eigen::Index>(m.inputs));
    for (std::size_t o = 0; o < m.outputs; ++o) {
        for (std::size_t i = 0; i < m.inputs; ++i) {
            out(static_cast<Eigen::Index>(o), static_cast<Eigen::Index>(i)) =
                std::ldexp(m.entries[o * m.inputs + i], -int{m.shifts[o]});
        }
    }
    return out;
}

class Converter {
  public:
    Converter(const Units& units, std::span<const UnitFit> fits, const IntegerOptions& options)
        : units_(units), fits_(fits), options_(options) {}

    CalibrationUnit convert(const UnitPlace& at, std::span<const CalibrationUnit> before) const {
        const UnitFit& fit = fits_[units_.index(at)];
        CalibrationUnit out;
        out.scale = scale_for(options_.headroom * fit.largest);
        // A coarser scale until every row fits: the transform's rows are the ones that may not.
        while (!fill(at, fit, before, out)) ++out.scale.exponent;
        return out;
    }

  private:
    bool fill(const UnitPlace& at, const UnitFit& fit, std::span<const CalibrationUnit> before,
              CalibrationUnit& out) const {
        const double unit = unit_of(out.scale);
        const MatrixD back = fit.inverse_metric.cast<double>() / unit;
        if (!to_shifted(back * fit.transform.cast<double>() * options_.unit_step, {options_.transform_bits},
                        out.transform))
            return false;
        Rounding rounding = {options_.term_bits, noise_of(fit, unit)};
        Eigen::VectorXd bias = fit.mean.cast<double>() / unit;
        out.terms.clear();
        Eigen::Index row = 0;
        for (const Source& s : fit.sources) {
            PredictionTerm& term = out.terms.emplace_back();
            term.source = s.tokens ? PredictionTerm::Source::kTokens : PredictionTerm::Source::kUnit;
            term.layers_back = s.layers_back;
            term.plane = s.plane;
            MatrixD forward;  // source states to features
            Eigen::VectorXd mean;
            if (s.tokens) {
                const Eigen::Index n = fit.prediction.rows() - row;
                forward = MatrixD::Identity(n, n) / kFeatureScale;
                mean = Eigen::VectorXd::Zero(n);
                rounding.energy = static_cast<double>(n) * kFeatureScale * kFeatureScale;
            } else {
                const std::size_t from = units_.index({at.layer - s.layers_back, s.plane, at.part});
                const double source_unit = unit_of(before[from].scale);
                forward = fits_[from].metric.cast<double>() * source_unit;
                mean = fits_[from].mean.cast<double>() / source_unit;
                rounding.energy = fits_[from].energy / (source_unit * source_unit);
            }
            const MatrixD a = fit.prediction.middleRows(row, forward.rows()).cast<double>();
            row += forward.rows();
            if (!to_shifted(back * a.transpose() * forward, rounding, term.matrix)) return false;
            bias -= to_real(term.matrix) * mean;
        }
        out.bias.clear();
        for (const double b : bias) {
            if (std::abs(b) > Limits::kBias) return false;
            out.bias.push_back(static_cast<std::int32_t>(std::lround(b)));
        }
        out.classes.assign(units_.width(at.plane), 0);
        return true;
    }

    // [channel]: what rounding may add to a state's variance, so that all channels add the same in the
    // metric.
    std::vector<double> noise_of(const UnitFit& fit, double unit) const {
        const double most = options_.rounding * fit.step * fit.step;
        std::vector<double> out;
        for (Eigen::Index c = 0; c < fit.metric.cols(); ++c) {
            const double weight = unit * unit * fit.metric.col(c).cast<double>().squaredNorm();
            out.push_back(most / weight);
        }
        return out;
    }

    const Units& units_;
    std::span<const UnitFit> fits_;
    const IntegerOptions& options_;
};

}  // namespace

std::vector<unsigned> feature_shifts(std::span<const double> importance, double noise) {
    std::vector<unsigned> out;
    for (const double i : importance) {
        // A step of 2^shift / kFeatureScale standard deviations adds a twelfth of its square.
        const double step = std::sqrt(12 * noise / std::max(i, 1e-30));
        out.push_back(
            static_cast<unsigned>(std::clamp(std::round(std::log2(step * kFeatureScale)), 0.0, 7.0)));
    }
    return out;
}

TokenTable token_table(const Matrix& features, std::span<const unsigned> shifts) {
    TokenTable out;
    out.features = static_cast<std::size_t>(features.cols());
    out.vocabulary = out.features == 0 ? 0 : static_cast<std::size_t>(features.rows());
    out.shifts.assign(shifts.begin(), shifts.end());
    for (std::size_t t = 0; t < out.vocabulary; ++t) {
        for (std::size_t f = 0; f < out.features; ++f) {
            const int unit = 1 << shifts[f], most = 127 / unit;
            const float x = features(static_cast<Eigen::Index>(t), static_cast<Eigen::Index>(f));
            const float entry = x * (kFeatureScale / static_cast<float>(unit));
            const auto limited = std::clamp(entry, static_cast<float>(-most), static_cast<float>(most));
            out.rows.push_back(static_cast<std::int8_t>(std::lround(limited) * unit));
        }
    }
    return out;
}

Matrix token_features(const TokenTable& table, std::span<const std::int32_t> token_ids) {
    Matrix out(static_cast<Eigen::Index>(token_ids.size()), static_cast<Eigen::Index>(table.features));
    std::vector<std::int16_t> row(table.features);
    for (std::size_t t = 0; t < token_ids.size(); ++t) {
        table.unpack(token_ids[t], row.data());
        for (std::size_t i = 0; i < row.size(); ++i) {
            out(static_cast<Eigen::Index>(t), static_cast<Eigen::Index>(i)) =
                static_cast<float>(row[i]) / kFeatureScale;
        }
    }
    return out;
}

CalibrationData to_integers(const Units& units, std::span<const std::vector<UnitFit>> sets,
                            const TokenTable& tokens, const std::string& model,
                            const IntegerOptions& options) {
    CalibrationData out;
    out.model = model;
    out.layout = units.layout;
    out.parts = units.parts;
    out.sets = sets.size();
    out.levels = {{1, 0, 0, 0}};
    out.tokens = tokens;
    for (const std::vector<UnitFit>& fits : sets) {
        const Converter converter(units, fits, options);
        std::vector<CalibrationUnit> set;
        for (const UnitPlace& at : units.all()) set.push_back(converter.convert(at, set));
        std::move(set.begin(), set.end(), std::back_inserter(out.units));
    }
    return out;
}

std::vector<Matrix> calibrated_metrics(const CalibrationData& data, double unit_step) {
    std::vector<Matrix> out;
    const std::size_t units = data.units.size() / data.sets;
    for (const CalibrationUnit& unit : std::span(data.units).first(units)) {
        const MatrixD t = to_real(unit.transform) * (unit_of(unit.scale) / unit_step);
        const Eigen::SelfAdjointEigenSolver<MatrixD> solver(t * t.transpose());
        const MatrixD& u = solver.eigenvectors();
        const double least = 1e-12 * solver.eigenvalues().maxCoeff();
        out.push_back(
            (u * solver.eigenvalues().cwiseMax(least).cwiseSqrt().cwiseInverse().asDiagonal() * u.transpose())
                .cast<float>());
    }
    return out;
}

}  // namespace kvcast::calibrate
