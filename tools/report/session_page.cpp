#include "tools/report/session_page.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <set>

#include "tools/report/svg.h"
#include "tools/report/timeline.h"

namespace kvcast::tools {
namespace {

using namespace streamer;

constexpr double kWidth = 1000, kLeft = 84, kRight = 16;
constexpr double kPlotHeight = 120, kLaneHeight = 20, kGap = 42;
constexpr std::size_t kMostPoints = 1500;  // of a curve

constexpr const char* kStyle = R"(
:root { color-scheme: light dark; --ground: #fcfcfb; --ink: #1c1c1a; --soft: #6b6b66; --grid: #e4e4df;
  --truth: #d9d9d2; --estimate: #1f6fd6; --flight: #8fb8ec; --text: #d9822b; --decode: #8a8f98; --bad: #c2362b;
  --good: #2a7d46; }
@media (prefers-color-scheme: dark) { :root { --ground: #191918; --ink: #ecece6; --soft: #a2a29b;
  --grid: #33332f; --truth: #42423d; --estimate: #6fa8f5; --flight: #3c5f8f; --text: #e59a4c; --decode: #7c818a;
  --bad: #ef6a5e; --good: #5cba7d; } }
body { background: var(--ground); color: var(--ink); font: 15px/1.45 system-ui, sans-serif; max-width: 1080px;
  margin: 24px auto; padding: 0 20px; }
h1 { font-size: 18px; font-weight: 600; margin: 0 0 2px; overflow-wrap: anywhere; }
p { margin: 2px 0; color: var(--soft); }
.verdict { font-size: 21px; font-weight: 600; color: var(--ink); margin: 10px 0 2px; }
.in-time b { color: var(--good); } .late b { color: var(--bad); }
svg { width: 100%; height: auto; margin-top: 8px; display: block; }
text { fill: var(--soft); font-size: 12px; } text.name { fill: var(--ink); font-weight: 600; }
text.inside { fill: #fff; font-size: 11px; pointer-events: none; } text.bad { fill: var(--bad); }
text.inside.on-light { fill: #102540; }
.grid { stroke: var(--grid); } .truth { fill: var(--truth); } .flight { fill: var(--flight); }
.estimate { stroke: var(--estimate); stroke-width: 2; fill: none; stroke-linejoin: round; }
.deadline { stroke: var(--bad); stroke-width: 1.5; stroke-dasharray: 5 4; }
.given-up { fill: none; stroke: var(--bad); stroke-width: 1.2; }
.text { fill: var(--text); } .decode { fill: var(--decode); } .waiting { fill: var(--text); opacity: .35; }
.present { fill: var(--grid); }
rect:hover { filter: brightness(1.15); }
)";

// Time runs from left to right, the same in all panels.
struct Axis {
    Seconds end = 1;
    double x(Seconds t) const { return kLeft + t / end * (kWidth - kLeft - kRight); }
};

// 1, 2 or 5 times a power of ten: about `count` of them in `range`.
double round_step(double range, double count) {
    const double raw = range / count;
    const double power = std::pow(10, std::floor(std::log10(raw)));
    for (const double m : {1.0, 2.0, 5.0}) {
        if (m * power >= raw) return m * power;
    }
    return 10 * power;
}

std::string rate_text(double bits_per_second) {
    const double mbit = bits_per_second / 1e6;
    return mbit >= 1000 ? fmt::format("{:.3g} Gbit/s", mbit / 1e3) : fmt::format("{:.3g} Mbit/s", mbit);
}

std::string bytes_text(double bytes) {
    return bytes >= 1e6 ? fmt::format("{:.3g} MB", bytes / 1e6) : fmt::format("{:.3g} kB", bytes / 1e3);
}

std::string time_text(Seconds t) {
    return t >= 10 ? fmt::format("{:.1f} s", t) : fmt::format("{:.0f} ms", t * 1e3);
}

// From the finest level (dark) to the coarsest (light).
class Shades {
  public:
    explicit Shades(const Timeline& t) {
        std::set<unsigned> used;
        for (const Attempt& a : t.attempts) used.insert(a.level);
        levels_.assign(used.begin(), used.end());
    }
    const std::vector<unsigned>& levels() const { return levels_; }
    double lightness(unsigned level) const {
        const auto at = std::ranges::lower_bound(levels_, level) - levels_.begin();
        const double last = std::max<double>(1, static_cast<double>(levels_.size()) - 1);
        return 34 + 42 * static_cast<double>(at) / last;
    }
    std::string of(unsigned level) const { return fmt::format("hsl(214 62% {:.0f}%)", lightness(level)); }

  private:
    std::vector<unsigned> levels_;
};

class Page {
  public:
    explicit Page(const SessionPage& page)
        : page_(page), r_(*page.recording), t_(timeline_of(r_)), shades_(t_) {
        const Seconds known =
            std::isinf(r_.options.deadline) ? t_.end : std::max(t_.end, r_.options.deadline);
        axis_.end = std::max(known * 1.03, 0.01);
        // Many chunks have thin rows.
        row_ = std::clamp(420.0 / static_cast<double>(std::max<std::size_t>(r_.chunks.size(), 1)), 3.0, 18.0);
    }

    std::string html() const {
        return "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n"
               "<meta name=\"viewport\" content=\"width=device-width\">\n<title>" +
               html_escaped(page_.title) + "</title>\n<style>" + kStyle + "</style></head>\n<body>\n" +
               head() + drawing() + "</body></html>\n";
    }

  private:
    std::string head() const {
        const Seconds deadline = r_.options.deadline;
        const bool late = !t_.complete || t_.end > deadline;
        std::string verdict =
            fmt::format("<b>{}</b> after {}", t_.complete ? "Complete" : "Incomplete", time_text(t_.end));
        if (!std::isinf(deadline)) {
            verdict =
                fmt::format("<b>{}</b> by {}: {} of {}", late ? "Late" : "In time",
                            time_text(std::abs(deadline - t_.end)), time_text(t_.end), time_text(deadline));
        }
        double bytes = 0;
        std::size_t given_up = 0;
        for (const Attempt& a : t_.attempts) {
            bytes += a.arrived ? static_cast<double>(a.bytes) : 0;
            given_up += a.arrived ? 0 : 1;
        }
        return fmt::format(
            "<h1>{}</h1>\n<p>rule {}</p>\n<p class=\"verdict {}\">{}</p>\n"
            "<p>{} of {} tokens loaded ({}{}), {} recomputed from text{}; expected KL {}{}</p>\n",
            html_escaped(page_.title), html_escaped(page_.rule), late ? "late" : "in-time", verdict,
            t_.tokens - t_.text_tokens - t_.present_tokens, t_.tokens, bytes_text(bytes), level_range(),
            t_.text_tokens,
            t_.present_tokens == 0 ? "" : fmt::format(", {} present before", t_.present_tokens),
            t_.kl < 0 ? "unknown" : fmt::format("{:.4f}", t_.kl),
            given_up == 0 ? "" : fmt::format("; {} transfers given up", given_up));
    }

    std::string level_range() const {
        std::set<unsigned> arrived;
        for (const Attempt& a : t_.attempts) {
            if (a.arrived) arrived.insert(a.level);
        }
        if (arrived.empty()) return "";
        if (arrived.size() == 1) return fmt::format(", level {}", *arrived.begin());
        return fmt::format(", levels {} to {}", *arrived.begin(), *arrived.rbegin());
    }

    std::string drawing() const {
        const double rows = row_ * static_cast<double>(r_.chunks.size());
        const double throughput = 24, flight = throughput + kPlotHeight + kGap;
        const double chunks = flight + kPlotHeight * 0.6 + kGap, lanes = chunks + rows + kGap;
        const double bottom = lanes + 2 * kLaneHeight + 6;
        Svg svg(kWidth, bottom + 26);
        time_grid(svg, throughput, bottom);
        throughput_panel(svg, throughput);
        flight_panel(svg, flight, kPlotHeight * 0.6);
        chunk_panel(svg, chunks);
        lane_panel(svg, lanes);
        deadline_line(svg, throughput, kPlotHeight);
        deadline_line(svg, flight, kPlotHeight * 0.6);
        deadline_line(svg, chunks, rows);
        deadline_line(svg, lanes, 2 * kLaneHeight + 6);
        if (!std::isinf(r_.options.deadline))
            svg.text({axis_.x(r_.options.deadline), throughput - 9}, "deadline", "bad", "middle");
        return std::move(svg).finish();
    }

    void time_grid(Svg& svg, double top, double bottom) const {
        const double step = round_step(axis_.end, 8);
        for (int i = 0; step * i <= axis_.end; ++i) {
            const Seconds t = step * i;
            svg.line({axis_.x(t), top}, {axis_.x(t), bottom}, "grid");
            svg.text({axis_.x(t), bottom + 16}, time_text(t), "", "middle");
        }
    }

    void deadline_line(Svg& svg, double top, double height) const {
        const Seconds deadline = r_.options.deadline;
        if (std::isinf(deadline)) return;
        svg.line({axis_.x(deadline), top}, {axis_.x(deadline), top + height}, "deadline",
                 "deadline: " + time_text(deadline));
    }

    // What a panel's height stands for.
    struct Scale {
        double top = 0;
        double height = 1;
        double most = 1;
        double step = 1;
        // Room for values up to `value`, in round steps.
        void reach(double value) {
            value = std::max(value, 1.0);
            step = round_step(value, 3);
            most = std::ceil(value / step) * step;
        }
        double y(double value) const { return top + height * (1 - std::min(value / most, 1.0)); }
    };

    void value_axis(Svg& svg, const Scale& s, std::string (*name)(double)) const {
        for (int i = 0; s.step * i <= s.most * 1.001; ++i) {
            const double v = s.step * i;
            svg.line({kLeft, s.y(v)}, {kWidth - kRight, s.y(v)}, "grid");
            if (v > 0) svg.text({kLeft - 6, s.y(v) + 4}, name(v), "", "end");
        }
    }

    void throughput_panel(Svg& svg, double top) const {
        double most = 0;
        for (const Moment& m : t_.moments) {
            if (m.network.measured) most = std::max(most, 8 * m.network.robust);
        }
        for (const auto& [time, rate] : page_.truth) {
            if (time <= t_.end) most = std::max(most, 8 * rate);
        }
        Scale s = {top, kPlotHeight};
        s.reach(most);
        title(
            svg, top,
            page_.truth.empty() ? "Throughput counted on" : "Throughput: the link's (grey), and counted on");
        svg.area(truth_steps(s), s.y(0), "truth");
        value_axis(svg, s, rate_text);
        svg.polyline(curve([](const Moment& m) { return 8 * m.network.robust; }, s), "estimate");
    }

    void flight_panel(Svg& svg, double top, double height) const {
        double most = 0;
        for (const Moment& m : t_.moments) most = std::max(most, m.bytes_in_flight);
        Scale s = {top, height};
        s.reach(most);
        title(svg, top, "Bytes in flight");
        svg.area(curve([](const Moment& m) { return m.bytes_in_flight; }, s), s.y(0), "flight");
        value_axis(svg, s, bytes_text);
    }

    void title(Svg& svg, double top, std::string_view text) const {
        svg.text({kLeft, top - 9}, text, "name");
    }

    std::vector<Point> truth_steps(const Scale& s) const {
        std::vector<Point> out;
        for (std::size_t i = 0; i < page_.truth.size(); ++i) {
            const auto [from, rate] = page_.truth[i];
            const Seconds to = i + 1 < page_.truth.size() ? page_.truth[i + 1].first : axis_.end;
            if (from > axis_.end || to < 0) continue;
            out.push_back({axis_.x(std::max(from, 0.0)), s.y(8 * rate)});
            out.push_back({axis_.x(std::min(to, axis_.end)), s.y(8 * rate)});
        }
        return out;
    }

    template <typename Value>
    std::vector<Point> curve(const Value& value, const Scale& s) const {
        std::vector<Point> out;
        const std::size_t stride = t_.moments.size() / kMostPoints + 1;
        for (std::size_t i = 0; i < t_.moments.size(); i += stride) {
            const Point p = {axis_.x(t_.moments[i].time), s.y(value(t_.moments[i]))};
            if (!out.empty()) out.push_back({p.x, out.back().y});
            out.push_back(p);
        }
        return out;
    }

    void chunk_panel(Svg& svg, double top) const {
        title(svg, top, "Chunks: from the request to the last byte, darker is finer");
        legend(svg, top - 9);
        const std::size_t step = r_.chunks.size() <= 24 ? 1 : (r_.chunks.size() + 7) / 8;
        for (std::size_t i = 0; i < r_.chunks.size(); i += step) {
            const ChunkView& c = r_.chunks[i];
            svg.text({kLeft - 6, row(top, i) + row_ / 2 + 4}, fmt::format("{}", c.first_token), "", "end");
        }
        svg.text({kLeft - 6, top - 9}, "token", "", "end");
        for (std::size_t i = 0; i < r_.chunks.size(); ++i) {
            if (r_.chunks[i].status == ChunkStatus::kPresent) present_chunk(svg, top, i);
        }
        for (const Attempt& a : t_.attempts) attempt(svg, top, a);
        for (const TextChunk& c : t_.text) text_chunk(svg, top, c);
    }

    double row(double top, std::size_t chunk) const { return top + row_ * static_cast<double>(chunk); }
    double bar() const { return std::max(row_ - (row_ > 6 ? 2 : 0.5), 1.0); }

    std::string tokens_of(std::size_t first, std::size_t end) const {
        const ChunkView& last = r_.chunks[end - 1];
        return fmt::format("tokens {}-{}", r_.chunks[first].first_token, last.first_token + last.tokens - 1);
    }

    void attempt(Svg& svg, double top, const Attempt& a) const {
        const Point corner = {axis_.x(a.from), row(top, a.chunk)};
        const double width = std::max(axis_.x(a.to) - corner.x, 1.5);
        const std::string hint =
            fmt::format("{}, level {}, {}\n{} to {}{}\n{}", tokens_of(a.chunk, a.chunk + 1), a.level,
                        bytes_text(static_cast<double>(a.bytes)), time_text(a.from), time_text(a.to),
                        a.arrived ? "" : ": given up", a.reason);
        svg.rectangle(corner, width, bar(), a.arrived ? "" : "given-up", hint,
                      a.arrived ? shades_.of(a.level) : "");
        if (!a.arrived || row_ < 12 || width < 22) return;
        svg.text({corner.x + 4, corner.y + bar() / 2 + 4}, fmt::format("{}", a.level),
                 shades_.lightness(a.level) > 58 ? "inside on-light" : "inside");
    }

    void present_chunk(Svg& svg, double top, std::size_t chunk) const {
        svg.rectangle({axis_.x(0), row(top, chunk)}, axis_.x(t_.end) - axis_.x(0), bar(), "present",
                      tokens_of(chunk, chunk + 1) + ", present before");
    }

    // Light while it waits for the engine, full while it is recomputed.
    void text_chunk(Svg& svg, double top, const TextChunk& c) const {
        const auto work = std::ranges::find_if(
            t_.recomputing, [&](const Work& w) { return w.first <= c.chunk && c.chunk < w.end; });
        const bool begun = work != t_.recomputing.end();
        const std::string hint = fmt::format("{}, as text\ndecided at {}\n{}",
                                             tokens_of(c.chunk, c.chunk + 1), time_text(c.decided), c.reason);
        const double x = axis_.x(c.decided), until = axis_.x(begun ? work->from : t_.end);
        svg.rectangle({x, row(top, c.chunk)}, std::max(until - x, 1.5), bar(), "waiting", hint);
        if (!begun) return;
        const double end = axis_.x(std::max(work->to, work->from));
        svg.rectangle({until, row(top, c.chunk)}, std::max(end - until, 1.5), bar(), "text", hint);
    }

    void legend(Svg& svg, double y) const {
        double x = kWidth - kRight;
        const auto entry = [&](const std::string& label, std::string_view style, const std::string& fill) {
            x -= 8.0 + 6.6 * static_cast<double>(label.size());
            svg.text({x, y}, label, "");
            x -= 15;
            svg.rectangle({x, y - 10}, 11, 11, style, {}, fill);
            x -= 10;
        };
        if (std::ranges::any_of(t_.attempts, [](const Attempt& a) { return !a.arrived; }))
            entry("given up", "given-up", "");
        if (t_.present_tokens > 0) entry("present", "present", "");
        if (!t_.text.empty()) entry("text", "text", "");
        const std::vector<unsigned>& levels = shades_.levels();
        const std::size_t step = levels.size() / 6 + 1;
        for (std::size_t i = levels.size(); i-- > 0;) {
            if (i % step == 0) entry(fmt::format("level {}", levels[i]), "", shades_.of(levels[i]));
        }
    }

    void lane_panel(Svg& svg, double top) const {
        title(svg, top, "Decoder and engine");
        lane(svg, top, "decode", t_.decoding, "decode");
        lane(svg, top + kLaneHeight, "recompute", t_.recomputing, "text");
    }

    void lane(Svg& svg, double top, std::string_view name, const std::vector<Work>& works,
              std::string_view style) const {
        svg.text({kLeft - 6, top + 13}, name, "", "end");
        svg.line({kLeft, top + kLaneHeight - 2}, {kWidth - kRight, top + kLaneHeight - 2}, "grid");
        for (const Work& w : works) {
            const Seconds to = std::max(w.to, w.from);
            svg.rectangle({axis_.x(w.from), top}, std::max(axis_.x(to) - axis_.x(w.from) - 1, 1.0),
                          kLaneHeight - 4, style,
                          fmt::format("{}: {}\n{} to {}", name, tokens_of(w.first, w.end), time_text(w.from),
                                      time_text(to)));
        }
    }

    const SessionPage& page_;
    const Recording& r_;
    const Timeline t_;
    const Shades shades_;
    Axis axis_;
    double row_ = 18;
};

}  // namespace

std::string render(const SessionPage& page) {
    return Page(page).html();
}

}  // namespace kvcast::tools
