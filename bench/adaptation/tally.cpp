#include "bench/adaptation/tally.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <set>

#include "tools/common/file.h"
#include "tools/report/svg.h"

namespace kvcast::bench {
namespace {

using tools::Point;
using tools::Svg;

double coarsest_kl(const Scenario& s, double& tokens) {
    double kl = 0;
    for (const ChunkView& c : s.chunks) {
        tokens += static_cast<double>(c.tokens);
        kl += c.levels.back().kl * static_cast<double>(c.tokens);
    }
    return kl / tokens;
}

double percent(std::size_t part, std::size_t of) {
    return 100 * static_cast<double>(part) / static_cast<double>(std::max<std::size_t>(of, 1));
}

constexpr const char* kStyle =
    "svg{background:#fcfcfb;font:12px "
    "system-ui,sans-serif}text{fill:#55554f}.name{font-weight:600;fill:#1c1c1a}"
    ".grid{stroke:#e4e4df}.line{fill:none;stroke-width:2}.limit{stroke:#c2362b;stroke-dasharray:5 4}";
constexpr std::array kColours = {"#8a8f98", "#d9822b", "#7a5bb5", "#2a9d8f", "#c2588d", "#b08c2e"};
constexpr const char* kDefaultColour = "#1f6fd6";  // of the last rule, the one that matters
constexpr const char* kOracleColour = "#1c1c1a";

std::string colour_of(const std::vector<std::string>& rules, std::size_t i) {
    if (i == rules.size()) return kOracleColour;
    return i + 1 == rules.size() ? kDefaultColour : kColours[i % kColours.size()];
}

std::vector<std::string> families_of(const Tallies& tallies) {
    std::set<std::string> out;
    for (const auto& [key, tally] : tallies) out.insert(key.first);
    return {out.begin(), out.end()};
}

// A bar a rule, in one group a family; the oracle's misses as a line across its group.
void draw_misses(const Tallies& tallies, const std::vector<std::string>& rules, const std::string& path) {
    const auto families = families_of(tallies);
    const double row = 20, left = 110, scale = 6, group = row * static_cast<double>(rules.size()) + 40;
    Svg svg(760, group * static_cast<double>(families.size()) + 30, kStyle);
    double y = 24;
    for (const std::string& family : families) {
        const Tally& oracle = tallies.at({family, "oracle"});
        svg.text({left, y}, fmt::format("{}: deadlines missed, % ({} sessions)", family, oracle.times.size()),
                 "name");
        const double x = left + scale * percent(oracle.missed, oracle.times.size());
        for (std::size_t r = 0; r < rules.size(); ++r) {
            const Tally& t = tallies.at({family, rules[r]});
            const double missed = percent(t.missed, t.times.size());
            const double top = y + 8 + row * static_cast<double>(r);
            svg.rectangle({left, top}, scale * missed, row - 4, "", {}, colour_of(rules, r));
            svg.text({left - 8, top + 12}, rules[r], "", "end");
            svg.text({std::max(left + scale * missed, x) + 6, top + 12}, fmt::format("{:.1f}", missed), "");
        }
        svg.line({x, y + 6}, {x, y + 6 + row * static_cast<double>(rules.size())}, "limit");
        svg.text({x + 4, y + 18 + row * static_cast<double>(rules.size())},
                 fmt::format("oracle {:.1f}", percent(oracle.missed, oracle.times.size())), "");
        y += group;
    }
    tools::write_text(path, std::move(svg).finish());
}

// Share of sessions that are over within a part of their deadline.
void draw_times(const Tallies& tallies, const std::vector<std::string>& rules, const std::string& path) {
    const auto families = families_of(tallies);
    constexpr double kMost = 2, kWidth = 300, kHeight = 220, kLeft = 50;
    Svg svg(kLeft + (kWidth + 30) * static_cast<double>(families.size()) + 110, kHeight + 80, kStyle);
    for (std::size_t f = 0; f < families.size(); ++f) {
        const double left = kLeft + (kWidth + 30) * static_cast<double>(f), bottom = 40 + kHeight;
        svg.text({left, 24}, families[f], "name");
        for (const double part : {0.0, 0.5, 1.0, 1.5, 2.0}) {
            const double x = left + part / kMost * kWidth;
            svg.line({x, 40}, {x, bottom}, part == 1 ? "limit" : "grid");
            svg.text({x, bottom + 16}, fmt::format("{}", part), "", "middle");
            if (f == 0)
                svg.text({left - 6, bottom - part / 2 * kHeight + 4}, fmt::format("{:.0f} %", part * 50), "",
                         "end");
            svg.line({left, bottom - part / 2 * kHeight}, {left + kWidth, bottom - part / 2 * kHeight},
                     "grid");
        }
        for (std::size_t r = 0; r <= rules.size(); ++r) {
            std::vector<double> parts =
                tallies.at({families[f], r < rules.size() ? rules[r] : "oracle"}).parts;
            std::ranges::sort(parts);
            std::vector<Point> points;
            const std::size_t step = parts.size() / 200 + 1;
            for (std::size_t i = 0; i < parts.size() && parts[i] <= kMost; i += step)
                points.push_back(
                    {left + parts[i] / kMost * kWidth,
                     bottom - kHeight * static_cast<double>(i + 1) / static_cast<double>(parts.size())});
            svg.polyline(points, "line", colour_of(rules, r));
        }
    }
    svg.text({kLeft, kHeight + 74}, "sessions that are over within this part of their deadline", "");
    const double x = kLeft + (kWidth + 30) * static_cast<double>(families.size());
    for (std::size_t r = 0; r <= rules.size(); ++r) {
        const double y = 50 + 18 * static_cast<double>(r);
        svg.rectangle({x, y - 9}, 11, 11, "", {}, colour_of(rules, r));
        svg.text({x + 16, y}, r < rules.size() ? rules[r] : "oracle", "");
    }
    tools::write_text(path, std::move(svg).finish());
}

}  // namespace

void Tally::add(const Outcome& o) {
    double tokens = 0;
    const double coarsest = coarsest_kl(*o.scenario, tokens);
    times.push_back(o.got->time);
    parts.push_back(o.got->time / o.scenario->deadline);
    missed += o.got->missed;
    oracle_missed += o.oracle->missed;
    fastest += o.fastest;
    kl += o.got->kl;
    bytes += o.got->bytes;
    text += static_cast<double>(o.got->text_tokens) / tokens;
    decisions += o.got->decisions;
    decision_seconds += o.got->decision_seconds;
    if (o.oracle->missed) return;
    oracle_gain += coarsest - o.oracle->kl;
    if (!o.got->missed) gain += coarsest - o.got->kl;
}

double Tally::quantile(double q) const {
    std::vector<double> sorted = times;
    std::ranges::sort(sorted);
    return sorted[static_cast<std::size_t>(q * static_cast<double>(sorted.size() - 1))];
}

double Tally::mean_time() const {
    double sum = 0;
    for (const double t : times) sum += t;
    return sum / static_cast<double>(times.size());
}

void print_table(const Tallies& tallies) {
    fmt::print("{:<10} {:<12} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>9} {:>8} {:>8} {:>8} {:>7} {:>9}\n",
               "traces", "rule", "sessions", "missed", "oracle's", "mean s", "p50 s", "p99 s", "fastest s",
               "KL", "KL gain", "MB", "text", "decision");
    for (const auto& [key, t] : tallies) {
        const auto n = static_cast<double>(t.times.size());
        const std::string decision =
            t.decisions == 0
                ? "-"
                : fmt::format("{:.2f} us", 1e6 * t.decision_seconds / static_cast<double>(t.decisions));
        fmt::print(
            "{:<10} {:<12} {:>8} {:>6.2f} % {:>6.2f} % {:>8.3f} {:>8.3f} {:>8.3f} {:>9.3f} {:>8.4f} {:>6.1f} "
            "% "
            "{:>8.1f} {:>5.1f} % {:>9}\n",
            key.first, key.second, t.times.size(), percent(t.missed, t.times.size()),
            percent(t.oracle_missed, t.times.size()), t.mean_time(), t.quantile(0.5), t.quantile(0.99),
            t.fastest / n, t.kl / n, t.oracle_gain > 0 ? 100 * t.gain / t.oracle_gain : 0, t.bytes / n / 1e6,
            100 * t.text / n, decision);
    }
    fmt::print(
        "fastest: the oracle's shortest mean time for the KL that the rule got. KL gain: of the oracle's "
        "distance "
        "to the coarsest level's KL,\nover sessions that the oracle makes in time; a missed one gains "
        "nothing. "
        "The oracle's own times are the shortest possible ones.\n");
}

void draw_figures(const Tallies& tallies, const std::vector<std::string>& rules, const std::string& folder) {
    draw_misses(tallies, rules, folder + "/misses.svg");
    draw_times(tallies, rules, folder + "/times.svg");
}

}  // namespace kvcast::bench
