// zstd as a general-purpose baseline of the lossless profile: each chunk's plane on its own, the bytes as
// they lie or split into low and high halves.
#include <fmt/format.h>
#include <zstd.h>

#include <algorithm>

#include "bench/rate_distortion/point.h"

namespace kvcast::bench {
namespace {

std::size_t compressed_bytes(std::span<const std::byte> bytes, int level) {
    std::vector<std::byte> out(ZSTD_compressBound(bytes.size()));
    const std::size_t n = ZSTD_compress(out.data(), out.size(), bytes.data(), bytes.size(), level);
    if (ZSTD_isError(n) != 0) throw tools::Error(fmt::format("zstd: {}", ZSTD_getErrorName(n)));
    return n;
}

// Bytes of rows of elements compressed as they lie, or as one stream per byte of the element.
std::size_t coded_bytes(std::span<const std::byte> rows, std::size_t element, int level, bool splits) {
    if (!splits) return compressed_bytes(rows, level);
    std::size_t total = 0;
    for (std::size_t b = 0; b < element; ++b) {
        std::vector<std::byte> plane;
        for (std::size_t i = b; i < rows.size(); i += element) plane.push_back(rows[i]);
        total += compressed_bytes(plane, level);
    }
    return total;
}

Coded code(const tools::KvCache& cache, const Setup& setup, int level, bool splits) {
    Coded out = {cache, 0};
    const std::size_t element = kernels::dtype_bytes(cache.layout.dtype);
    for (std::size_t p = 0; p < cache.planes.size(); ++p) {
        const std::size_t row = cache.row_bytes(p);
        for (std::size_t l = 0; l < cache.layout.layers; ++l) {
            for (std::size_t first = 0; first < cache.tokens(); first += setup.chunk_tokens) {
                const std::size_t count = std::min(setup.chunk_tokens, cache.tokens() - first);
                const auto rows =
                    std::span(cache.planes[p]).subspan((l * cache.tokens() + first) * row, count * row);
                out.bits += 8.0 * static_cast<double>(coded_bytes(rows, element, level, splits));
            }
        }
    }
    return out;
}

std::vector<Point> points(const Setup&) {
    std::vector<Point> out;
    for (const bool splits : {false, true}) {
        const std::string setting = splits ? "zstd -3, bytes split" : "zstd -3";
        out.push_back(
            {"lossless", setting, splits, [splits](const tools::KvCache& cache, const Setup& setup) {
                 return code(cache, setup, 3, splits);
             }});
    }
    return out;
}

const Registration registration(points);

}  // namespace
}  // namespace kvcast::bench
