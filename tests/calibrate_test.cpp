// Calibration on rows whose statistics are known.
#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "codec/decoder.h"
#include "codec/encoder.h"
#include "tools/calibrate/classes.h"
#include "tools/calibrate/fit.h"
#include "tools/calibrate/integers.h"

namespace kvcast::calibrate {
namespace {

constexpr std::size_t kLayers = 3, kHeads = 2, kDim = 16, kWidth = kHeads * kDim, kRows = 3000;
constexpr std::size_t kVocabulary = 50, kFeatures = 4;
constexpr unsigned kShifts[kFeatures] = {0, 0, 4, 4};

// Rows of low rank that the layer before, K, and the token all help to predict, and a little noise.
struct World {
    Units units;
    std::vector<std::int32_t> ids;
    Matrix features{kRows, kFeatures};
    RowStore rows{std::vector<std::size_t>(2 * kLayers, kWidth), kRows};
    TokenTable table;

    explicit World(std::vector<std::size_t> parts) {
        units.layout.layers = kLayers;
        units.layout.planes = {{kHeads, kDim}, {kHeads, kDim}};
        units.parts = std::move(parts);
        std::mt19937 random(7);
        std::normal_distribution<float> normal;
        const auto matrix = [&](std::size_t r, std::size_t c) {
            Matrix m(static_cast<Eigen::Index>(r), static_cast<Eigen::Index>(c));
            for (Eigen::Index i = 0; i < m.size(); ++i) m.data()[i] = normal(random);
            return m;
        };
        table = token_table(matrix(kVocabulary, kFeatures), kShifts);
        for (std::size_t t = 0; t < kRows; ++t)
            ids.push_back(static_cast<std::int32_t>(random() % kVocabulary));
        features = token_features(table, ids);
        const Matrix latent = matrix(kRows, 6);
        for (std::size_t p = 0; p < 2 * kLayers; ++p) {
            Matrix x = latent * matrix(6, kWidth) + 0.5f * features * matrix(kFeatures, kWidth) +
                       0.1f * matrix(kRows, kWidth);
            x.array() += static_cast<float>(p);
            rows.append(p, {x.data(), static_cast<std::size_t>(x.size())});
        }
        rows.advance(kRows);
    }
};

std::vector<UnitFit> fit(const World& w, const FitOptions& options, bool tokens = true) {
    const auto metrics = identity_metrics(w.units, w.rows);
    return fit_units(w.units, w.rows, tokens ? w.features : Matrix(), metrics, options, [] {});
}

TEST(Fit, EveryIngredientHelps) {
    const World w({1, 1});
    FitOptions options;
    options.step = 0.2;
    for (const UnitFit& f : fit(w, options)) {
        EXPECT_EQ(f.bits.size(), f.sources.size() + 1);
        for (std::size_t i = 0; i + 1 < f.bits.size(); ++i) EXPECT_LE(f.bits[i + 1], f.bits[i] + 1e-6);
        for (Eigen::Index i = 0; i + 1 < f.variance.size(); ++i) EXPECT_GE(f.variance[i], f.variance[i + 1]);
        const Matrix identity = f.transform.transpose() * f.transform;
        EXPECT_LT((identity - Matrix::Identity(identity.rows(), identity.cols())).cwiseAbs().maxCoeff(),
                  1e-4);
    }
    const auto fits = fit(w, options);
    const UnitFit& last = fits.back();  // V of layer 2: two layers before, K, tokens
    EXPECT_EQ(last.sources.size(), 4u);
    EXPECT_LT(last.bits.back(), 0.8 * last.bits.front());
}

TEST(Fit, TokensAreLeftOutWhereTheySaveNothing) {
    const World w({1, 1});
    FitOptions options;
    options.least_gain = 0.9;
    for (const UnitFit& f : fit(w, options)) EXPECT_TRUE(f.sources.empty() || !f.sources.back().tokens);
}

TEST(Fisher, MetricsWeighPlanesByTheirTraces) {
    MatrixD a = MatrixD::Identity(4, 4), b = 16 * MatrixD::Identity(4, 4);
    const auto metrics = fisher_metrics({a, b}, 0.1, 1.0);
    EXPECT_NEAR(metrics[1](0, 0) / metrics[0](0, 0), 4, 1e-4);
    EXPECT_NEAR(metrics[0](0, 0) * metrics[1](0, 0), 1.1, 1e-4);
}

// The whole way: fit, integers, classes, and the codec on rows that it has not seen the classes of.
void expect_closed_loop(const std::vector<std::size_t>& parts) {
    const World w(parts);
    FitOptions options;
    options.step = 0.3;
    const std::vector<std::vector<UnitFit>> sets = {fit(w, options)};
    CalibrationData data = to_integers(w.units, sets, w.table, "m", {});
    SampleTokens sample;
    for (std::size_t r = 0; r < kRows; r += 5) {
        sample.rows.push_back(r);
        sample.token_ids.push_back(w.ids[r]);
    }
    const LevelChoice levels[] = {{4, 0}, {16, 0}};
    fit_classes(data, levels, w.rows, sample, [] {});
    ASSERT_EQ(data.levels.size(), 2u);
    EXPECT_LT(data.levels[1].millibits, data.levels[0].millibits);
    const auto bytes = write_calibration(data);
    ASSERT_TRUE(bytes.ok()) << bytes.status().message();
    EncodeOptions o;
    o.profile = Profile::kKlt;
    o.sinks = 0;
    o.calibration = Calibration::read(bytes.value()).value();
    Layout layout = w.units.layout;
    layout.dtype = Dtype::kF32;
    const std::size_t tokens = 200, first = 401;
    const std::span<const std::int32_t> ids = std::span(w.ids).subspan(first, tokens);
    std::vector<PlaneRows> input;
    std::vector<std::vector<float>> decoded(2 * kLayers, std::vector<float>(tokens * kWidth));
    std::vector<PlaneBuffer> output;
    for (std::size_t p = 0; p < 2 * kLayers; ++p) {
        input.push_back({w.rows.row(p, first), kWidth * sizeof(float)});
        output.push_back({decoded[p].data(), kWidth * sizeof(float)});
    }
    const auto metrics = identity_metrics(w.units, w.rows);
    for (unsigned level = 1; level <= 2; ++level) {
        o.level = level;
        ChunkEncoder encoder(o);
        SerialExecutor serial;
        std::vector<std::uint8_t> object;
        Hash chain = {};
        EncodeReport report;
        ASSERT_TRUE(
            encoder.encode({&layout, "m", "", ids, 1, 0, chain, input}, serial, object, chain, &report).ok());
        const double values = static_cast<double>(tokens * kWidth * 2 * kLayers);
        EXPECT_NEAR((report.ideal.payload) / values, data.levels[level - 1].millibits / 1000.0, 0.1);
        const auto decoder = ChunkDecoder::open(object, {.calibration = o.calibration});
        std::vector<DecodeWorkspace> workspaces(1);
        ASSERT_TRUE(decoder.value().decode(output, serial, workspaces).ok());
        // Quantisation noise is at most that of a uniform quantiser of the level's step, in the metric.
        const double step = levels[level - 1].multiplier / 32.0;
        for (const UnitPlace& at : w.units.all()) {
            const std::size_t plane = 2 * at.layer + at.plane, width = w.units.width(at.plane);
            const double scale = metrics[w.units.index(at)](0, 0);
            double energy = 0;
            for (std::size_t t = 0; t < tokens; ++t) {
                for (std::size_t c = at.part * width; c < (at.part + 1) * width; ++c) {
                    const double e = double{decoded[plane][t * kWidth + c]} - w.rows.row(plane, first + t)[c];
                    energy += e * e * scale * scale;
                }
            }
            EXPECT_LT(std::sqrt(energy / static_cast<double>(tokens * width)), step * 0.33) << plane;
        }
    }
}

TEST(Calibrate, TheCodecKeepsWhatTheFitPromises) {
    expect_closed_loop({1, 1});
}

TEST(Calibrate, SoItDoesWithSplitPlanes) {
    expect_closed_loop({2, 2});
}

TEST(Rounding, CoarserPredictionsMakeASmallerFile) {
    const World w({1, 1});
    FitOptions options;
    options.step = 0.3;
    const std::vector<std::vector<UnitFit>> sets = {fit(w, options)};
    std::size_t before = ~std::size_t{0};
    for (const double rounding : {1e-8, 1e-4, 1e-2}) {
        IntegerOptions integers;
        integers.rounding = rounding;
        const auto bytes = write_calibration(to_integers(w.units, sets, w.table, "m", integers));
        ASSERT_TRUE(bytes.ok());
        EXPECT_LT(bytes.value().size(), before) << rounding;
        before = bytes.value().size();
    }
}

// A unit's features at all rows, neither rounded nor cut off, as often as they count.
Matrix features_of(const World& w, const CalibrationData& data, std::size_t unit) {
    const CalibrationUnit& from = data.units[unit];
    Matrix out(kRows, kWidth);
    for (std::size_t t = 0; t < kRows; ++t) {
        for (std::size_t c = 0; c < kWidth; ++c) {
            const float state = w.rows.row(unit, t)[c] / kernels::unit_of(from.scale);
            out(static_cast<Eigen::Index>(t), static_cast<Eigen::Index>(c)) =
                (state - from.bias[c]) * std::ldexp(static_cast<float>(from.feature_factors[c]), -15) *
                kernels::kFeatureWeight;
        }
    }
    return out;
}

// What a unit's terms predict at all rows.
Matrix predictions_of(const World& w, const CalibrationData& data, std::size_t unit,
                      const std::vector<ShiftedMatrix>& matrices) {
    Matrix out = Matrix::Zero(kRows, kWidth);
    const std::vector<PredictionTerm>& terms = data.units[unit].terms;
    for (std::size_t n = 0; n < terms.size(); ++n) {
        const ShiftedMatrix& m = matrices[n];
        Matrix real(static_cast<Eigen::Index>(m.outputs), static_cast<Eigen::Index>(m.inputs));
        for (std::size_t e = 0; e < m.entries.size(); ++e)
            real.data()[e] = std::ldexp(static_cast<float>(m.entries[e]), -int{m.shifts[e / m.inputs]});
        if (terms[n].source == PredictionTerm::Source::kTokens) {
            Matrix features(kRows, static_cast<Eigen::Index>(m.inputs));
            for (std::size_t t = 0; t < kRows; ++t) {
                const auto row = w.table.row(w.ids[t]);
                for (std::size_t i = 0; i < m.inputs; ++i)
                    features(static_cast<Eigen::Index>(t), static_cast<Eigen::Index>(i)) =
                        static_cast<float>(row[i] * static_cast<int>(kernels::kFeatureWeight));
            }
            out += features * real.transpose();
        } else {
            const std::size_t from = w.units.index({unit / 2 - terms[n].layers_back, terms[n].plane, 0});
            out += features_of(w, data, from) * real.transpose();
        }
    }
    return out;
}

std::vector<ShiftedMatrix> matrices_of(const CalibrationUnit& unit) {
    std::vector<ShiftedMatrix> out;
    for (const PredictionTerm& term : unit.terms) out.push_back(term.matrix);
    return out;
}

// What rounding does to predictions is within what is allowed, and much less than if entries were rounded
// each by itself.
TEST(Rounding, AddsNoMoreThanItsShare) {
    const World w({1, 1});
    FitOptions options;
    options.step = 0.3;
    const std::vector<UnitFit> fits = fit(w, options);
    IntegerOptions fine, coarse;
    fine.rounding = 1e-12;
    fine.term_bits = 14;
    coarse.rounding = 1e-3;
    const std::vector<std::vector<UnitFit>> sets = {fits};
    const CalibrationData a = to_integers(w.units, sets, w.table, "m", fine);
    const CalibrationData b = to_integers(w.units, sets, w.table, "m", coarse);
    double compensated = 0, alone = 0;
    for (std::size_t u = 0; u < a.units.size(); ++u) {
        ASSERT_EQ(a.units[u].scale.exponent, b.units[u].scale.exponent);
        const std::vector<ShiftedMatrix> exact = matrices_of(a.units[u]), rounded = matrices_of(b.units[u]);
        if (exact.empty()) continue;
        std::vector<ShiftedMatrix> nearest = rounded;
        for (std::size_t n = 0; n < exact.size(); ++n) {
            for (std::size_t e = 0; e < nearest[n].entries.size(); ++e) {
                const std::size_t o = e / nearest[n].inputs;
                nearest[n].entries[e] = static_cast<std::int16_t>(
                    std::lround(std::ldexp(exact[n].entries[e], nearest[n].shifts[o] - exact[n].shifts[o])));
            }
        }
        const Matrix predictions = predictions_of(w, a, u, exact);
        const auto noise = [&](const std::vector<ShiftedMatrix>& matrices) {
            const Matrix error = (predictions_of(w, b, u, matrices) - predictions) *
                                 (kernels::unit_of(b.units[u].scale) * fits[u].metric.transpose());
            return static_cast<double>(error.squaredNorm()) / kRows / kWidth;
        };
        const double share = coarse.rounding * options.step * options.step;
        EXPECT_LT(noise(rounded), share * static_cast<double>(exact.size())) << u;
        compensated += noise(rounded);
        alone += noise(nearest);
    }
    EXPECT_LT(compensated, 0.5 * alone);
}

// However fine entries may be: what their errors are made up by must not take rows beyond their bounds.
TEST(Rounding, KeepsRowsWithinTheirBounds) {
    const World w({1, 1});
    FitOptions options;
    options.step = 0.3;
    const std::vector<std::vector<UnitFit>> sets = {fit(w, options)};
    for (const unsigned bits : {2u, 8u, 12u, 15u}) {
        IntegerOptions integers;
        integers.rounding = 1e-12;
        integers.term_bits = bits;
        const auto bytes = write_calibration(to_integers(w.units, sets, w.table, "m", integers));
        EXPECT_TRUE(bytes.ok()) << bits << ": " << bytes.status().message();
    }
}

TEST(Metric, IsFoundAgainInACalibration) {
    const World w({1, 1});
    std::vector<MatrixD> fisher;
    std::mt19937 random(3);
    std::normal_distribution<double> normal;
    for (std::size_t u = 0; u < 2 * kLayers; ++u) {
        MatrixD m(kWidth, kWidth);
        for (Eigen::Index i = 0; i < m.size(); ++i) m.data()[i] = normal(random);
        fisher.push_back(m * m.transpose());
    }
    const std::vector<Matrix> metrics = fisher_metrics(fisher);
    FitOptions options;
    options.step = 0.3;
    const std::vector<std::vector<UnitFit>> sets = {
        fit_units(w.units, w.rows, w.features, metrics, options, [] {})};
    IntegerOptions integers;
    integers.transform_bits = 14;
    const auto found =
        calibrated_metrics(to_integers(w.units, sets, w.table, "m", integers), integers.unit_step);
    ASSERT_EQ(found.size(), metrics.size());
    for (std::size_t u = 0; u < found.size(); ++u) {
        const Matrix cost = metrics[u].transpose() * metrics[u], again = found[u].transpose() * found[u];
        EXPECT_LT((cost - again).norm(), 0.02 * cost.norm()) << u;
    }
}

TEST(FeatureShifts, RoundLessWhatExplainsMore) {
    const double importance[] = {1e4, 100, 100, 1, 1e-9};
    const auto shifts = feature_shifts(importance, 0.1);
    EXPECT_EQ(shifts[1], shifts[2]);
    EXPECT_EQ(shifts[4], 7u);
    for (std::size_t i = 1; i < std::size(importance); ++i) EXPECT_GE(shifts[i], shifts[i - 1]);
    // A step is rounded to a power of two, its square by a factor of two at most.
    const double step = std::ldexp(4.0 / 127, static_cast<int>(shifts[1]));
    const double noise = importance[1] * step * step / 12;
    EXPECT_GT(noise, 0.05);
    EXPECT_LT(noise, 0.2);
}

// A step that is as coarse as the range leaves nothing.
TEST(TokenTables, EveryShiftKeepsWithin8Bits) {
    Matrix m(1, 3);
    m << 100, -100, 100;
    const unsigned shifts[] = {6, 6, 7};
    EXPECT_EQ(token_table(m, shifts).rows, (std::vector<std::int8_t>{64, -64, 0}));
}

TEST(TokenTables, RoundAndUnpack) {
    Matrix m(2, 4);
    m << 0.5f, -5.0f, 1.0f, -9.0f, 0, 1, 2, 3;
    const TokenTable table = token_table(m, kShifts);
    std::int16_t row[4];
    table.unpack(0, row);
    EXPECT_EQ(row[0], 16);
    EXPECT_EQ(row[1], -127);
    EXPECT_EQ(row[2], 32);
    EXPECT_EQ(row[3], -112);
    table.unpack(1, row);
    EXPECT_EQ(row[1], 32);
    EXPECT_EQ(row[2], 64);
    EXPECT_EQ(row[3], 96);
    table.unpack(2, row);
    EXPECT_EQ(row[0] | row[1] | row[2] | row[3], 0);
    table.unpack(-1, row);
    EXPECT_EQ(row[0] | row[1] | row[2] | row[3], 0);
}

}  // namespace
}  // namespace kvcast::calibrate
