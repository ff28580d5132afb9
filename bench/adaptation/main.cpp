// bench_abr: rules against a clairvoyant oracle, over traces, deadlines and contexts.
#include <fmt/format.h>
#include <fmt/os.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <map>
#include <optional>
#include <sstream>

#include "bench/adaptation/decision_time.h"
#include "bench/adaptation/oracle.h"
#include "streamer/manifest.h"
#include "streamer/rules/rules.h"
#include "tools/common/cli.h"
#include "tools/common/file.h"

namespace {

using namespace kvcast;
using namespace kvcast::bench;
using namespace kvcast::streamer;

// A kind of model, as the network and the engine see it.
struct ModelClass {
    const char* name;
    double bytes_scale;  // of the publication's objects
    ComputeModel compute;
};

std::vector<ModelClass> model_classes() {
    // 135M parameters on two CPU cores; 8B (32 layers, 8 heads x 128) on one GPU, slower with position.
    ComputeModel small, large;
    small.prefill = {{0, 620}};
    small.decode_bytes_per_second = 0.25e9;
    small.bytes_per_token = 23040;
    large.prefill = {{0, 9000}, {32768, 5000}};
    large.decode_bytes_per_second = 20e9;
    large.bytes_per_token = 131072;
    return {{"smol", 1, small}, {"8b", 131072.0 / 23040, large}};
}

struct Arguments {
    std::vector<std::string> traces;
    std::string publication = "data/publications/smollm2-2048.json";
    std::string csv;
    std::vector<std::string> rules = {"fixed:6", "cachegen", "deadline", "prefix-only", "mpc", "two-pointer"};
    std::vector<double> scales = {100, 1000};
    std::size_t starts = 5;
    bool quick = false;
};

// What becomes of all sessions of one rule in one family of traces.
struct Tally {
    std::vector<double> times;
    std::size_t missed = 0;
    std::size_t oracle_missed = 0;
    std::size_t both_in_time = 0;
    double gain = 0;  // KL below the coarsest level's, where rule and oracle are in time
    double oracle_gain = 0;
    double kl = 0;
    double bytes = 0;
    double text = 0;  // share of tokens
    double decision_seconds = 0;
    std::size_t decisions = 0;

    double quantile(double q) {
        std::ranges::sort(times);
        return times[static_cast<std::size_t>(q * static_cast<double>(times.size() - 1))];
    }
};

std::vector<ChunkView> chunks_of(const Manifest& m, std::size_t tokens, double bytes_scale) {
    std::vector<ChunkView> out;
    // The first chunk has the sinks; later ones repeat.
    for (std::size_t first = 0; first < tokens; first += out.back().tokens) {
        const std::size_t i =
            out.size() < m.chunks.size() ? out.size() : 1 + (out.size() - 1) % (m.chunks.size() - 1);
        ChunkView v;
        v.first_token = first;
        v.tokens = std::min(m.chunks[i].tokens, tokens - first);
        for (const ManifestObject& o : m.chunks[i].objects) {
            const auto level = std::ranges::find(m.levels, o.level, &ManifestLevel::level);
            v.levels.push_back({o.level,
                                static_cast<std::uint64_t>(static_cast<double>(o.bytes) * bytes_scale),
                                level->kl.value_or(o.level), true});
        }
        out.push_back(std::move(v));
    }
    return out;
}

Manifest load_publication(const std::string& path) {
    const tools::MappedFile file(path);
    const auto m = read_manifest({reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()});
    if (!m.ok()) throw tools::Error(fmt::format("{}: {}", path, m.status().message()));
    if (m.value().chunks.size() < 2) throw tools::Error(fmt::format("{}: fewer than two chunks", path));
    return m.value();
}

// Files of a folder, or the file itself.
std::vector<std::string> trace_files(const std::vector<std::string>& paths) {
    std::vector<std::string> out;
    for (const std::string& path : paths) {
        if (!std::filesystem::is_directory(path)) {
            out.push_back(path);
            continue;
        }
        for (const auto& entry : std::filesystem::directory_iterator(path)) {
            const std::string name = entry.path().filename().string();
            if (entry.is_regular_file() && name.find('.') == std::string::npos && name != "LICENSE")
                out.push_back(entry.path().string());
        }
    }
    std::ranges::sort(out);
    if (out.empty()) throw tools::Error("no traces");
    return out;
}

// "3gp_norway_bus_1" is of the family "3gp".
std::string family_of(const std::string& name) {
    return name.substr(0, name.find('_'));
}

class Bench {
  public:
    explicit Bench(const Arguments& a) : a_(a), publication_(load_publication(a.publication)) {
        for (const std::string& name : a.rules) {
            auto rule = rule_by_name(name);
            if (!rule.ok()) throw tools::Error(rule.status().message());
            rules_.push_back(std::move(rule.value()));
        }
        if (!a.csv.empty()) {
            csv_.emplace(fmt::output_file(a.csv));
            csv_->print("trace,scale,model,tokens,deadline,start,rule,time,missed,kl,bytes,text_tokens\n");
        }
    }

    void run() {
        const std::vector<std::size_t> contexts =
            a_.quick ? std::vector<std::size_t>{2048} : std::vector<std::size_t>{2048, 8192, 32768};
        for (const ModelClass& model : model_classes()) {
            for (const std::size_t tokens : contexts) {
                const std::vector<ChunkView> chunks = chunks_of(publication_, tokens, model.bytes_scale);
                const Oracle oracle(chunks);
                for (const std::string& path : trace_files(a_.traces)) sweep(path, model, chunks, oracle);
            }
        }
        report();
        report_decision_times();
    }

  private:
    void sweep(const std::string& path, const ModelClass& model, const std::vector<ChunkView>& chunks,
               const Oracle& oracle) {
        for (const double scale : a_.scales) {
            const Trace trace = Trace::load(path, scale);
            for (const Seconds deadline : {0.3, 1.0, 3.0}) {
                for (std::size_t i = 0; i < a_.starts; ++i) {
                    Scenario s;
                    s.chunks = chunks;
                    s.compute = model.compute;
                    s.trace = &trace;
                    s.start = trace.length() * static_cast<double>(i) / static_cast<double>(a_.starts);
                    s.deadline = deadline;
                    s.prior = {trace.bytes(0, trace.length()) / trace.length(), 0.01};
                    one(s, oracle, model, scale);
                }
            }
        }
    }

    void one(const Scenario& s, const Oracle& oracle, const ModelClass& model, double scale) {
        const SessionResult best = oracle.solve(s);
        record(s, "oracle", best, best, model, scale);
        for (std::size_t r = 0; r < rules_.size(); ++r)
            record(s, a_.rules[r], simulate(s, *rules_[r]), best, model, scale);
    }

    void record(const Scenario& s, const std::string& rule, const SessionResult& got,
                const SessionResult& best, const ModelClass& model, double scale) {
        std::size_t tokens = 0;
        double coarsest = 0;
        for (const ChunkView& c : s.chunks) {
            tokens += c.tokens;
            coarsest += c.levels.back().kl * static_cast<double>(c.tokens);
        }
        coarsest /= static_cast<double>(tokens);
        Tally& t = tallies_[{family_of(s.trace->name()), rule}];
        t.times.push_back(got.time);
        t.missed += got.missed;
        t.oracle_missed += best.missed;
        t.kl += got.kl;
        t.bytes += got.bytes;
        t.text += static_cast<double>(got.text_tokens) / static_cast<double>(tokens);
        t.decisions += got.decisions;
        t.decision_seconds += got.decision_seconds;
        if (!got.missed && !best.missed) {
            ++t.both_in_time;
            t.gain += coarsest - got.kl;
            t.oracle_gain += coarsest - best.kl;
        }
        if (csv_) {
            csv_->print("{},{},{},{},{},{:.3f},{},{:.4f},{},{:.6f},{:.0f},{}\n", s.trace->name(), scale,
                        model.name, tokens, s.deadline, s.start, rule, got.time, got.missed ? 1 : 0, got.kl,
                        got.bytes, got.text_tokens);
        }
    }

    void report() {
        fmt::print("{:<10} {:<11} {:>8} {:>9} {:>9} {:>8} {:>8} {:>8} {:>9} {:>9} {:>7} {:>9}\n", "traces",
                   "rule", "sessions", "missed", "oracle's", "mean s", "p50 s", "p99 s", "KL", "KL gain",
                   "text", "decision");
        for (auto& [key, t] : tallies_) {
            const auto n = static_cast<double>(t.times.size());
            double sum = 0;
            for (const double x : t.times) sum += x;
            const std::string decision =
                t.decisions == 0
                    ? "-"
                    : fmt::format("{:.2f} us", 1e6 * t.decision_seconds / static_cast<double>(t.decisions));
            fmt::print(
                "{:<10} {:<11} {:>8} {:>7.2f} % {:>7.2f} % {:>8.3f} {:>8.3f} {:>8.3f} {:>9.4f} {:>7.1f} % "
                "{:>5.1f} % {:>9}\n",
                key.first, key.second, t.times.size(), 100 * static_cast<double>(t.missed) / n,
                100 * static_cast<double>(t.oracle_missed) / n, sum / n, t.quantile(0.5), t.quantile(0.99),
                t.kl / n, t.oracle_gain > 0 ? 100 * t.gain / t.oracle_gain : 0, 100 * t.text / n, decision);
        }
        fmt::print(
            "KL gain: how much of the oracle's distance to the coarsest level, over sessions that both "
            "finish in time. The "
            "oracle's times are the shortest possible ones, at the coarsest level or as text.\n");
    }

    void report_decision_times() const {
        constexpr std::size_t kChunks = 1000;
        fmt::print("\n{:<12} decision with {} chunks to come\n", "rule", kChunks);
        for (std::size_t r = 0; r < rules_.size(); ++r) {
            const DecisionTime t = time_decisions(*rules_[r], kChunks);
            fmt::print("{:<12} p50 {:>5.1f} us, p99 {:>5.1f} us\n", a_.rules[r], t.p50 * 1e6, t.p99 * 1e6);
        }
    }

    const Arguments& a_;
    const Manifest publication_;
    std::vector<std::unique_ptr<Rule>> rules_;
    std::optional<fmt::ostream> csv_;
    std::map<std::pair<std::string, std::string>, Tally> tallies_;
};

}  // namespace

int main(int argc, char** argv) {
    CLI::App app("Simulates sessions over bandwidth traces: every rule beside a clairvoyant oracle.",
                 "bench_abr");
    Arguments a;
    app.add_option("TRACES", a.traces, "files of lines \"seconds Mbit/s\", or folders of them")->required();
    app.add_option("--publication", a.publication, "manifest whose object sizes and KL are used")
        ->capture_default_str();
    app.add_option("--rules", a.rules)->delimiter(',')->capture_default_str();
    app.add_option("--scales", a.scales, "the traces' rates are multiplied by these")
        ->delimiter(',')
        ->capture_default_str();
    app.add_option("--starts", a.starts, "sessions per trace, begun at different times")
        ->check(CLI::Range(1, 1000))
        ->capture_default_str();
    app.add_option("--csv", a.csv, "write one line per session");
    app.add_flag("--quick", a.quick, "contexts of 2048 tokens only");
    return tools::run_tool(app, argc, argv, [&] { Bench(a).run(); });
}
