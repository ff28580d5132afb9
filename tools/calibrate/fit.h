// The floating-point model behind a calibration: metric, closed-loop prediction, transform.
//
// Per unit (one part of one plane of one layer) and row x:
//     y = R (x - mean)                  the metric: |error of y|^2 is what an error costs
//     prediction = f A                  from units before it, as they will be reconstructed, and token
//     features q = round((y - prediction) U / step)
// R comes from the Fisher information of the model's predictions (tools/model/fisher.h), or is a multiple of
// the identity; A by ridge regression; U is the Karhunen-Loeve transform of the residual.
#pragma once

#include <Eigen/Core>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "codec/format/layout.h"
#include "tools/calibrate/row_store.h"

namespace kvcast::calibrate {

using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using MatrixD = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

// Where a unit stands, and what it may be predicted from.
struct UnitPlace {
    std::size_t layer = 0;
    std::size_t plane = 0;
    std::size_t part = 0;
};

struct Source {
    bool tokens = false;
    std::size_t layers_back = 0;  // of a unit
    std::size_t plane = 0;
};

struct FitOptions {
    double step = 0.7;            // of the closed loop, in the metric
    std::size_t layers_back = 2;  // how many earlier layers of the same plane predict
    bool same_layer = true;       // V from K
    double least_gain = 0.01;     // token features are used where they save this share of a unit's bits
    double ridge = 1e-3;          // of the mean diagonal of the features' second moments
    bool moments = true;          // kept in fits: to_integers() wants them
};

struct UnitFit {
    Eigen::VectorXf mean;
    Eigen::VectorXf deviation;  // standard, of channels
    Eigen::VectorXf farthest;   // from the mean, of channels
    Matrix metric;              // R
    Matrix inverse_metric;      // R^-1
    std::vector<Source> sources;
    Matrix prediction;  // A, rows in the order of the sources
    Matrix moments;     // second ones of the features, in the same order, where they were asked for
    Matrix transform;   // U, columns by falling variance
    Eigen::VectorXf variance;
    float largest = 0;         // magnitude in the rows
    double step = 0;           // of the closed loop that it was made in
    std::vector<double> bits;  // estimated bits per row with none, one, ... all sources that were tried
};

// How a layout's planes are split.
struct Units {
    Layout layout;
    std::vector<std::size_t> parts;  // [plane]

    std::size_t width(std::size_t plane) const { return layout.planes[plane].width() / parts[plane]; }
    std::size_t per_layer() const;
    std::size_t index(const UnitPlace& at) const;
    std::vector<UnitPlace> all() const;
};

// Metrics [unit] from Fisher matrices (second moments of gradients, widths squared): regularised by `floor`
// of the mean eigenvalue, planes weighted by the power of their traces.
std::vector<Matrix> fisher_metrics(const std::vector<MatrixD>& fisher, double floor = 0.1,
                                   double power = 0.8);

// Every plane by one over its standard deviation.
std::vector<Matrix> identity_metrics(const Units& units, const RowStore& rows);

// Fits all units in order. `features` [row][width of features], may have no columns. `tick` per unit.
std::vector<UnitFit> fit_units(const Units& units, const RowStore& rows, const Matrix& features,
                               std::span<const Matrix> metrics, const FitOptions& options,
                               const std::function<void()>& tick);

struct FeatureProjection {
    Matrix matrix;                   // [features][wanted]; columns of features * matrix have variance 1
    std::vector<double> importance;  // [wanted], falling: what a column's variance explains in the metric
};

// The projection that keeps what predicts best in `fits`.
FeatureProjection project_features(const Matrix& features, std::span<const UnitFit> fits, std::size_t wanted);

}  // namespace kvcast::calibrate
