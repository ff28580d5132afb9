#include "tools/report/svg.h"

#include <fmt/format.h>

#include <iterator>

namespace kvcast::tools {
namespace {

// What closes an element: with a hint, the hint comes within it.
std::string closing(std::string_view name, std::string_view hint) {
    if (hint.empty()) return "/>\n";
    return fmt::format("><title>{}</title></{}>\n", html_escaped(hint), name);
}

}  // namespace

std::string html_escaped(std::string_view text) {
    std::string out;
    for (const char c : text) {
        switch (c) {
            case '&':
                out += "&amp;";
                break;
            case '<':
                out += "&lt;";
                break;
            case '>':
                out += "&gt;";
                break;
            case '"':
                out += "&quot;";
                break;
            case '\'':
                out += "&#39;";
                break;
            default:
                out += c;
        }
    }
    return out;
}

Svg::Svg(double width, double height, std::string_view sheet)
    : out_(fmt::format(
          "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {:.0f} {:.0f}\" role=\"img\">\n", width,
          height)) {
    if (!sheet.empty()) out_ += fmt::format("<style>{}</style>\n", sheet);
}

void Svg::rectangle(Point corner, double width, double height, std::string_view style, std::string_view hint,
                    std::string_view fill) {
    out_ += fmt::format("<rect x=\"{:.1f}\" y=\"{:.1f}\" width=\"{:.1f}\" height=\"{:.1f}\" class=\"{}\"",
                        corner.x, corner.y, width, height, style);
    if (!fill.empty()) out_ += fmt::format(" style=\"fill:{}\"", html_escaped(fill));
    out_ += closing("rect", hint);
}

void Svg::line(Point from, Point to, std::string_view style, std::string_view hint) {
    out_ += fmt::format("<line x1=\"{:.1f}\" y1=\"{:.1f}\" x2=\"{:.1f}\" y2=\"{:.1f}\" class=\"{}\"{}",
                        from.x, from.y, to.x, to.y, style, closing("line", hint));
}

void Svg::polyline(std::span<const Point> points, std::string_view style, std::string_view stroke) {
    out_ += fmt::format("<polyline class=\"{}\"", style);
    if (!stroke.empty()) out_ += fmt::format(" style=\"stroke:{}\"", html_escaped(stroke));
    out_ += " points=\"";
    for (const Point& p : points) fmt::format_to(std::back_inserter(out_), "{:.1f},{:.1f} ", p.x, p.y);
    out_ += "\"/>\n";
}

void Svg::area(std::span<const Point> points, double base, std::string_view style) {
    if (points.empty()) return;
    out_ += fmt::format("<polygon class=\"{}\" points=\"{:.1f},{:.1f} ", style, points.front().x, base);
    for (const Point& p : points) fmt::format_to(std::back_inserter(out_), "{:.1f},{:.1f} ", p.x, p.y);
    out_ += fmt::format("{:.1f},{:.1f}\"/>\n", points.back().x, base);
}

void Svg::text(Point at, std::string_view label, std::string_view style, std::string_view anchor) {
    out_ += fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\" class=\"{}\" text-anchor=\"{}\">{}</text>\n", at.x,
                        at.y, style, anchor, html_escaped(label));
}

std::string Svg::finish() && {
    out_ += "</svg>\n";
    return std::move(out_);
}

}  // namespace kvcast::tools
