// What a KV cache looks like: layers, planes, heads, element type and RoPE. FORMAT.md, section 3.2.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "codec/format/byte_reader.h"
#include "codec/format/byte_writer.h"
#include "codec/format/error.h"
#include "kernels/math.h"

namespace kvcast {

using kernels::Dtype;

using Hash = std::array<std::uint8_t, 32>;

// One plane of a layer: a matrix of tokens x (heads * head_dim), heads outermost within a row.
struct PlaneShape {
    std::size_t heads = 0;
    std::size_t head_dim = 0;

    std::size_t width() const { return heads * head_dim; }
    friend bool operator==(const PlaneShape&, const PlaneShape&) = default;
};

enum class RopePairing : std::uint8_t {
    kNone = 0,
    kHalf = 1,         // pair i: channels offset + i and offset + i + dim / 2 of each head
    kInterleaved = 2,  // pair i: channels offset + 2 i and offset + 2 i + 1
};

// Rotary position embedding of plane 0. Frequencies are turns per token in units of 2^-64 turn, so that
// position * frequency modulo 2^64 is the phase, exactly.
struct Rope {
    RopePairing pairing = RopePairing::kNone;
    std::size_t offset = 0;
    std::size_t dim = 0;                     // even; rotated channels of each head
    std::vector<std::uint64_t> frequencies;  // dim / 2

    // Pair p is channels offset + p * pair_step() and that plus partner(). No pairs without a pairing.
    std::size_t pairs() const { return pairing == RopePairing::kNone ? 0 : dim / 2; }
    std::size_t pair_step() const { return pairing == RopePairing::kHalf ? 1 : 2; }
    std::size_t partner() const { return pairing == RopePairing::kHalf ? dim / 2 : 1; }

    friend bool operator==(const Rope&, const Rope&) = default;
};

struct Layout {
    std::size_t layers = 0;
    std::vector<PlaneShape> planes;  // K and V, or one latent plane
    Dtype dtype = Dtype::kBf16;
    Rope rope;

    std::size_t heads_per_layer() const;
    // Of one token, in a plane of [layer][plane]; of the layout's elements, or of others.
    std::size_t row_bytes(std::size_t plane) const { return row_bytes(plane, dtype); }
    std::size_t row_bytes(std::size_t plane, Dtype elements) const {
        return planes[plane % planes.size()].width() * kernels::dtype_bytes(elements);
    }
    // Of one token, in all layers and planes.
    std::size_t values_per_token() const;
    std::size_t token_bytes() const { return values_per_token() * kernels::dtype_bytes(dtype); }
    friend bool operator==(const Layout&, const Layout&) = default;
};

// Bounds that keep every later product inside 64 bits and every allocation honest.
struct LayoutLimits {
    static constexpr std::size_t kLayers = 4096;
    static constexpr std::size_t kPlanes = 2;
    static constexpr std::size_t kHeads = 4096;
    static constexpr std::size_t kHeadDim = 4096;
    static constexpr std::size_t kWidth = 65536;
};

// kOk, or kBadHeader / kLimitExceeded with the field that is wrong.
Status check_layout(const Layout& layout);

// Frequencies theta^(-2 i / dim) / 2 pi, the unscaled RoPE of Su et al. (arXiv 2104.09864): a geometric
// series that the format stores as its first term and its ratio.
std::vector<std::uint64_t> geometric_frequencies(double theta, std::size_t dim);

// The base of a geometric series, or 0 where the frequencies are not exactly the series of any base in use
// (a number of at most 12 significant digits).
double geometric_theta(const std::vector<std::uint64_t>& frequencies);

// One frequency given in radians per token (below 2^62; larger or tiny ones give 0); and back.
std::uint64_t frequency_from_radians(double radians_per_token);
double radians_from_frequency(std::uint64_t frequency);

// The layout as it stands in a chunk header, which is also what its hash is taken of.
void write_layout(const Layout& layout, ByteWriter& out);
Result<Layout> read_layout(ByteReader& in);

}  // namespace kvcast
