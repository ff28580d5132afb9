#include "tools/calibrate/integers.h"

#include <Eigen/Eigenvalues>
#include <algorithm>
#include <cmath>
#include <iterator>
#include <optional>
#include <utility>

namespace kvcast::calibrate {
namespace {

using Limits = CalibrationLimits;

constexpr float kTokenFeatureScale = 127.0f / 4;

// Features of states reach as far as any that was seen, but for freaks. Few tokens are far out, but cutting
// them off at six deviations makes the KL divergence 1.1 times as high, while rounding is nowhere seen.
constexpr float kMostDeviations = 24;

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

// A matrix with the shifts that it is to be rounded with.
struct Fine {
    MatrixD entries;                   // times 2^shift
    std::vector<std::uint8_t> shifts;  // [output]

    Eigen::Index inputs() const { return entries.cols(); }

    // [output]: what an entry of 1 counts.
    Eigen::VectorXd steps() const {
        Eigen::VectorXd out(entries.rows());
        for (Eigen::Index o = 0; o < out.size(); ++o)
            out[o] = std::ldexp(1.0, -int{shifts[static_cast<std::size_t>(o)]});
        return out;
    }
};

// Nothing where a row does not fit.
std::optional<Fine> scaled(const MatrixD& m, const Rounding& rounding) {
    Fine out = {m, {}};
    for (Eigen::Index o = 0; o < m.rows(); ++o) {
        unsigned shift = shift_for(&m(o, 0), static_cast<std::size_t>(m.cols()), rounding.bits);
        if (shift == 0) return std::nullopt;
        if (!rounding.noise.empty())
            shift = std::min(shift,
                             shift_for_noise(rounding.noise[static_cast<std::size_t>(o)], rounding.energy));
        out.shifts.push_back(static_cast<std::uint8_t>(shift));
        out.entries.row(o) *= std::ldexp(1.0, static_cast<int>(shift));
    }
    return out;
}

ShiftedMatrix rounded(const Fine& m) {
    ShiftedMatrix out = {m.shifts.size(), static_cast<std::size_t>(m.inputs()), {}, m.shifts};
    out.entries.resize(out.outputs * out.inputs);
    std::transform(m.entries.data(), m.entries.data() + m.entries.size(), out.entries.begin(),
                   [](double e) { return static_cast<std::int16_t>(std::lround(e)); });
    return out;
}

// Column i is what an error of column i means for the columns after it: the Cholesky factor of the inverse of
// the moments. Nothing where they have no inverse.
std::optional<MatrixD> spread_of_errors(const MatrixD& moments) {
    constexpr double kDamping = 0.01;  // of the mean moment
    MatrixD regular = moments;
    regular.diagonal().array() += kDamping * std::max(moments.diagonal().mean(), 1e-20);
    const Eigen::LLT<MatrixD> solver(regular);
    if (solver.info() != Eigen::Success) return std::nullopt;
    const Eigen::LLT<MatrixD> factor(solver.solve(MatrixD::Identity(moments.rows(), moments.cols())));
    if (factor.info() != Eigen::Success) return std::nullopt;
    return factor.matrixL();
}

// Rounds matrices that are applied to features side by side, so that what rounding one column does is made up
// for, as far as it can be, by the columns after it: E. Frantar et al., "GPTQ", ICLR 2023, section 3.
// Features are alike, and their errors would add up. `moments` are second ones of all features.
std::vector<ShiftedMatrix> rounded_together(const std::vector<Fine>& terms, const MatrixD& moments,
                                            unsigned bits) {
    std::vector<ShiftedMatrix> out;
    const std::optional<MatrixD> spread = spread_of_errors(moments);
    if (!spread) {
        std::transform(terms.begin(), terms.end(), std::back_inserter(out), rounded);
        return out;
    }
    const Eigen::Index outputs = terms.front().entries.rows(), inputs = moments.cols();
    const double most = std::ldexp(1.0, static_cast<int>(bits) - 1) - 1;
    Eigen::MatrixXd real(outputs, inputs);  // by columns
    Eigen::Index first = 0;
    for (const Fine& t : terms) {
        real.middleCols(first, t.inputs()) = t.steps().asDiagonal() * t.entries;
        first += t.inputs();
    }
    Eigen::MatrixXd wanted = real;
    first = 0;
    for (const Fine& t : terms) {
        Fine whole = t;
        const Eigen::VectorXd steps = t.steps();
        for (Eigen::Index i = 0; i < t.inputs(); ++i, ++first) {
            const Eigen::VectorXd entries =
                wanted.col(first).cwiseQuotient(steps).array().rint().cwiseMax(-most).cwiseMin(most);
            whole.entries.col(i) = entries;
            const Eigen::VectorXd error =
                (wanted.col(first) - entries.cwiseProduct(steps)) / (*spread)(first, first);
            const Eigen::Index behind = inputs - first - 1;
            wanted.rightCols(behind).noalias() -= error * spread->col(first).tail(behind).transpose();
        }
        // A row that has come to exceed what a calibration may have is rounded by itself, and asks nothing of
        // the columns after it.
        for (Eigen::Index o = 0; o < outputs; ++o) {
            if (whole.entries.row(o).cwiseAbs().sum() <= Limits::kRowNorm) continue;
            whole.entries.row(o) = t.entries.row(o);
            wanted.row(o).tail(inputs - first) = real.row(o).tail(inputs - first);
        }
        out.push_back(rounded(whole));
    }
    return out;
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

// The factor with which a state's feature reaches so far.
std::int16_t feature_factor(float reach) {
    const float factor = std::ldexp(127 / std::max(reach, 1e-30f), 15);
    return static_cast<std::int16_t>(
        std::lround(std::clamp(factor, static_cast<float>(kernels::kLeastFeatureFactor), 32767.0f)));
}

// [channel]: what one of a unit's features counts for where matrices take them.
Eigen::VectorXd feature_units(const CalibrationUnit& unit) {
    Eigen::VectorXd out(static_cast<Eigen::Index>(unit.feature_factors.size()));
    for (Eigen::Index c = 0; c < out.size(); ++c) {
        const std::int16_t factor = unit.feature_factors[static_cast<std::size_t>(c)];
        out[c] = std::ldexp(unit_of(unit.scale), 15) / factor / kernels::kFeatureWeight;
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
        const float unit = unit_of(out.scale);
        for (const float m : fit.mean)
            out.bias.push_back(
                static_cast<std::int16_t>(std::lround(std::clamp(m / unit, -32768.0f, 32767.0f))));
        const Eigen::VectorXf reach = fit.farthest.cwiseMin(kMostDeviations * fit.deviation);
        for (const float r : reach) out.feature_factors.push_back(feature_factor(r / unit));
        return out;
    }

  private:
    bool fill(const UnitPlace& at, const UnitFit& fit, std::span<const CalibrationUnit> before,
              CalibrationUnit& out) const {
        const double unit = unit_of(out.scale);
        const MatrixD back = fit.inverse_metric.cast<double>() / unit;
        const auto transform =
            scaled(back * fit.transform.cast<double>() * options_.unit_step, {options_.transform_bits});
        if (!transform) return false;
        out.transform = rounded(*transform);
        out.classes.assign(units_.width(at.plane), 0);
        out.terms.clear();
        if (fit.sources.empty()) return true;
        Rounding rounding = {options_.term_bits, noise_of(fit, unit)};
        std::vector<Fine> matrices;
        MatrixD from_fit = MatrixD::Zero(fit.moments.rows(), fit.moments.cols());
        Eigen::Index row = 0;
        for (const Source& s : fit.sources) {
            PredictionTerm& term = out.terms.emplace_back();
            term.source = s.tokens ? PredictionTerm::Source::kTokens : PredictionTerm::Source::kUnit;
            term.layers_back = s.layers_back;
            term.plane = s.plane;
            const TermFeatures f =
                s.tokens ? of_tokens(fit.prediction.rows() - row)
                         : of_unit(units_.index({at.layer - s.layers_back, s.plane, at.part}), before);
            const Eigen::Index count = f.to_fit.rows();
            from_fit.block(row, row, count, count) = f.from_fit;
            rounding.energy = f.energy;
            const MatrixD a = fit.prediction.middleRows(row, count).cast<double>();
            auto matrix = scaled(back * a.transpose() * f.to_fit, rounding);
            if (!matrix) return false;
            matrices.push_back(std::move(*matrix));
            row += count;
        }
        const MatrixD moments = from_fit * fit.moments.cast<double>() * from_fit.transpose();
        auto together = rounded_together(matrices, moments, options_.term_bits);
        for (std::size_t t = 0; t < together.size(); ++t) out.terms[t].matrix = std::move(together[t]);
        return true;
    }

    // Features as a term's matrix takes them, beside those of the fit.
    struct TermFeatures {
        MatrixD to_fit;
        MatrixD from_fit;
        double energy;  // their variances together
    };

    static TermFeatures of_tokens(Eigen::Index count) {
        constexpr double kDeviation = kTokenFeatureScale * kernels::kFeatureWeight;
        const MatrixD identity = MatrixD::Identity(count, count);
        return {identity / kDeviation, identity * kDeviation,
                static_cast<double>(count) * kDeviation * kDeviation};
    }

    TermFeatures of_unit(std::size_t from, std::span<const CalibrationUnit> before) const {
        const UnitFit& fit = fits_[from];
        const Eigen::VectorXd units = feature_units(before[from]);
        return {fit.metric.cast<double>() * units.asDiagonal(),
                units.cwiseInverse().asDiagonal() * fit.inverse_metric.cast<double>(),
                fit.deviation.cast<double>().cwiseQuotient(units).squaredNorm()};
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
        // A step of 2^shift / kTokenFeatureScale standard deviations adds a twelfth of its square.
        const double step = std::sqrt(12 * noise / std::max(i, 1e-30));
        out.push_back(
            static_cast<unsigned>(std::clamp(std::round(std::log2(step * kTokenFeatureScale)), 0.0, 7.0)));
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
            const float entry = x * (kTokenFeatureScale / static_cast<float>(unit));
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
                static_cast<float>(row[i]) / kTokenFeatureScale;
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
