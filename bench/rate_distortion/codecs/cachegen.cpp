// CacheGen (arXiv 2310.07240) as LMCache ships it: per plane, layer and token one maximum over all heads and
// channels; symbols round(x C / max) + C with C = bins / 2 - 1; per layer and channel a histogram of the
// chunk's own symbols, sent as 33 cumulative frequencies of 16 bits, and one arithmetic-coded stream, byte
// aligned, with a length of 32 bits; maxima in 16 bits.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "bench/rate_distortion/point.h"

namespace kvcast::bench {
namespace {

constexpr std::size_t kCdfEntries = 33;
constexpr int kLargestBins = 32;

struct Bins {
    std::size_t fine_k_layers = 10;
    std::size_t fine_v_layers = 2;

    int of(std::size_t plane, std::size_t layer) const {
        return layer < (plane == 0 ? fine_k_layers : fine_v_layers) ? 32 : 16;
    }
};

// Bits of one channel's stream under the chunk's own 16-bit distribution.
double stream_bits(const std::array<std::size_t, kLargestBins>& histogram, std::size_t tokens) {
    // Each symbol keeps one count; the rest of 2^16 is shared by frequency.
    const double shared = 65536.0 - (kCdfEntries - 1);
    double bits = 0;
    for (const std::size_t n : histogram) {
        if (n == 0) continue;
        const double p = (static_cast<double>(n) / static_cast<double>(tokens) * shared + 1) / 65536.0;
        bits -= static_cast<double>(n) * std::log2(p);
    }
    return std::ceil((bits + 1) / 8) * 8;  // the coder ends with a bit that tells its interval apart
}

// One chunk of one layer of a plane: rows [tokens, width], replaced by what a receiver gets. Returns bits.
double code_chunk(std::span<float> rows, std::size_t width, int bins) {
    const std::size_t tokens = rows.size() / width;
    const int c = bins / 2 - 1;
    std::vector<std::array<std::size_t, kLargestBins>> histograms(width);
    for (std::size_t t = 0; t < tokens; ++t) {
        float top = 0;
        for (std::size_t i = 0; i < width; ++i) top = std::max(top, std::abs(rows[t * width + i]));
        const float maximum = kernels::from_bits(Dtype::kBf16, kernels::to_bits(Dtype::kBf16, top));
        for (std::size_t i = 0; i < width; ++i) {
            float& x = rows[t * width + i];
            const int q =
                maximum == 0
                    ? 0
                    : std::clamp(static_cast<int>(std::nearbyint(x * static_cast<float>(c) / maximum)), -c,
                                 c);
            ++histograms[i][static_cast<std::size_t>(q + c)];
            x = static_cast<float>(q) * maximum / static_cast<float>(c);
        }
    }
    double bits = static_cast<double>(tokens) * 16;
    for (const auto& histogram : histograms) bits += kCdfEntries * 16 + 32 + stream_bits(histogram, tokens);
    return bits;
}

Coded code(const tools::KvCache& cache, const Bins& bins, std::size_t chunk_tokens) {
    Coded out = {blank_copy(cache), 0};
    const std::size_t tokens = cache.tokens();
    for (std::size_t p = 0; p < cache.planes.size(); ++p) {
        std::vector<float> values = plane_floats(cache, p);
        const std::size_t width = cache.layout.planes[p].width();
        for (std::size_t l = 0; l < cache.layout.layers; ++l) {
            for (std::size_t first = 0; first < tokens; first += chunk_tokens) {
                const std::size_t count = std::min(chunk_tokens, tokens - first);
                const auto rows = std::span(values).subspan((l * tokens + first) * width, count * width);
                out.bits += code_chunk(rows, width, bins.of(p, l));
            }
        }
        set_plane(out.decoded, p, values);
    }
    return out;
}

std::vector<Point> points(const Setup&) {
    std::vector<Point> out;
    const Bins shipped, all_fine = {4096, 4096};
    for (const bool whole : {false, true}) {
        const std::string family = whole ? "CacheGen (LMCache), one chunk" : "CacheGen (LMCache)";
        const auto add = [&](const std::string& setting, const Bins& bins) {
            out.push_back({family, setting, !whole && &bins == &shipped,
                           [bins, whole](const tools::KvCache& cache, const Setup& setup) {
                               return code(cache, bins, whole ? cache.tokens() : setup.chunk_tokens);
                           }});
        };
        add("as shipped", shipped);
        add("32 bins", all_fine);
    }
    return out;
}

const Registration registration(points);

}  // namespace
}  // namespace kvcast::bench
