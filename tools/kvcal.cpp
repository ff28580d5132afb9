// kvcal: makes the calibration of the klt profile from a model and texts, or from KV dumps alone.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <exception>
#include <functional>
#include <random>
#include <thread>

#include "codec/format/chain.h"
#include "tools/calibrate/classes.h"
#include "tools/calibrate/fit.h"
#include "tools/calibrate/integers.h"
#include "tools/common/calibration_file.h"
#include "tools/common/cli.h"
#include "tools/common/kv_cache.h"
#include "tools/common/progress.h"
#include "tools/model/fisher.h"
#include "tools/model/kv.h"
#include "tools/model/process.h"
#include "tools/model/quality.h"
#include "tools/model/tokens.h"

namespace {

using namespace kvcast;
using namespace kvcast::calibrate;

struct Arguments {
    std::string output;
    std::string model;
    std::string tokens;
    std::string judged;
    std::vector<std::string> dumps;
    std::string matrices;
    std::string metric;
    std::size_t context_tokens = 2048;
    std::size_t continuation_tokens = 256;
    std::size_t draws = 10;
    std::size_t sinks = 1;
    std::size_t token_features = 320;
    double feature_rounding = 0.08;
    std::size_t part_width = 1024;
    std::size_t sample_tokens = 4096;
    double finest = 0.27;
    double ratio = 1.34;
    unsigned levels = 11;
    std::vector<double> steps = {0.7, 1.8};
    FitOptions fit;
    IntegerOptions integers;
    model::LoadOptions load;
    bool first_stage = false;
};

void declare(CLI::App& app, Arguments& a) {
    app.add_option("-o,--output", a.output, "calibration file to write")->required();
    auto* model = app.add_option("--model", a.model, "Hugging Face directory");
    app.add_option("--texts", a.tokens,
                   "token ids of the contexts to learn from: JSON object of named arrays")
        ->needs(model);
    app.add_option("--judge", a.judged,
                   "token ids of other contexts, on which the levels' cost is measured; default: the same")
        ->needs(model);
    app.add_option("--kv", a.dumps,
                   "KV caches (safetensors) to learn from instead; without a model all errors count alike");
    app.add_option("--matrices", a.matrices,
                   "calibration whose matrices are kept: only levels and classes are made anew")
        ->check(CLI::ExistingFile);
    app.add_option("--metric", a.metric,
                   "calibration whose metric is kept: what errors cost is not measured anew")
        ->check(CLI::ExistingFile);
    app.add_option("--context-tokens", a.context_tokens, "tokens of a context")
        ->check(CLI::Range(64, 1 << 20))
        ->capture_default_str();
    app.add_option("--continuation-tokens", a.continuation_tokens, "tokens after it that judge it")
        ->check(CLI::Range(8, 1 << 16))
        ->capture_default_str();
    app.add_option("--draws", a.draws, "backward passes per context")
        ->check(CLI::Range(std::size_t{1}, std::size_t{1000}))
        ->capture_default_str();
    app.add_option("--sinks", a.sinks, "first tokens of a context that are left out")->capture_default_str();
    app.add_flag("--first-stage", a.first_stage,
                 "predict from the previous layer, and V from K, only: smaller");
    app.add_option("--token-features", a.token_features,
                   "features per token, at most those of the embedding; 0 for none")
        ->check(CLI::Range(std::size_t{0}, CalibrationLimits::kFeatures))
        ->capture_default_str();
    app.add_option("--feature-rounding", a.feature_rounding,
                   "what rounding one of them may add to the coefficients of a token, in squared steps")
        ->check(tools::positive_number())
        ->check(CLI::Range(1e-6, 1e3))
        ->capture_default_str();
    app.add_option("--rounding", a.integers.rounding,
                   "what rounding a prediction may add to the variance of a coefficient, in squared steps")
        ->check(tools::positive_number())
        ->check(CLI::Range(1e-9, 1.0))
        ->capture_default_str();
    app.add_option("--steps", a.steps,
                   "steps at which predictions are learnt, rising: a set of matrices for each")
        ->check(tools::positive_number())
        ->check(CLI::Range(0.01, 100.0))
        ->delimiter(',')
        ->expected(1, static_cast<int>(CalibrationLimits::kSets))
        ->capture_default_str();
    app.add_option("--finest", a.finest, "step of level 1")
        ->check(tools::positive_number())
        ->check(CLI::Range(0.04, 10.0))
        ->capture_default_str();
    app.add_option("--ratio", a.ratio, "from one level's step to the next")
        ->check(tools::positive_number())
        ->check(CLI::Range(1.01, 8.0))
        ->capture_default_str();
    app.add_option("--levels", a.levels, "number of levels")->check(CLI::Range(1, 64))->capture_default_str();
    app.add_option("--part-width", a.part_width, "widest transform; wider planes are split by heads")
        ->check(CLI::Range(std::size_t{1}, CalibrationLimits::kPartWidth))
        ->capture_default_str();
    app.add_option("-j,--jobs", a.load.threads, "threads; default: one per core")->check(CLI::Range(1, 1024));
}

// Says what takes how long.
class Stage {
  public:
    explicit Stage(const std::string& what) : what_(what), start_(std::chrono::steady_clock::now()) {}
    ~Stage() {
        if (std::uncaught_exceptions() != 0) return;  // it did not get to its end
        const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - start_;
        fmt::print("{:<42} {:>7.1f} s\n", what_, spent.count());
        std::fflush(stdout);
    }
    Stage(const Stage&) = delete;
    Stage& operator=(const Stage&) = delete;

  private:
    std::string what_;
    std::chrono::steady_clock::time_point start_;
};

// Heads per plane in as few equal parts as keep them within the width.
std::vector<std::size_t> parts_of(const Layout& layout, std::size_t widest) {
    std::vector<std::size_t> parts;
    for (const PlaneShape& plane : layout.planes) {
        std::size_t n = 1;
        while (n < plane.heads && (plane.heads % n != 0 || plane.width() / n > widest)) ++n;
        parts.push_back(n);
    }
    return parts;
}

// What has been read so far.
struct Material {
    Units units;
    std::string model;
    std::unique_ptr<RowStore> rows;
    std::vector<std::int32_t> token_ids;  // [row]
    std::vector<MatrixD> fisher;          // [unit]
};

void start(Material& m, const Layout& layout, const std::string& model, std::size_t rows,
           const Arguments& a) {
    m.units = {layout, parts_of(layout, a.part_width)};
    m.units.layout.dtype = Dtype::kBf16;
    m.model = model;
    std::vector<std::size_t> widths;
    for (std::size_t l = 0; l < layout.layers; ++l) {
        for (const PlaneShape& p : layout.planes) widths.push_back(p.width());
    }
    m.rows = std::make_unique<RowStore>(std::move(widths), rows);
    for (const UnitPlace& at : m.units.all()) {
        const auto w = static_cast<Eigen::Index>(m.units.width(at.plane));
        m.fisher.push_back(MatrixD::Zero(w, w));
    }
}

// Appends a cache without its sinks, K before RoPE.
void add_rows(Material& m, const tools::KvCache& cache, std::size_t sinks) {
    const Layout& layout = cache.layout;
    for (std::size_t p = 0; p < layout.planes.size(); ++p) {
        std::vector<float> plane = plane_floats(cache, p);
        if (p == 0) model::turn(plane, layout, cache.base_position, -1);
        const std::size_t width = layout.planes[p].width(), size = cache.tokens() * width;
        for (std::size_t l = 0; l < layout.layers; ++l) {
            m.rows->append(l * layout.planes.size() + p,
                           std::span(plane).subspan(l * size + sinks * width, size - sinks * width));
        }
    }
    m.rows->advance(cache.tokens() - sinks);
    m.token_ids.insert(m.token_ids.end(), cache.token_ids.begin() + static_cast<std::ptrdiff_t>(sinks),
                       cache.token_ids.end());
}

// Second moments of gradients [layers, tokens, width] of one plane.
void add_moments(Material& m, const std::vector<float>& gradients, std::size_t plane, std::size_t sinks) {
    const Layout& layout = m.units.layout;
    const std::size_t width = layout.planes[plane].width(), part = m.units.width(plane);
    const std::size_t tokens = gradients.size() / layout.layers / width;
    for (std::size_t l = 0; l < layout.layers; ++l) {
        for (std::size_t i = 0; i < m.units.parts[plane]; ++i) {
            const Eigen::Map<const Matrix, 0, Eigen::OuterStride<>> g(
                gradients.data() + (l * tokens + sinks) * width + i * part,
                static_cast<Eigen::Index>(tokens - sinks), static_cast<Eigen::Index>(part),
                Eigen::OuterStride<>(static_cast<Eigen::Index>(width)));
            const Matrix moments = g.transpose() * g;
            m.fisher[m.units.index({l, plane, i})] += moments.cast<double>();
        }
    }
}

void learn_from_model(Material& m, const Arguments& a, const model::Runner& runner) {
    const auto sets = model::read_token_sets(a.tokens);
    const std::size_t needed = a.context_tokens + a.continuation_tokens;
    for (const auto& [name, ids] : sets) {
        if (ids.size() < needed)
            throw tools::Error(
                fmt::format("{}: '{}' has {} tokens, {} are needed", a.tokens, name, ids.size(), needed));
    }
    if (a.sinks >= a.context_tokens) throw tools::Error("--sinks leaves nothing of the contexts");
    start(m, model::layout_of(runner.config(), Dtype::kBf16), runner.config().name,
          sets.size() * (a.context_tokens - a.sinks), a);
    const std::size_t draws = a.matrices.empty() && a.metric.empty() ? a.draws : 0;
    const Stage stage(fmt::format("{} contexts: prefill and {} backward passes", sets.size(), draws));
    tools::Progress progress("kvcal", sets.size(), "contexts");
    std::mt19937_64 random(1);
    for (const auto& [name, ids] : sets) {
        const auto all = std::span(ids);
        const tools::KvCache cache = prefilled(runner, all.first(a.context_tokens), Dtype::kBf16);
        add_rows(m, cache, a.sinks);
        progress.advance(1);
        if (draws == 0) continue;
        fisher_gradients(runner, context_of(cache, runner.config()),
                         all.subspan(a.context_tokens, a.continuation_tokens), draws, random,
                         [&](const model::KvGradients& g) {
                             add_moments(m, g.k, 0, a.sinks);
                             add_moments(m, g.v, 1, a.sinks);
                         });
    }
}

void learn_from_dumps(Material& m, const Arguments& a) {
    const Stage stage(fmt::format("{} KV caches", a.dumps.size()));
    std::vector<std::unique_ptr<tools::KvInput>> inputs;
    std::size_t rows = 0;
    for (const std::string& path : a.dumps) {
        inputs.push_back(std::make_unique<tools::KvInput>(std::make_unique<tools::SafetensorsReader>(path)));
        const tools::KvInput& first = *inputs.front();
        if (!(inputs.back()->layout() == first.layout()) || inputs.back()->model() != first.model())
            throw tools::Error(fmt::format("{}: not of the model and layout of {}", path, a.dumps[0]));
        if (inputs.back()->token_ids().size() <= a.sinks)
            throw tools::Error(fmt::format("{}: only {} tokens", path, inputs.back()->token_ids().size()));
        rows += inputs.back()->token_ids().size() - a.sinks;
    }
    start(m, inputs[0]->layout(), inputs[0]->model(), rows, a);
    for (std::size_t i = 0; i < inputs.size(); ++i) {
        const tools::KvCache cache = load_kv(*inputs[i]);
        require_finite(cache, a.dumps[i]);
        add_rows(m, cache, a.sinks);
    }
}

// The model's embedding, every row scaled to root mean square 1.
Matrix embedding_of(const model::Runner& runner) {
    std::vector<std::int32_t> ids(runner.config().vocabulary);
    for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<std::int32_t>(i);
    const std::vector<float> rows = runner.embeddings(ids);
    Matrix out = Eigen::Map<const Matrix>(rows.data(), static_cast<Eigen::Index>(ids.size()),
                                          static_cast<Eigen::Index>(runner.config().hidden));
    for (Eigen::Index i = 0; i < out.rows(); ++i)
        out.row(i) /= std::max(1e-6f, std::sqrt(out.row(i).squaredNorm() / static_cast<float>(out.cols())));
    return out;
}

Matrix rows_at(const Matrix& table, const std::vector<std::int32_t>& ids) {
    Matrix out(static_cast<Eigen::Index>(ids.size()), table.cols());
    for (std::size_t t = 0; t < ids.size(); ++t) out.row(static_cast<Eigen::Index>(t)) = table.row(ids[t]);
    return out;
}

std::vector<UnitFit> fit_all(const Material& m, const Matrix& features, std::span<const Matrix> metrics,
                             const FitOptions& options, const std::string& what) {
    const Stage stage(what);
    tools::Progress progress("kvcal", m.fisher.size(), "units");
    return fit_units(m.units, *m.rows, features, metrics, options, [&] { progress.advance(1); });
}

// What each ingredient saves, by the Gaussian estimate, over the whole cache.
void report_gains(const Units& units, std::span<const UnitFit> fits, const FitOptions& options) {
    double none = 0;
    double by_kind[4] = {};  // previous layer, earlier layers, same layer, tokens
    const std::vector<UnitPlace> places = units.all();
    for (std::size_t i = 0; i < fits.size(); ++i) {
        none += fits[i].bits[0];
        for (std::size_t s = 0; s < fits[i].sources.size(); ++s) {
            const Source& source = fits[i].sources[s];
            const std::size_t kind = source.tokens ? 3 : source.layers_back == 0 ? 2 : source.layers_back > 1;
            by_kind[kind] += fits[i].bits[s] - fits[i].bits[s + 1];
        }
    }
    const auto values = static_cast<double>(units.layout.values_per_token());
    const auto percent = [none](double bits) { return none > 0 ? 100 * bits / none : 0.0; };
    fmt::print("estimated rate at step {}: {:.3f} bits/value without prediction;", options.step,
               none / values);
    const char* names[] = {"the previous layer", "earlier layers", "K for V", "token features"};
    for (std::size_t k = 0; k < 4; ++k)
        fmt::print("{} {} {:.1f} %", k == 0 ? "" : ",", names[k], percent(by_kind[k]));
    fmt::print(" less\n");
}

// Every so many rows, so that all contexts have their share.
SampleTokens sample_of(const Material& m, std::size_t wanted) {
    SampleTokens out;
    const std::size_t step = std::max<std::size_t>(1, m.rows->rows() / std::max<std::size_t>(1, wanted));
    for (std::size_t r = 0; r < m.rows->rows(); r += step) {
        out.rows.push_back(r);
        out.token_ids.push_back(m.token_ids[r]);
    }
    return out;
}

std::shared_ptr<const Calibration> opened(const CalibrationData& data, std::vector<std::uint8_t>& bytes) {
    auto written = write_calibration(data);
    if (!written.ok()) throw tools::Error(written.status().message());
    bytes = std::move(written.value());
    auto read = Calibration::read(bytes);
    if (!read.ok()) throw tools::Error(read.status().message());
    return read.value();
}

// Measures every level with the real codec on the real model.
void judge_levels(CalibrationData& data, const Arguments& a, const model::Runner& runner) {
    const auto sets = model::read_token_sets(a.judged.empty() ? a.tokens : a.judged);
    const Stage stage(fmt::format("{} levels measured on {} contexts", data.levels.size(), sets.size()));
    std::vector<std::uint8_t> bytes;
    const auto calibration = opened(data, bytes);
    ThreadPool pool(std::max(1u, std::thread::hardware_concurrency()));
    tools::Progress progress("kvcal", sets.size() * data.levels.size(), "measurements");
    std::vector<double> kl(data.levels.size()), bits(data.levels.size()), ppl(data.levels.size());
    for (const auto& [name, ids] : sets) {
        const auto all = std::span(ids);
        if (all.size() < a.context_tokens + a.continuation_tokens)
            throw tools::Error(fmt::format("{}: '{}' is too short", a.judged, name));
        const tools::KvCache cache = prefilled(runner, all.first(a.context_tokens), Dtype::kBf16);
        const model::QualityProbe probe(runner, context_of(cache, runner.config()),
                                        all.subspan(a.context_tokens, a.continuation_tokens));
        for (std::size_t l = 0; l < data.levels.size(); ++l) {
            EncodeOptions options;
            options.profile = Profile::kKlt;
            options.level = static_cast<unsigned>(l + 1);
            options.sinks = a.sinks;
            options.calibration = calibration;
            const tools::RoundTrip trip = round_trip(cache, options, 256, pool);
            const model::Quality q = probe.measure(context_of(trip.decoded, runner.config()));
            const auto n = static_cast<double>(sets.size());
            kl[l] += q.kl / n;
            ppl[l] += q.perplexity_change / n;
            bits[l] += 8.0 * static_cast<double>(trip.bytes) / static_cast<double>(cache.values()) / n;
            progress.advance(1);
        }
    }
    fmt::print("{:>5} {:>6} {:>9} {:>8} {:>8} {:>10} {:>9}\n", "level", "step", "bits/val", "ratio",
               "smaller", "KL", "perplex.");
    for (std::size_t l = 0; l < data.levels.size(); ++l) {
        fmt::print("{:>5} {:>6.3f} {:>9.4f} {:>7.2f}x {:>7.2f}x {:>10.5f} {:>+8.2f}%\n", l + 1,
                   data.levels[l].multiplier * a.integers.unit_step, bits[l], 16 / bits[l],
                   l == 0 ? 1.0 : bits[l - 1] / bits[l], kl[l], 100 * ppl[l]);
        data.levels[l].micronats = static_cast<std::uint32_t>(std::lround(1e6 * std::max(0.0, kl[l])));
        data.levels[l].millibits = static_cast<std::uint32_t>(std::lround(1000 * bits[l]));
    }
}

// A set is too coarse for levels that are finer than this share of its step: predictions that were learnt
// from coarser sources lose more than those from finer ones.
constexpr double kFinestOfSet = 0.85;

std::vector<LevelChoice> levels_of(const Arguments& a) {
    std::vector<LevelChoice> out;
    for (unsigned l = 0; l < a.levels; ++l) {
        const double step = a.finest * std::pow(a.ratio, l), m = step / a.integers.unit_step;
        LevelChoice& level = out.emplace_back();
        level.multiplier = static_cast<unsigned>(
            std::clamp(std::round(m), 1.0, static_cast<double>(CalibrationLimits::kMultiplier)));
        if (l > 0 && level.multiplier <= out[l - 1].multiplier)
            throw tools::Error("two levels have the same step");
        while (level.set + 1 < a.steps.size() && kFinestOfSet * a.steps[level.set + 1] <= step) ++level.set;
    }
    return out;
}

// Between the steps of the sets: where one fit has to serve all of them.
double middle_step(const std::vector<double>& steps) {
    return std::sqrt(steps.front() * steps.back());
}

void print_cost(const Calibration& calibration, std::size_t bytes) {
    const CalibrationCost c = calibration.cost();
    fmt::print(
        "{} bytes: transforms {}, previous layer {}, earlier layers {}, K for V {}, tokens {} + table {}, "
        "classes {}, rest {}\nid {}\n",
        bytes, c.transforms, c.previous_layer, c.earlier_layers, c.same_layer, c.tokens, c.token_table,
        c.classes, c.rest, to_hex(calibration.id()));
}

std::vector<Matrix> metrics_of(const Material& m, const Arguments& a) {
    if (!a.metric.empty()) {
        const auto calibration = tools::load_calibration(a.metric);
        const CalibrationData& data = calibration->data();
        if (!fits(data, m.units.layout) || data.parts != m.units.parts)
            throw tools::Error(a.metric + ": of another layout, or in other parts");
        return calibrated_metrics(data, a.integers.unit_step);
    }
    return a.model.empty() ? identity_metrics(m.units, *m.rows) : fisher_metrics(m.fisher);
}

// Everything but levels and classes, learnt from the material.
CalibrationData learn(const Material& m, Arguments a, const std::optional<model::Runner>& runner) {
    const std::vector<Matrix> metrics = metrics_of(m, a);
    Matrix features;
    TokenTable table;
    if (runner && a.token_features != 0) {
        const Matrix embedding = embedding_of(*runner);
        a.token_features = std::min(a.token_features, static_cast<std::size_t>(embedding.cols()));
        a.fit.step = middle_step(a.steps);
        FitOptions options = a.fit;
        options.moments = false;
        const auto fits = fit_all(m, rows_at(embedding, m.token_ids), metrics, options,
                                  "predictions with the whole embedding");
        const FeatureProjection projection =
            project_features(rows_at(embedding, m.token_ids), fits, a.token_features);
        table =
            token_table(embedding * projection.matrix,
                        feature_shifts(projection.importance, a.feature_rounding * a.fit.step * a.fit.step));
        features = token_features(table, m.token_ids);
    }
    std::vector<std::vector<UnitFit>> sets;
    for (const double step : a.steps) {
        a.fit.step = step;
        sets.push_back(
            fit_all(m, features, metrics, a.fit, fmt::format("predictions and transforms at step {}", step)));
        report_gains(m.units, sets.back(), a.fit);
    }
    return to_integers(m.units, sets, table, m.model, a.integers);
}

// The same, of a calibration that there is.
CalibrationData kept(const Material& m, const Arguments& a) {
    const auto calibration = tools::load_calibration(a.matrices);
    const CalibrationData& data = calibration->data();
    if (!fits(data, m.units.layout)) throw tools::Error(a.matrices + ": of another layout");
    if (data.parts != m.units.parts || data.sets != a.steps.size())
        throw tools::Error(fmt::format("{}: {} sets of matrices in other parts; {} steps were given",
                                       a.matrices, data.sets, a.steps.size()));
    return data;
}

void check_output(const Arguments& a) {
    std::vector<std::string> read = a.dumps;
    read.insert(read.end(), {a.tokens, a.judged, a.matrices, a.metric});
    tools::refuse_same_file(a.output, read);
}

void calibrate_all(Arguments a) {
    check_output(a);
    if (!std::is_sorted(a.steps.begin(), a.steps.end(), std::less_equal<>()))
        throw tools::Error("--steps must rise");
    const std::vector<LevelChoice> levels = levels_of(a);
    if (a.first_stage) {
        a.fit.layers_back = 1;
        a.token_features = 0;
    }
    Material m;
    std::optional<model::Runner> runner;
    if (!a.model.empty()) {
        runner = model::Runner::load(a.model, a.load);
        learn_from_model(m, a, *runner);
    } else {
        learn_from_dumps(m, a);
        // "Where it was measured": SmolLM2-135M, the texts of data/texts.
        fmt::print("no model: {}what the levels cost is not measured\n",
                   a.metric.empty()
                       ? "every error counts alike and there are no token features, which took twice the "
                         "bytes for the same KL divergence where it was measured; "
                       : "there are no token features, and ");
    }
    CalibrationData data = a.matrices.empty() ? learn(m, a, runner) : kept(m, a);
    {
        const Stage stage(fmt::format("classes of {} levels in {} sets", levels.size(), data.sets));
        tools::Progress progress("kvcal", levels.size() * data.sets, "levels");
        fit_classes(data, levels, *m.rows, sample_of(m, a.sample_tokens), [&] { progress.advance(1); });
    }
    if (runner) judge_levels(data, a, *runner);
    std::vector<std::uint8_t> bytes;
    const auto calibration = opened(data, bytes);
    tools::OutputFile file(a.output);
    file.append(std::as_bytes(std::span(bytes)));
    file.commit();
    print_cost(*calibration, bytes.size());
}

}  // namespace

int main(int argc, char** argv) {
    model::prepare_process(argv);
    CLI::App app("Makes the calibration file of the klt profile.", "kvcal");
    Arguments a;
    declare(app, a);
    return tools::run_tool(app, argc, argv, [&] {
        if (a.model.empty() == a.dumps.empty())
            throw tools::Error("give either --model with --texts, or --kv");
        if (!a.model.empty() && a.tokens.empty()) throw tools::Error("--model needs --texts");
        calibrate_all(a);
    });
}
