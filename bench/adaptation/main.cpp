// bench_abr: rules against a clairvoyant oracle, over traces, deadlines and contexts.
#include <fmt/format.h>
#include <fmt/os.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <filesystem>
#include <optional>

#include "bench/adaptation/cases.h"
#include "bench/adaptation/decision_time.h"
#include "bench/adaptation/oracle.h"
#include "bench/adaptation/tally.h"
#include "streamer/rules/rules.h"
#include "tools/common/cli.h"
#include "tools/common/file.h"
#include "tools/report/session_page.h"

namespace {

using namespace kvcast;
using namespace kvcast::bench;
using namespace kvcast::streamer;

constexpr Seconds kGap = 0.1;  // between sessions that share a link

struct Arguments {
    std::vector<std::string> traces;
    std::string publication = "data/publications/smollm2-2048.json";
    std::string csv;
    std::string figures;
    std::string report;
    std::vector<std::string> rules = {"fixed:6", "cachegen", "deadline", "prefix-only", "mpc", "two-pointer"};
    std::vector<std::string> models = {"smol", "8b"};
    std::vector<std::size_t> contexts = {2048, 8192, 32768};
    std::vector<double> deadlines = {0.3, 1, 3};
    std::vector<double> scales = {100, 1000};
    std::vector<std::size_t> together = {4};
    std::size_t starts = 5;
    bool quick = false;
};

class Bench {
  public:
    explicit Bench(const Arguments& a) : a_(a), publication_(load_publication(a.publication)) {
        for (const std::string& name : a.rules) {
            auto rule = rule_by_name(name);
            if (!rule.ok()) throw tools::Error(rule.status().message());
            rules_.push_back(std::move(rule.value()));
        }
        for (const std::string& folder : {a.figures, a.report}) {
            if (!folder.empty()) std::filesystem::create_directories(folder);
        }
        if (!a.csv.empty()) {
            csv_.emplace(fmt::output_file(a.csv));
            csv_->print(
                "trace,scale,model,tokens,deadline,start,rule,time,fastest,missed,kl,bytes,text_tokens\n");
        }
    }

    void run() {
        const std::vector<std::size_t> contexts = a_.quick ? std::vector<std::size_t>{2048} : a_.contexts;
        for (const ModelClass& model : model_classes()) {
            if (std::ranges::find(a_.models, model.name) == a_.models.end()) continue;
            for (const std::size_t tokens : contexts) {
                const std::vector<ChunkView> chunks = chunks_of(publication_, tokens, model.bytes_scale);
                const Oracle oracle(chunks);
                for (const std::string& path : trace_files(a_.traces)) sweep(path, model, chunks, oracle);
            }
        }
        if (tallies_.empty()) throw tools::Error("no such model: expected smol or 8b");
        print_table(tallies_);
        print_shared();
        print_decision_times();
        if (!a_.figures.empty()) draw_figures(tallies_, a_.rules, a_.figures);
    }

  private:
    // A scenario, and how people call it.
    struct Case {
        Scenario scenario;
        std::string model;
        double scale = 1;
    };

    void sweep(const std::string& path, const ModelClass& model, const std::vector<ChunkView>& chunks,
               const Oracle& oracle) {
        for (const double scale : a_.scales) {
            const Trace trace = Trace::load(path, scale);
            for (const Seconds deadline : a_.deadlines) {
                for (std::size_t i = 0; i < a_.starts; ++i) {
                    Case c;
                    c.model = model.name;
                    c.scale = scale;
                    c.scenario.chunks = chunks;
                    c.scenario.compute = model.compute;
                    c.scenario.trace = &trace;
                    c.scenario.start =
                        trace.length() * static_cast<double>(i) / static_cast<double>(a_.starts);
                    c.scenario.deadline = deadline;
                    c.scenario.prior = {trace.bytes(0, trace.length()) / trace.length(), 0.01};
                    alone(c, oracle);
                    for (const std::size_t sessions : a_.together) together(c, sessions);
                }
            }
        }
    }

    void alone(const Case& c, const Oracle& oracle) {
        const SessionResult best = oracle.solve(c.scenario);
        record(c, "oracle", {&c.scenario, &best, &best, best.time});
        for (std::size_t r = 0; r < rules_.size(); ++r) {
            const SessionResult got = simulate(c.scenario, *rules_[r], !a_.report.empty());
            record(c, a_.rules[r], {&c.scenario, &got, &best, oracle.fastest(c.scenario, got.kl)});
            if (got.recording) write_page(c, a_.rules[r], got);
        }
    }

    void together(const Case& c, std::size_t sessions) {
        for (std::size_t r = 0; r < rules_.size(); ++r) {
            const std::vector<Scenario> scenarios(sessions, c.scenario);
            for (const SessionResult& got : simulate_together(scenarios, *rules_[r], kGap))
                shared_[{sessions, family_of(c.scenario.trace->name()), a_.rules[r]}].add(
                    {&c.scenario, &got, &got, 0});
        }
    }

    void record(const Case& c, const std::string& rule, const Outcome& o) {
        tallies_[{family_of(c.scenario.trace->name()), rule}].add(o);
        if (!csv_) return;
        csv_->print("{},{},{},{},{},{:.3f},{},{:.4f},{:.4f},{},{:.6f},{:.0f},{}\n", c.scenario.trace->name(),
                    c.scale, c.model, tokens_of(c.scenario), c.scenario.deadline, c.scenario.start, rule,
                    o.got->time, o.fastest, o.got->missed ? 1 : 0, o.got->kl, o.got->bytes,
                    o.got->text_tokens);
    }

    static std::size_t tokens_of(const Scenario& s) {
        return s.chunks.back().first_token + s.chunks.back().tokens;
    }

    void write_page(const Case& c, const std::string& rule, const SessionResult& got) const {
        const Scenario& s = c.scenario;
        tools::SessionPage page;
        page.title = fmt::format("{}, rates x {}, from {:.0f} s on: {} tokens of {} in {} s", s.trace->name(),
                                 c.scale, s.start, tokens_of(s), c.model, s.deadline);
        page.rule = rule;
        page.recording = &*got.recording;
        for (Seconds t = 0; t < std::max(got.time, s.deadline) * 1.1;
             t = s.trace->next_change(s.start + t) - s.start)
            page.truth.emplace_back(t, s.trace->rate(s.start + t));
        std::string name = fmt::format("{}-x{}-{}-{}-{}s-{:.0f}-{}.html", s.trace->name(), c.scale, c.model,
                                       tokens_of(s), s.deadline, s.start, rule);
        std::ranges::replace(name, ':', '-');
        tools::write_text(a_.report + "/" + name, render(page));
    }

    void print_shared() const {
        if (shared_.empty()) return;
        fmt::print("\n{:<10} {:<12} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8}   on one link, {} s apart\n",
                   "traces", "rule", "at once", "missed", "mean s", "p99 s", "KL", "text", kGap);
        for (const auto& [key, t] : shared_) {
            const auto& [sessions, family, rule] = key;
            const auto n = static_cast<double>(t.times.size());
            fmt::print("{:<10} {:<12} {:>8} {:>6.2f} % {:>8.3f} {:>8.3f} {:>8.4f} {:>6.1f} %\n", family, rule,
                       sessions, 100 * static_cast<double>(t.missed) / n, t.mean_time(), t.quantile(0.99),
                       t.kl / n, 100 * t.text / n);
        }
    }

    void print_decision_times() const {
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
    Tallies tallies_;
    std::map<std::tuple<std::size_t, std::string, std::string>, Tally> shared_;  // [sessions, family, rule]
};

}  // namespace

int main(int argc, char** argv) {
    CLI::App app("Simulates sessions over bandwidth traces: every rule beside a clairvoyant oracle.",
                 "bench_abr");
    Arguments a;
    app.add_option("TRACES", a.traces, "files of lines \"seconds Mbit/s\", or folders of them")->required();
    app.add_option("--publication", a.publication, "manifest whose object sizes and KL are used")
        ->capture_default_str();
    const auto list = [&](const char* name, auto& values, const char* help) {
        app.add_option(name, values, help)->delimiter(',')->capture_default_str();
    };
    list("--rules", a.rules, kRuleNames);
    list("--models", a.models, "smol, 8b");
    list("--contexts", a.contexts, "tokens");
    list("--deadlines", a.deadlines, "seconds");
    list("--scales", a.scales, "the traces' rates are multiplied by these");
    list("--together", a.together, "sessions that share a link, 0.1 s apart");
    app.add_option("--starts", a.starts, "sessions per trace, begun at different times")
        ->check(CLI::Range(1, 1000))
        ->capture_default_str();
    app.add_option("--csv", a.csv, "write one line per session");
    app.add_option("--figures", a.figures, "folder for misses.svg and times.svg");
    app.add_option("--report", a.report, "folder for a page about every session: meant for a few of them");
    app.add_flag("--quick", a.quick, "contexts of 2048 tokens only");
    return tools::run_tool(app, argc, argv, [&] { Bench(a).run(); });
}
