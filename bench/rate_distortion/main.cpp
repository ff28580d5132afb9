// bench_rd: rate against what it costs the model, for every codec and setting, over a set of contexts.
#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <thread>

#include "bench/rate_distortion/point.h"
#include "tools/common/cli.h"
#include "tools/common/file.h"
#include "tools/common/progress.h"
#include "tools/model/kv.h"
#include "tools/model/process.h"
#include "tools/model/quality.h"
#include "tools/model/tokens.h"

namespace {

using namespace kvcast;
using namespace kvcast::bench;

struct Arguments {
    std::string model;
    std::string tokens;
    std::vector<std::string> contexts;
    std::size_t context_tokens = 2048;
    std::size_t continuation_tokens = 256;
    std::vector<std::string> families;
    bool quick = false;
    std::string csv;
    std::string quality;
    Setup setup;
    model::LoadOptions load;
};

void declare(CLI::App& app, Arguments& a) {
    app.add_option("MODEL", a.model, "Hugging Face directory")->required();
    app.add_option("TOKENS", a.tokens, "JSON object of named arrays of token ids")->required();
    app.add_option("--contexts", a.contexts, "names to take; default: all")->delimiter(',');
    app.add_option("--context-tokens", a.context_tokens, "tokens whose cache is coded")
        ->check(CLI::Range(32, 1 << 20))
        ->capture_default_str();
    app.add_option("--continuation-tokens", a.continuation_tokens, "tokens that judge it")
        ->check(CLI::Range(2, 1 << 16))
        ->capture_default_str();
    app.add_option("--families", a.families, "only curves whose name contains one of these")->delimiter(',');
    app.add_flag("--quick", a.quick, "only the points that show the order of codecs");
    app.add_option("-c,--chunk", a.setup.chunk_tokens, "tokens per chunk")
        ->check(CLI::Range(std::size_t{1}, ChunkLimits::kTokens))
        ->capture_default_str();
    app.add_option("--layer-steps", a.setup.layer_steps, "measured step multipliers (kveval --sensitivity)")
        ->check(CLI::ExistingFile);
    app.add_option("--calibration", a.setup.calibration, "calibration of the klt profile")
        ->check(CLI::ExistingFile);
    app.add_option("--csv", a.csv, "write one line per context and point");
    app.add_option("--quality", a.quality, "write what each of our levels costs this model, as JSON");
    app.add_option("-j,--jobs", a.load.threads, "threads; default: one per core")->check(CLI::Range(1, 1024));
}

struct Row {
    double bits_per_value = 0;
    model::Quality quality;
};

// A point and its rows, one per context.
struct Curve {
    Point point;
    std::vector<Row> rows;

    Row mean() const {
        Row out;
        const auto n = static_cast<double>(rows.size());
        for (const Row& r : rows) {
            out.bits_per_value += r.bits_per_value / n;
            out.quality.kl += r.quality.kl / n;
            out.quality.perplexity_change += r.quality.perplexity_change / n;
            out.quality.greedy_agreement += r.quality.greedy_agreement / n;
        }
        return out;
    }
};

double raw_bits(const Layout& layout) {
    return 8.0 * static_cast<double>(kernels::dtype_bytes(layout.dtype));
}

void measure(const Arguments& a, const model::Runner& runner, const model::TokenIds& ids,
             std::vector<Curve>& curves, tools::Progress& progress) {
    const auto all = std::span(ids);
    const tools::KvCache cache = prefilled(runner, all.first(a.context_tokens), Dtype::kBf16);
    const model::QualityProbe probe(runner, context_of(cache, runner.config()),
                                    all.subspan(a.context_tokens, a.continuation_tokens));
    for (Curve& curve : curves) {
        const Coded coded = curve.point.run(cache, a.setup);
        curve.rows.push_back({coded.bits / static_cast<double>(cache.values()),
                              probe.measure(context_of(coded.decoded, runner.config()))});
        progress.advance(1);
    }
}

std::string quoted(const std::string& text) {
    return text.find(',') == std::string::npos ? text : fmt::format("\"{}\"", text);
}

std::string csv_line(const Curve& curve, const std::string& context, const Row& r, double raw) {
    return fmt::format("{},{},{},{:.5f},{:.4f},{:.8f},{:.6f},{:.5f}\n", quoted(curve.point.family),
                       quoted(curve.point.setting), context, r.bits_per_value, raw / r.bits_per_value,
                       r.quality.kl, r.quality.perplexity_change, r.quality.greedy_agreement);
}

void write_csv(const std::string& path, const std::vector<Curve>& curves,
               const std::vector<std::string>& contexts, double raw) {
    std::string text = "codec,setting,context,bits_per_value,ratio,kl,perplexity_change,greedy_agreement\n";
    for (const Curve& curve : curves) {
        for (std::size_t i = 0; i < contexts.size(); ++i)
            text += csv_line(curve, contexts[i], curve.rows[i], raw);
        text += csv_line(curve, "mean", curve.mean(), raw);
    }
    tools::write_text(path, text);
}

// What a manifest says of levels: mean cost per level of our own profiles.
void write_quality(const std::string& path, const Arguments& a, const std::string& model,
                   const std::vector<Curve>& curves) {
    nlohmann::ordered_json profiles;
    for (const Curve& curve : curves) {
        if (!curve.point.level) continue;
        const Row r = curve.mean();
        nlohmann::ordered_json level;
        level["level"] = *curve.point.level;
        level["bits_per_value"] = r.bits_per_value;
        level["kl"] = r.quality.kl;
        level["perplexity_change"] = r.quality.perplexity_change;
        level["greedy_agreement"] = r.quality.greedy_agreement;
        profiles[curve.point.family].push_back(level);
    }
    nlohmann::ordered_json out;
    out["model"] = model;
    out["context_tokens"] = a.context_tokens;
    out["continuation_tokens"] = a.continuation_tokens;
    out["chunk_tokens"] = a.setup.chunk_tokens;
    out["profiles"] = profiles;
    tools::write_text(path, out.dump(2) + "\n");
}

void print(const std::vector<Curve>& curves, double raw) {
    fmt::print("{:<32} {:<20} {:>9} {:>8} {:>10} {:>9} {:>8}\n", "codec", "setting", "bits/val", "ratio",
               "KL", "perplex.", "greedy");
    for (const Curve& curve : curves) {
        const Row r = curve.mean();
        fmt::print("{:<32} {:<20} {:>9.3f} {:>7.2f}x {:>10.6f} {:>+8.2f}% {:>7.2f}%\n", curve.point.family,
                   curve.point.setting, r.bits_per_value, raw / r.bits_per_value, r.quality.kl,
                   100 * r.quality.perplexity_change, 100 * r.quality.greedy_agreement);
    }
}

bool wanted(const Arguments& a, const Point& point) {
    if (a.quick && !point.quick) return false;
    const auto matches = [&](const std::string& part) {
        return point.family.find(part) != std::string::npos;
    };
    return a.families.empty() || std::any_of(a.families.begin(), a.families.end(), matches);
}

std::vector<Curve> wanted_curves(const Arguments& a) {
    std::vector<Curve> curves;
    for (Point& point : all_points(a.setup)) {
        if (wanted(a, point)) curves.push_back({std::move(point), {}});
    }
    if (curves.empty()) throw tools::Error("no codec matches --families");
    return curves;
}

void measure_all(Arguments a) {
    const auto sequences = model::read_token_sets(a.tokens);
    if (a.contexts.empty()) {
        for (const auto& [name, ids] : sequences) a.contexts.push_back(name);
    }
    const std::size_t needed = a.context_tokens + a.continuation_tokens;
    for (const std::string& name : a.contexts) {
        const auto found = sequences.find(name);
        if (found == sequences.end()) throw tools::Error(fmt::format("{}: no context '{}'", a.tokens, name));
        if (found->second.size() < needed)
            throw tools::Error(fmt::format("{}: '{}' has {} tokens, {} are needed", a.tokens, name,
                                           found->second.size(), needed));
    }
    ThreadPool pool(std::max(1u, std::thread::hardware_concurrency()));
    a.setup.executor = &pool;
    std::vector<Curve> curves = wanted_curves(a);
    const auto runner = model::Runner::load(a.model, a.load);
    {
        tools::Progress progress("bench_rd", curves.size() * a.contexts.size(), "points");
        for (const std::string& name : a.contexts) measure(a, runner, sequences.at(name), curves, progress);
    }
    const double raw = raw_bits(model::layout_of(runner.config(), Dtype::kBf16));
    fmt::print("{}: {} contexts of {} + {} tokens, means\n", runner.config().name, a.contexts.size(),
               a.context_tokens, a.continuation_tokens);
    print(curves, raw);
    if (!a.csv.empty()) write_csv(a.csv, curves, a.contexts, raw);
    if (!a.quality.empty()) write_quality(a.quality, a, runner.config().name, curves);
}

}  // namespace

int main(int argc, char** argv) {
    model::prepare_process(argv);
    CLI::App app(
        "Rate-distortion of KV cache codecs: bits per value against the change of a model's "
        "predictions.",
        "bench_rd");
    Arguments a;
    declare(app, a);
    return tools::run_tool(app, argc, argv, [&] { measure_all(a); });
}
