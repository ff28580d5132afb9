#include "bench/rate_distortion/point.h"

#include <algorithm>

namespace kvcast::bench {
namespace {

std::vector<PointsFunction>& functions() {
    static std::vector<PointsFunction> list;
    return list;
}

}  // namespace

Registration::Registration(PointsFunction function) {
    functions().push_back(function);
}

std::vector<Point> all_points(const Setup& setup) {
    std::vector<Point> out;
    for (const PointsFunction function : functions()) {
        for (Point& point : function(setup)) out.push_back(std::move(point));
    }
    std::stable_sort(out.begin(), out.end(),
                     [](const Point& a, const Point& b) { return a.family < b.family; });
    return out;
}

}  // namespace kvcast::bench
