#include "tools/calibrate/fit.h"

#include <Eigen/Cholesky>
#include <Eigen/Eigenvalues>
#include <Eigen/LU>
#include <algorithm>
#include <cmath>

namespace kvcast::calibrate {
namespace {

constexpr std::size_t kBlockRows = 4096;

Eigen::Index index_of(std::size_t n) {
    return static_cast<Eigen::Index>(n);
}

// Rows of a unit as they lie in the store.
using RowMap = Eigen::Map<const Matrix, 0, Eigen::OuterStride<>>;

RowMap rows_of(const Units& units, const RowStore& store, const UnitPlace& at, std::size_t first,
               std::size_t count) {
    const std::size_t plane = at.layer * units.layout.planes.size() + at.plane;
    const std::size_t width = units.width(at.plane);
    return {store.row(plane, first) + at.part * width, index_of(count), index_of(width),
            Eigen::OuterStride<>(index_of(store.width(plane)))};
}

std::vector<Source> sources_of(const UnitPlace& at, const Units& units, const FitOptions& options,
                               bool tokens) {
    std::vector<Source> out;
    for (std::size_t back = 1; back <= std::min(at.layer, options.layers_back); ++back)
        out.push_back({false, back, at.plane});
    const bool like = at.plane == 1 && units.parts[0] == units.parts[1];
    if (like && options.same_layer) out.push_back({false, 0, 0});
    if (tokens) out.push_back({true, 0, 0});
    return out;
}

// Bits per row of a Gaussian of these variances, uniformly quantised: entropy of a rounded coefficient is
// about half the logarithm of 1 + 2 pi e variance / step^2, close at high and at low rates.
double gaussian_bits(const Eigen::VectorXd& variances, double step) {
    constexpr double kTwoPiE = 17.079468445347132;
    double bits = 0;
    for (const double v : variances) bits += 0.5 * std::log2(1 + kTwoPiE * std::max(0.0, v) / (step * step));
    return bits;
}

// Second moments of rows, of which only one half is computed.
template <typename Rows>
MatrixD moments_of(const Rows& rows) {
    if (rows.cols() == 0) return {};
    Matrix lower = Matrix::Zero(rows.cols(), rows.cols());
    lower.selfadjointView<Eigen::Lower>().rankUpdate(rows.transpose());
    lower.triangularView<Eigen::StrictlyUpper>() = lower.transpose();
    return lower.cast<double>();
}

MatrixD solve_ridge(const MatrixD& moments, const MatrixD& cross, double ridge) {
    MatrixD regular = moments;
    regular.diagonal().array() += ridge * std::max(moments.diagonal().mean(), 1e-20);
    return regular.ldlt().solve(cross);
}

class Fitter {
  public:
    Fitter(const Units& units, const RowStore& rows, const Matrix& features, const FitOptions& options)
        : units_(units), rows_(rows), features_(features), options_(options) {
        history_.resize((options.layers_back + 1) * units.per_layer());
        token_moments_ = MatrixD::Zero(features.cols(), features.cols());
        each_block([&](std::size_t first, std::size_t count) {
            token_moments_ += moments_of(features.middleRows(index_of(first), index_of(count)));
        });
    }

    UnitFit fit(const UnitPlace& at, const Matrix& metric) {
        UnitFit out;
        out.metric = metric;
        out.step = options_.step;
        out.inverse_metric = metric.cast<double>().inverse().cast<float>();
        out.sources = sources_of(at, units_, options_, features_.cols() != 0);
        measure(at, out);
        regress(out);
        transform(out);
        reconstruct(at, out);
        return out;
    }

  private:
    Matrix& history(const UnitPlace& at, std::size_t layers_back, std::size_t plane) {
        const UnitPlace source = {at.layer - layers_back, plane, at.part};
        const std::size_t slot = units_.index(source) % units_.per_layer() +
                                 source.layer % (options_.layers_back + 1) * units_.per_layer();
        return history_[slot];
    }

    std::size_t source_width(const Source& s) const {
        return s.tokens ? static_cast<std::size_t>(features_.cols()) : units_.width(s.plane);
    }

    // Features of some rows side by side.
    Matrix features_of(const UnitPlace& at, const UnitFit& fit, std::size_t first, std::size_t count) {
        std::size_t width = 0;
        for (const Source& s : fit.sources) width += source_width(s);
        Matrix out(index_of(count), index_of(width));
        Eigen::Index column = 0;
        for (const Source& s : fit.sources) {
            const Matrix& from = s.tokens ? features_ : history(at, s.layers_back, s.plane);
            out.middleCols(column, from.cols()) = from.middleRows(index_of(first), index_of(count));
            column += from.cols();
        }
        return out;
    }

    template <typename Body>
    void each_block(const Body& body) const {
        for (std::size_t first = 0; first < rows_.rows(); first += kBlockRows)
            body(first, std::min(kBlockRows, rows_.rows() - first));
    }

    // Mean, rows in the metric, second moments.
    void measure(const UnitPlace& at, UnitFit& out) {
        const auto width = index_of(units_.width(at.plane));
        Eigen::VectorXd sum = Eigen::VectorXd::Zero(width);
        each_block([&](std::size_t first, std::size_t count) {
            const RowMap x = rows_of(units_, rows_, at, first, count);
            sum += x.cast<double>().colwise().sum().transpose();
            out.largest = std::max(out.largest, x.cwiseAbs().maxCoeff());
        });
        out.mean = (sum / static_cast<double>(rows_.rows())).cast<float>();
        target_.resize(index_of(rows_.rows()), width);
        std::size_t features = 0;
        for (const Source& s : out.sources) features += source_width(s);
        moments_ = MatrixD::Zero(index_of(features), index_of(features));
        cross_ = MatrixD::Zero(index_of(features), width);
        own_ = MatrixD::Zero(width, width);
        Eigen::VectorXd squares = Eigen::VectorXd::Zero(width);
        out.farthest = Eigen::VectorXf::Zero(width);
        each_block([&](std::size_t first, std::size_t count) {
            auto y = target_.middleRows(index_of(first), index_of(count));
            const Matrix centred = rows_of(units_, rows_, at, first, count).rowwise() - out.mean.transpose();
            y.noalias() = centred * out.metric.transpose();
            squares += centred.colwise().squaredNorm().transpose().cast<double>();
            out.farthest = out.farthest.cwiseMax(centred.colwise().lpNorm<Eigen::Infinity>().transpose());
            const Matrix f = features_of(at, out, first, count);
            const Matrix fy = f.transpose() * y;
            cross_ += fy.cast<double>();
            own_ += moments_of(y);
            // Token features come last, and what they are among themselves is the same for all units.
            const Eigen::Index tokens = tokens_of(out), others = f.cols() - tokens;
            moments_.topLeftCorner(others, others) += moments_of(f.leftCols(others));
            const Matrix ft = f.leftCols(others).transpose() * f.rightCols(tokens);
            moments_.topRightCorner(others, tokens) += ft.cast<double>();
        });
        out.deviation = (squares / static_cast<double>(rows_.rows())).cwiseSqrt().cast<float>();
        const Eigen::Index tokens = tokens_of(out), others = moments_.cols() - tokens;
        moments_.bottomLeftCorner(tokens, others) = moments_.topRightCorner(others, tokens).transpose();
        if (tokens != 0) moments_.bottomRightCorner(tokens, tokens) = token_moments_;
    }

    Eigen::Index tokens_of(const UnitFit& fit) const {
        return fit.sources.empty() || !fit.sources.back().tokens ? 0 : features_.cols();
    }

    // Prediction from all sources, and what the first of them alone would give.
    void regress(UnitFit& out) {
        const auto n = static_cast<double>(rows_.rows());
        const auto estimate = [&](const MatrixD& covariance) {
            const Eigen::SelfAdjointEigenSolver<MatrixD> solver(covariance / n, Eigen::EigenvaluesOnly);
            out.bits.push_back(gaussian_bits(solver.eigenvalues(), options_.step));
        };
        estimate(own_);
        Eigen::Index used = 0;
        for (std::size_t i = 0; i < out.sources.size(); ++i) {
            const Eigen::Index width = index_of(source_width(out.sources[i]));
            const MatrixD c = cross_.topRows(used + width);
            const MatrixD a =
                solve_ridge(moments_.topLeftCorner(used + width, used + width), c, options_.ridge);
            estimate(own_ - c.transpose() * a);
            const double before = out.bits[i], after = out.bits[i + 1];
            if (out.sources[i].tokens && before - after < options_.least_gain * before) {
                out.sources.resize(i);  // tokens come last
                break;
            }
            used += width;
            out.prediction = a.cast<float>();
        }
        moments_.conservativeResize(used, used);
        cross_.conservativeResize(used, cross_.cols());
        if (options_.moments) out.moments = (moments_ / n).cast<float>();
    }

    void transform(UnitFit& out) {
        MatrixD covariance = own_;
        if (out.prediction.size() != 0) {
            const MatrixD a = out.prediction.cast<double>();
            const MatrixD explained = cross_.transpose() * a;
            covariance += a.transpose() * moments_ * a - explained - explained.transpose();
        }
        const Eigen::SelfAdjointEigenSolver<MatrixD> solver(covariance / static_cast<double>(rows_.rows()));
        out.transform = solver.eigenvectors().rowwise().reverse().cast<float>();
        out.variance = solver.eigenvalues().reverse().cast<float>();
    }

    void reconstruct(const UnitPlace& at, const UnitFit& fit) {
        const auto step = static_cast<float>(options_.step);
        Matrix& out = history(at, 0, at.plane);
        out.resize(target_.rows(), target_.cols());
        each_block([&](std::size_t first, std::size_t count) {
            const auto rows = index_of(count);
            Matrix predicted = Matrix::Zero(rows, target_.cols());
            if (fit.prediction.size() != 0) predicted = features_of(at, fit, first, count) * fit.prediction;
            const Matrix residual = target_.middleRows(index_of(first), rows) - predicted;
            Matrix q = residual * fit.transform / step;
            q = q.array().rint();
            out.middleRows(index_of(first), rows).noalias() =
                predicted + step * q * fit.transform.transpose();
        });
    }

    const Units& units_;
    const RowStore& rows_;
    const Matrix& features_;
    const FitOptions& options_;
    std::vector<Matrix> history_;  // reconstructed rows in their metrics, [layer modulo reach + 1][unit]
    Matrix target_;
    MatrixD moments_, cross_, own_;
    MatrixD token_moments_;
};

}  // namespace

std::size_t Units::per_layer() const {
    std::size_t n = 0;
    for (const std::size_t p : parts) n += p;
    return n;
}

std::size_t Units::index(const UnitPlace& at) const {
    return at.layer * per_layer() + (at.plane == 0 ? 0 : parts[0]) + at.part;
}

std::vector<UnitPlace> Units::all() const {
    std::vector<UnitPlace> out;
    for (std::size_t l = 0; l < layout.layers; ++l) {
        for (std::size_t p = 0; p < parts.size(); ++p) {
            for (std::size_t i = 0; i < parts[p]; ++i) out.push_back({l, p, i});
        }
    }
    return out;
}

std::vector<Matrix> fisher_metrics(const std::vector<MatrixD>& fisher, double floor, double power) {
    double log_sum = 0;
    std::vector<double> traces;
    for (const MatrixD& f : fisher) {
        traces.push_back(std::max(f.diagonal().mean(), 1e-30));
        log_sum += std::log(traces.back());
    }
    const double centre = std::exp(log_sum / static_cast<double>(fisher.size()));
    std::vector<Matrix> out;
    for (std::size_t i = 0; i < fisher.size(); ++i) {
        MatrixD regular = fisher[i] / traces[i];
        regular.diagonal().array() += floor;
        const Eigen::SelfAdjointEigenSolver<MatrixD> solver(regular);
        const Eigen::VectorXd roots = solver.eigenvalues().cwiseMax(1e-9).cwiseSqrt();
        const MatrixD root = solver.eigenvectors() * roots.asDiagonal() * solver.eigenvectors().transpose();
        out.push_back((root * std::pow(traces[i] / centre, power / 2)).cast<float>());
    }
    return out;
}

std::vector<Matrix> identity_metrics(const Units& units, const RowStore& rows) {
    std::vector<Matrix> out;
    for (const UnitPlace& at : units.all()) {
        const auto x = rows_of(units, rows, at, 0, rows.rows());
        const Eigen::RowVectorXd mean = x.cast<double>().colwise().mean();
        double energy = 0;
        for (Eigen::Index r = 0; r < x.rows(); ++r) energy += (x.row(r).cast<double>() - mean).squaredNorm();
        const double variance = energy / static_cast<double>(x.size());
        out.push_back(Matrix::Identity(x.cols(), x.cols()) /
                      static_cast<float>(std::sqrt(std::max(variance, 1e-20))));
    }
    return out;
}

std::vector<UnitFit> fit_units(const Units& units, const RowStore& rows, const Matrix& features,
                               std::span<const Matrix> metrics, const FitOptions& options,
                               const std::function<void()>& tick) {
    Fitter fitter(units, rows, features, options);
    std::vector<UnitFit> out;
    for (const UnitPlace& at : units.all()) {
        out.push_back(fitter.fit(at, metrics[units.index(at)]));
        tick();
    }
    return out;
}

FeatureProjection project_features(const Matrix& features, std::span<const UnitFit> fits,
                                   std::size_t wanted) {
    const Eigen::Index n = features.cols();
    const MatrixD moments =
        (features.transpose() * features).cast<double>() / static_cast<double>(features.rows());
    const Eigen::SelfAdjointEigenSolver<MatrixD> spread(moments);
    const Eigen::VectorXd values = spread.eigenvalues().cwiseMax(spread.eigenvalues().maxCoeff() * 1e-6);
    const MatrixD& vectors = spread.eigenvectors();
    const MatrixD root = vectors * values.cwiseSqrt().asDiagonal() * vectors.transpose();
    const MatrixD inverse_root =
        vectors * values.cwiseSqrt().cwiseInverse().asDiagonal() * vectors.transpose();
    MatrixD gain = MatrixD::Zero(n, n);
    for (const UnitFit& fit : fits) {
        if (fit.sources.empty() || !fit.sources.back().tokens) continue;
        const MatrixD a = fit.prediction.bottomRows(n).cast<double>();
        gain += a * a.transpose();
    }
    const Eigen::SelfAdjointEigenSolver<MatrixD> best(root * gain * root);
    FeatureProjection out;
    out.matrix =
        (inverse_root * best.eigenvectors().rowwise().reverse().leftCols(index_of(wanted))).cast<float>();
    for (std::size_t i = 0; i < wanted; ++i)
        out.importance.push_back(std::max(0.0, best.eigenvalues()[n - 1 - index_of(i)]));
    return out;
}

}  // namespace kvcast::calibrate
