// kveval: what a decoded KV cache, or a level of the codec, costs the model; and which layers matter.
#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>
#include <thread>

#include "tools/common/calibration_file.h"
#include "tools/common/cli.h"
#include "tools/common/kv_cache.h"
#include "tools/common/layer_steps.h"
#include "tools/common/progress.h"
#include "tools/model/kv.h"
#include "tools/model/process.h"
#include "tools/model/quality.h"
#include "tools/model/sensitivity.h"
#include "tools/model/tokens.h"

namespace {

using namespace kvcast;
using namespace kvcast::tools;

struct Arguments {
    std::string model;
    std::vector<std::string> caches;
    std::string continuation;
    std::string name;
    std::size_t held_out = 0;
    std::string profile;
    std::string calibration;
    std::string levels;
    std::size_t chunk_tokens = 256;
    std::string layer_steps = "flat";
    std::optional<std::size_t> sinks;
    std::string sensitivity;
    std::string output;
    double step = 1;
    std::size_t draws = 3;
    model::LoadOptions load;
    bool json = false;
};

void declare(CLI::App& app, Arguments& a) {
    app.add_option("MODEL", a.model, "Hugging Face directory")->required();
    app.add_option("KV", a.caches,
                   "the exact cache as kvprefill writes it, then decoded ones to compare with it; with "
                   "--sensitivity: exact caches")
        ->required();
    app.add_option("--continuation", a.continuation,
                   "token ids that follow the cache (JSON); default: the cache's own last tokens");
    app.add_option("--name", a.name, "which array of a JSON object of continuations to take");
    app.add_option(
        "--held-out", a.held_out,
        "tokens at the end of the cache that serve as continuation; default: 256, at most a quarter");
    app.add_option("-p,--profile", a.profile, "encode and decode the exact cache with this profile")
        ->check(CLI::IsMember({"delta", "lossless", "klt"}));
    app.add_option("--calibration", a.calibration, "calibration of the klt profile (.kvcal)");
    app.add_option("-l,--levels", a.levels, "levels to try: N or A-B; default: all");
    app.add_option("-c,--chunk", a.chunk_tokens, "tokens per chunk")
        ->check(CLI::Range(std::size_t{1}, ChunkLimits::kTokens))
        ->capture_default_str();
    app.add_option("--layer-steps", a.layer_steps, "flat, thirds, or a JSON file as --sensitivity writes it")
        ->capture_default_str();
    app.add_option("--sinks", a.sinks, "first tokens of the context that stay exact; default: 4, klt: 1");
    app.add_option("--sensitivity", a.sensitivity,
                   "measured: round one plane at a time; fisher: estimate from gradients, cheaper")
        ->check(CLI::IsMember({"measured", "fisher"}));
    app.add_option("-o,--output", a.output,
                   "with --sensitivity: the step multipliers, for kvenc --layer-steps");
    app.add_option("--step", a.step, "with --sensitivity measured: the step, in standard deviations")
        ->check(positive_number())
        ->check(CLI::Range(0.01, 100.0))
        ->capture_default_str();
    app.add_option("--draws", a.draws, "with --sensitivity fisher: backward passes per cache")
        ->check(CLI::Range(std::size_t{1}, std::size_t{1000}))
        ->capture_default_str();
    app.add_option("--device", a.load.device, "cpu, cuda or cuda:N")->capture_default_str();
    app.add_option("-j,--jobs", a.load.threads, "threads; default: one per core")->check(CLI::Range(1, 1024));
    app.add_flag("--json", a.json, "print JSON");
}

// A cache cut into the context and the continuation that judges it.
struct Case {
    KvCache context;
    model::TokenIds continuation;
};

Case open_case(const Arguments& a, const std::string& path) {
    Case out = {load_kv(KvInput(std::make_unique<SafetensorsReader>(path))), {}};
    if (!a.continuation.empty()) {
        out.continuation = model::read_tokens(a.continuation, a.name);
        return out;
    }
    const std::size_t tokens = out.context.tokens();
    const std::size_t n = a.held_out != 0 ? a.held_out : std::min<std::size_t>(256, tokens / 4);
    if (n < 2 || n >= tokens)
        throw Error(fmt::format("{}: {} tokens, too few to hold out {} of them", path, tokens, n));
    const auto& ids = out.context.token_ids;
    out.continuation.assign(ids.end() - static_cast<std::ptrdiff_t>(n), ids.end());
    out.context = first_tokens(out.context, tokens - n);
    return out;
}

struct Row {
    std::string name;
    std::optional<double> bits_per_value;
    model::Quality quality;
};

void print_row(const Row& r) {
    const std::string bits = r.bits_per_value ? fmt::format("{:.3f}", *r.bits_per_value) : "-";
    const std::string first =
        r.quality.first_divergence ? fmt::format("{}", *r.quality.first_divergence) : "none";
    fmt::print("{:<24} {:>9} {:>10.6f} {:>+8.2f}% {:>8.2f}% {:>9}\n", r.name, bits, r.quality.kl,
               100 * r.quality.perplexity_change, 100 * r.quality.greedy_agreement, first);
    std::fflush(stdout);
}

nlohmann::json json_of(const Row& r) {
    nlohmann::json out = {{"name", r.name},
                          {"kl", r.quality.kl},
                          {"perplexity_change", r.quality.perplexity_change},
                          {"greedy_agreement", r.quality.greedy_agreement}};
    out["bits_per_value"] = r.bits_per_value ? nlohmann::json(*r.bits_per_value) : nlohmann::json();
    out["first_divergence"] =
        r.quality.first_divergence ? nlohmann::json(*r.quality.first_divergence) : nlohmann::json();
    return out;
}

class Evaluation {
  public:
    Evaluation(const Arguments& a, const model::Runner& runner)
        : a_(a),
          runner_(runner),
          case_(open_case(a, a.caches[0])),
          probe_(runner, model::context_of(case_.context, runner.config()), case_.continuation),
          pool_(std::max(1u, std::thread::hardware_concurrency())) {}

    void run() {
        if (!a_.json) {
            fmt::print("{}: {} tokens, judged over {} more; perplexity {:.3f}\n", a_.caches[0],
                       case_.context.tokens(), case_.continuation.size(), probe_.perplexity());
            fmt::print("{:<24} {:>9} {:>10} {:>9} {:>9} {:>9}\n", "", "bits/val", "KL", "perplex.", "greedy",
                       "diverges");
        }
        for (std::size_t i = 1; i < a_.caches.size(); ++i) add_file(a_.caches[i]);
        if (!a_.profile.empty()) add_profile();
        if (!a_.json) return;
        const nlohmann::json out = {{"context", a_.caches[0]},
                                    {"context_tokens", case_.context.tokens()},
                                    {"continuation_tokens", case_.continuation.size()},
                                    {"perplexity", probe_.perplexity()},
                                    {"rows", rows_}};
        fmt::print("{}\n", out.dump(2));
    }

  private:
    void add(const std::string& name, const KvCache& changed, std::optional<double> bits) {
        const Row row = {name, bits, probe_.measure(model::context_of(changed, runner_.config()))};
        a_.json ? rows_.push_back(json_of(row)) : print_row(row);
    }

    void add_file(const std::string& path) {
        const KvCache decoded = load_kv(KvInput(std::make_unique<SafetensorsReader>(path)));
        const auto& ids = case_.context.token_ids;
        const bool same = decoded.tokens() >= ids.size() &&
                          std::equal(ids.begin(), ids.end(), decoded.token_ids.begin()) &&
                          decoded.base_position == case_.context.base_position;
        if (!same) {
            throw Error(fmt::format("{}: its {} tokens do not begin with the {} of {}", path,
                                    decoded.tokens(), ids.size(), a_.caches[0]));
        }
        add(path, first_tokens(decoded, ids.size()), std::nullopt);
    }

    // Levels of the profile, the finest first.
    std::vector<EncodeOptions> wanted_levels() const {
        EncodeOptions o;
        if (a_.profile == "lossless") {
            o.profile = Profile::kLossless;
            return {o};
        }
        const bool klt = a_.profile == "klt";
        if (klt && a_.calibration.empty()) throw Error("--profile klt needs --calibration");
        o.profile = klt ? Profile::kKlt : Profile::kDelta;
        o.calibration = load_calibration(a_.calibration);
        o.sinks = a_.sinks.value_or(klt ? kKltSinks : o.sinks);
        o.layer_steps = choose_layer_steps(a_.layer_steps, case_.context.layout);
        const std::size_t most = klt ? o.calibration->data().levels.size() : kDeltaLevels;
        const Range range =
            a_.levels.empty() ? Range{1, most + 1} : parse_range(a_.levels, most + 1, "levels");
        if (range.first == 0) throw Error("levels count from 1; --profile lossless is level 0");
        std::vector<EncodeOptions> out;
        for (std::size_t level = range.first; level < range.end; ++level) {
            out.push_back(o);
            out.back().level = static_cast<unsigned>(level);
        }
        return out;
    }

    void add_profile() {
        for (const EncodeOptions& o : wanted_levels()) {
            const RoundTrip trip = round_trip(case_.context, o, a_.chunk_tokens, pool_);
            const double bits =
                8.0 * static_cast<double>(trip.bytes) / static_cast<double>(case_.context.values());
            const std::string name =
                o.profile == Profile::kLossless ? a_.profile : fmt::format("{} {}", a_.profile, o.level);
            add(name, trip.decoded, bits);
        }
    }

    const Arguments& a_;
    const model::Runner& runner_;
    const Case case_;
    const model::QualityProbe probe_;
    ThreadPool pool_;
    nlohmann::json rows_ = nlohmann::json::array();
};

void print_steps(const LayerSteps& steps) {
    fmt::print("{:<7} {:>8} {:>8}\n", "layer", "K", "V");
    for (std::size_t l = 0; l < steps.size() / 2; ++l)
        fmt::print("{:<7} {:>8.3f} {:>8.3f}\n", l, steps[2 * l], steps[2 * l + 1]);
}

void estimate_sensitivity(const Arguments& a, const model::Runner& runner) {
    if (a.output.empty()) throw Error("--sensitivity needs -o FILE for the step multipliers");
    const std::size_t sinks = a.sinks.value_or(EncodeOptions().sinks);
    std::vector<Case> cases;
    for (const std::string& path : a.caches) cases.push_back(open_case(a, path));
    std::vector<model::Sample> samples;
    for (const Case& c : cases) {
        if (sinks >= c.context.tokens())
            throw Error(fmt::format("--sinks {} leaves nothing of {} tokens", sinks, c.context.tokens()));
        samples.push_back({&c.context, c.continuation});
    }
    const bool measured = a.sensitivity == "measured";
    const std::size_t per_sample = measured ? 2 * runner.config().layers : a.draws;
    std::vector<double> sensitivity;
    {
        Progress progress("kveval", samples.size() * per_sample, measured ? "planes" : "passes");
        const auto tick = [&] { progress.advance(1); };
        constexpr std::uint64_t kSeed = 1;
        sensitivity = measured ? model::measured_sensitivity(runner, samples, a.step, sinks, tick)
                               : model::fisher_sensitivity(runner, samples, a.draws, kSeed, sinks, tick);
    }
    const LayerSteps steps = model::steps_of(sensitivity);
    write_layer_steps(a.output, cases[0].context.layout, steps);
    if (a.json) {
        fmt::print("{}\n", nlohmann::json({{"sensitivity", sensitivity}, {"steps", steps}}).dump(2));
    } else {
        print_steps(steps);
    }
}

void check_output(const Arguments& a) {
    std::vector<std::string> read = a.caches;
    read.insert(read.end(), {a.continuation, a.calibration, layer_steps_file(a.layer_steps)});
    refuse_same_file(a.output, read);
}

void evaluate(const Arguments& a) {
    check_output(a);
    const auto runner = model::Runner::load(a.model, a.load);
    if (!a.sensitivity.empty()) return estimate_sensitivity(a, runner);
    if (a.caches.size() == 1 && a.profile.empty())
        throw Error("nothing to compare: give decoded caches, or --profile");
    Evaluation(a, runner).run();
}

}  // namespace

int main(int argc, char** argv) {
    model::prepare_process(argv);
    CLI::App app(
        "Compares what a model predicts on top of decoded KV caches with what it predicts on top of "
        "the exact one.",
        "kveval");
    Arguments a;
    declare(app, a);
    return run_tool(app, argc, argv, [&] { evaluate(a); });
}
