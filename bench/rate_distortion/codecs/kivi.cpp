// KIVI (arXiv 2402.02750): asymmetric b-bit integers, K in groups of 32 tokens per channel, V in groups of 32
// channels per token, scale and zero point in 16 bits each; the newest 32 tokens stay in 16 bits.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "bench/rate_distortion/point.h"

namespace kvcast::bench {
namespace {

constexpr std::size_t kGroup = 32;
constexpr std::size_t kResidual = 32;

float rounded16(float x) {
    return kernels::from_bits(Dtype::kBf16, kernels::to_bits(Dtype::kBf16, x));
}

// `count` values, `stride` apart.
void quantise(float* x, std::size_t count, std::size_t stride, int bits) {
    float low = std::numeric_limits<float>::infinity(), high = -low;
    for (std::size_t i = 0; i < count; ++i) {
        low = std::min(low, x[i * stride]);
        high = std::max(high, x[i * stride]);
    }
    if (high == low) return;
    const float largest = static_cast<float>((1 << bits) - 1);
    const float scale = rounded16((high - low) / largest), zero = rounded16(low);
    for (std::size_t i = 0; i < count; ++i) {
        const float q = std::clamp(std::nearbyint((x[i * stride] - zero) / scale), 0.0f, largest);
        x[i * stride] = q * scale + zero;
    }
}

Coded code(const tools::KvCache& cache, int bits) {
    Coded out = {blank_copy(cache), 0};
    const std::size_t tokens = cache.tokens();
    const std::size_t quantised = tokens < kResidual ? 0 : (tokens - kResidual) / kGroup * kGroup;
    for (std::size_t p = 0; p < cache.planes.size(); ++p) {
        std::vector<float> values = plane_floats(cache, p);
        const std::size_t width = cache.layout.planes[p].width();
        for (std::size_t l = 0; l < cache.layout.layers; ++l) {
            float* const plane = values.data() + l * tokens * width;
            for (std::size_t t = 0; t < quantised; t += kGroup) {
                for (std::size_t i = 0; i < width; ++i) {
                    p == 0 ? quantise(plane + t * width + i, kGroup, width, bits)
                           : quantise(plane + t * width + i * kGroup, kGroup, 1, bits);
                }
            }
            const auto groups = static_cast<double>(quantised * width / kGroup);
            out.bits += groups * (static_cast<double>(kGroup) * bits + 2 * 16);
            out.bits += static_cast<double>((tokens - quantised) * width * 16);
        }
        set_plane(out.decoded, p, values);
    }
    return out;
}

std::vector<Point> points(const Setup&) {
    std::vector<Point> out;
    for (const int bits : {4, 3, 2}) {
        out.push_back({"KIVI", fmt::format("{} bits", bits), bits == 2,
                       [bits](const tools::KvCache& cache, const Setup&) { return code(cache, bits); }});
    }
    return out;
}

const Registration registration(points);

}  // namespace
}  // namespace kvcast::bench
