// Drawing into a string: the little of SVG and HTML that reports need.
#pragma once

#include <span>
#include <string>
#include <string_view>

namespace kvcast::tools {

// Safe as text and within quoted attributes: & < > " ' are replaced.
std::string html_escaped(std::string_view text);

struct Point {
    double x = 0;
    double y = 0;
};

// One <svg> of the given size in pixels, scaled to its page's width. Colours come from the page's style
// sheet, or from `sheet` within the drawing; `style` is a list of classes, `fill` and `stroke` are colours of
// their own. A non-empty `hint` appears on hover; hints and labels are escaped.
class Svg {
  public:
    Svg(double width, double height, std::string_view sheet = {});

    void rectangle(Point corner, double width, double height, std::string_view style,
                   std::string_view hint = {}, std::string_view fill = {});
    void line(Point from, Point to, std::string_view style, std::string_view hint = {});
    void polyline(std::span<const Point> points, std::string_view style, std::string_view stroke = {});
    // The area between the points and y = base.
    void area(std::span<const Point> points, double base, std::string_view style);
    // `anchor`: start, middle or end.
    void text(Point at, std::string_view label, std::string_view style, std::string_view anchor = "start");

    std::string finish() &&;

  private:
    std::string out_;
};

}  // namespace kvcast::tools
