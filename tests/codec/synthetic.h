// Deterministic synthetic KV caches, the same on every platform.
#pragma once

#include <cstdint>
#include <ostream>
#include <string>
#include <vector>

#include "codec/decoder.h"
#include "codec/encoder.h"

namespace kvcast::test {

enum class Content { kGaussian, kZero, kConstant, kSpecial, kOutliers };

struct Case {
    std::string name;
    Layout layout;
    std::size_t tokens = 33;
    Content content = Content::kGaussian;
    EncodeOptions options = {};
    std::size_t chunk = 256;
    std::uint64_t base_position = 0;
    std::vector<std::uint8_t> calibration = {};  // the file, klt only
    std::int32_t vocabulary = 49152;             // ids are below this
};

// What GoogleTest calls a case.
inline void PrintTo(const Case& c, std::ostream* out) {
    *out << c.name;
}

Layout make_layout(std::size_t layers, std::vector<PlaneShape> planes, Dtype dtype, RopePairing pairing);

// A cache in memory: planes [layer][plane] of contiguous rows.
struct Cache {
    Layout layout;
    std::vector<std::int32_t> ids;
    std::vector<std::vector<std::uint8_t>> planes;

    std::size_t row_bytes(std::size_t plane) const;
    std::vector<PlaneRows> rows(std::size_t token) const;
    double value(std::size_t plane, std::size_t token, std::size_t channel) const;
};

Cache make_cache(const Layout& layout, std::size_t tokens, Content content, std::uint64_t seed = 1);

// The cache that a case encodes.
Cache make_cache(const Case& c);

// The chunk objects of a case, one after another. Fails the test on any error.
std::vector<std::uint8_t> encode(const Cache& cache, const Case& c, Executor& executor);
std::vector<std::uint8_t> encode(const Cache& cache, const Case& c);

// Decodes a file of chunks; `status` takes the first failure.
Cache decode(std::span<const std::uint8_t> file, const DecodeOptions& options, Status& status);

// The conformance cases: every vector in tests/vectors is one of them.
std::vector<Case> conformance_cases();

}  // namespace kvcast::test
