// Plain uniform quantisation, b bits: one scale per head and token, symmetric, the scale in 16 bits.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "bench/rate_distortion/point.h"

namespace kvcast::bench {
namespace {

void quantise(std::span<float> row, int bits) {
    float top = 0;
    for (const float x : row) top = std::max(top, std::abs(x));
    if (top == 0) return;
    const float largest = static_cast<float>((1 << (bits - 1)) - 1);
    const float scale = kernels::from_bits(Dtype::kBf16, kernels::to_bits(Dtype::kBf16, top / largest));
    for (float& x : row) x = std::clamp(std::nearbyint(x / scale), -largest, largest) * scale;
}

Coded code(const tools::KvCache& cache, int bits) {
    Coded out = {blank_copy(cache), 0};
    for (std::size_t p = 0; p < cache.planes.size(); ++p) {
        std::vector<float> values = plane_floats(cache, p);
        const std::size_t head = cache.layout.planes[p].head_dim;
        for (std::size_t i = 0; i < values.size(); i += head) {
            quantise(std::span(values).subspan(i, head), bits);
            out.bits += static_cast<double>(head) * bits + 16;
        }
        set_plane(out.decoded, p, values);
    }
    return out;
}

std::vector<Point> points(const Setup&) {
    std::vector<Point> out;
    for (const int bits : {8, 4}) {
        out.push_back({"uniform per head and token", fmt::format("{} bits", bits), bits == 8,
                       [bits](const tools::KvCache& cache, const Setup&) { return code(cache, bits); }});
    }
    return out;
}

const Registration registration(points);

}  // namespace
}  // namespace kvcast::bench
