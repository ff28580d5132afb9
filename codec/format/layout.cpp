#include "codec/format/layout.h"

#include <fmt/format.h>

#include <charconv>
#include <cmath>

namespace kvcast {
namespace {

// floor(2^64 / 2 pi): one radian per token, the frequency of pair 0 in every geometric series.
constexpr std::uint64_t kRadian = 2935890503282001226u;

enum class FrequencyCoding : std::uint8_t { kGeometric = 0, kExplicit = 1 };

__extension__ using Wide = unsigned __int128;

std::uint64_t next_term(std::uint64_t term, std::uint64_t ratio) {
    const Wide product = static_cast<Wide>(term) * ratio;
    return static_cast<std::uint64_t>((product + (static_cast<Wide>(1) << 63)) >> 64);
}

std::vector<std::uint64_t> series(std::uint64_t first, std::uint64_t ratio, std::size_t count) {
    std::vector<std::uint64_t> terms(count);
    for (std::uint64_t& term : terms) {
        term = first;
        first = next_term(first, ratio);
    }
    return terms;
}

// The upper half of a product.
Wide upper_product(Wide a, Wide b) {
    const auto low = [](Wide x) { return static_cast<Wide>(static_cast<std::uint64_t>(x)); };
    const Wide middle_a = (a >> 64) * low(b) + (low(a) * low(b) >> 64);
    const Wide middle_b = low(a) * (b >> 64) + low(middle_a);
    return (a >> 64) * (b >> 64) + (middle_a >> 64) + (middle_b >> 64);
}

// mantissa * 2^exponent, the mantissa's first bit set. Products are cut off behind 128 bits.
struct Number {
    Wide mantissa;
    int exponent;

    static Number of(Wide integer, int exponent) {
        while (integer >> 127 == 0) integer <<= 1, --exponent;
        return {integer, exponent};
    }
    Number operator*(const Number& other) const {
        return of(upper_product(mantissa, other.mantissa), exponent + other.exponent + 128);
    }
    bool below_one() const { return exponent < -127; }
};

Number power(Number base, std::size_t n) {
    Number result = Number::of(1, 0);
    for (; n != 0; n /= 2, base = base * base) {
        if (n % 2 != 0) result = result * base;
    }
    return result;
}

// theta^(-2 / dim) in units of 2^-64, rounded: the largest r with ((2 r - 1) / 2^65)^(dim / 2) theta < 1. In
// integers, since platforms differ in what a long double is, and readers compare layouts for equality.
std::uint64_t ratio_of(double theta, std::size_t dim) {
    if (!(theta > 1)) return ~std::uint64_t{0};
    if (std::isinf(theta)) return 0;
    int exponent = 0;
    const double fraction = std::frexp(theta, &exponent);
    const Number base = Number::of(static_cast<std::uint64_t>(std::ldexp(fraction, 53)), exponent - 53);
    std::uint64_t ratio = 0;
    for (int bit = 63; bit >= 0; --bit) {
        const std::uint64_t larger = ratio | std::uint64_t{1} << bit;
        const Number middle = Number::of(static_cast<Wide>(larger) * 2 - 1, -65);
        if ((power(middle, dim / 2) * base).below_one()) ratio = larger;
    }
    return ratio;
}

// The ratio that makes `frequencies` a geometric series, or 0.
std::uint64_t series_ratio(const std::vector<std::uint64_t>& frequencies) {
    if (frequencies.size() < 3 || frequencies[0] == 0) return 0;
    const double theta = geometric_theta(frequencies);
    return theta > 0 ? ratio_of(theta, 2 * frequencies.size()) : 0;
}

Status bad(ErrorCode code, std::string message) {
    return {code, std::move(message)};
}

Status check_plane(const PlaneShape& p) {
    if (p.heads == 0 || p.head_dim == 0)
        return bad(ErrorCode::kBadHeader, "a plane has no heads or no channels");
    if (p.heads > LayoutLimits::kHeads || p.head_dim > LayoutLimits::kHeadDim ||
        p.width() > LayoutLimits::kWidth) {
        return bad(ErrorCode::kLimitExceeded,
                   fmt::format("a plane of {} heads x {} channels is wider than {}", p.heads, p.head_dim,
                               LayoutLimits::kWidth));
    }
    return {};
}

Status check_rope(const Layout& layout) {
    const Rope& r = layout.rope;
    if (r.pairing == RopePairing::kNone) {
        const bool empty = r.dim == 0 && r.offset == 0 && r.frequencies.empty();
        return empty ? Status() : bad(ErrorCode::kBadHeader, "RoPE has dimensions but no pairing");
    }
    const std::size_t head_dim = layout.planes[0].head_dim;
    if (r.dim == 0 || r.dim % 2 != 0 || r.dim > head_dim || r.offset > head_dim - r.dim) {
        return bad(ErrorCode::kBadHeader, fmt::format("RoPE over channels {} to {} does not fit a head of {}",
                                                      r.offset, r.offset + r.dim, head_dim));
    }
    if (r.frequencies.size() != r.dim / 2) {
        return bad(ErrorCode::kBadHeader, fmt::format("RoPE over {} channels needs {} frequencies, {} given",
                                                      r.dim, r.dim / 2, r.frequencies.size()));
    }
    return {};
}

void write_rope(const Rope& rope, ByteWriter& out) {
    out.fixed(static_cast<std::uint8_t>(rope.pairing));
    if (rope.pairing == RopePairing::kNone) return;
    out.varint(rope.offset);
    out.varint(rope.dim);
    const std::uint64_t ratio = series_ratio(rope.frequencies);
    out.fixed(ratio != 0 ? FrequencyCoding::kGeometric : FrequencyCoding::kExplicit);
    if (ratio != 0) {
        out.fixed(rope.frequencies[0]);
        out.fixed(ratio);
        return;
    }
    for (const std::uint64_t f : rope.frequencies) out.fixed(f);
}

bool read_rope(ByteReader& in, Rope& rope) {
    const auto pairing = in.fixed<std::uint8_t>();
    if (pairing > static_cast<std::uint8_t>(RopePairing::kInterleaved)) return false;
    rope.pairing = static_cast<RopePairing>(pairing);
    if (rope.pairing == RopePairing::kNone) return in.ok();
    rope.offset = in.varint();
    rope.dim = in.varint();
    if (rope.dim > LayoutLimits::kHeadDim || rope.offset > LayoutLimits::kHeadDim) return false;
    const auto coding = in.fixed<std::uint8_t>();
    if (coding == static_cast<std::uint8_t>(FrequencyCoding::kGeometric)) {
        const auto first = in.fixed<std::uint64_t>();
        rope.frequencies = series(first, in.fixed<std::uint64_t>(), rope.dim / 2);
        return in.ok();
    }
    if (coding != static_cast<std::uint8_t>(FrequencyCoding::kExplicit) || rope.dim / 2 * 8 > in.left())
        return false;
    rope.frequencies.resize(rope.dim / 2);
    for (std::uint64_t& f : rope.frequencies) f = in.fixed<std::uint64_t>();
    return in.ok();
}

}  // namespace

std::size_t Layout::heads_per_layer() const {
    std::size_t heads = 0;
    for (const PlaneShape& p : planes) heads += p.heads;
    return heads;
}

std::size_t Layout::values_per_token() const {
    std::size_t width = 0;
    for (const PlaneShape& p : planes) width += p.width();
    return width * layers;
}

Status check_layout(const Layout& layout) {
    if (layout.layers == 0) return bad(ErrorCode::kBadHeader, "a layout needs at least one layer");
    if (layout.layers > LayoutLimits::kLayers) {
        return bad(ErrorCode::kLimitExceeded,
                   fmt::format("{} layers, at most {} are supported", layout.layers, LayoutLimits::kLayers));
    }
    if (layout.planes.empty() || layout.planes.size() > LayoutLimits::kPlanes) {
        return bad(ErrorCode::kBadHeader,
                   fmt::format("{} planes per layer, 1 or 2 are defined", layout.planes.size()));
    }
    for (const PlaneShape& p : layout.planes) {
        if (Status s = check_plane(p); !s.ok()) return s;
    }
    return check_rope(layout);
}

std::uint64_t frequency_from_radians(double radians_per_token) {
    // 2^74 / 2 pi: ten bits below the unit, in integers, so that the result is the same on every platform.
    constexpr Wide per_radian = static_cast<Wide>(3006351875360769255u) * 1000 + 932;
    int exponent = 0;
    const double fraction = std::frexp(std::abs(radians_per_token), &exponent);
    const Wide product = static_cast<Wide>(std::ldexp(fraction, 53)) * per_radian;
    const int drop = 63 - exponent;  // 53 bits of fraction and ten of the constant
    if (drop <= 0 || drop > 126) return 0;
    const auto units = static_cast<std::uint64_t>((product + (static_cast<Wide>(1) << (drop - 1))) >> drop);
    return radians_per_token < 0 ? -units : units;
}

double radians_from_frequency(std::uint64_t frequency) {
    return static_cast<double>(static_cast<long double>(frequency) * 6.283185307179586476925286766559L /
                               0x1p64L);
}

std::vector<std::uint64_t> geometric_frequencies(double theta, std::size_t dim) {
    return series(kRadian, ratio_of(theta, dim), dim / 2);
}

double geometric_theta(const std::vector<std::uint64_t>& frequencies) {
    const std::size_t n = frequencies.size();
    if (n < 2 || frequencies[0] != kRadian || frequencies[n - 1] == 0) return 0;
    const long double span =
        static_cast<long double>(frequencies[0]) / static_cast<long double>(frequencies[n - 1]);
    const long double guess = std::pow(span, static_cast<long double>(n) / static_cast<long double>(n - 1));
    for (const int digits : {7, 11}) {
        const std::string text = fmt::format("{:.{}e}", static_cast<double>(guess), digits);
        double theta = 0;
        std::from_chars(text.data(), text.data() + text.size(), theta);
        if (geometric_frequencies(theta, 2 * n) == frequencies) return theta;
    }
    return 0;
}

void write_layout(const Layout& layout, ByteWriter& out) {
    out.fixed(static_cast<std::uint8_t>(layout.dtype));
    out.varint(layout.layers);
    out.fixed(static_cast<std::uint8_t>(layout.planes.size()));
    for (const PlaneShape& p : layout.planes) {
        out.varint(p.heads);
        out.varint(p.head_dim);
    }
    write_rope(layout.rope, out);
}

Result<Layout> read_layout(ByteReader& in) {
    Layout layout;
    const auto dtype = in.fixed<std::uint8_t>();
    layout.layers = in.varint();
    const auto planes = in.fixed<std::uint8_t>();
    if (!in.ok()) return bad(ErrorCode::kBadHeader, "the layout is cut short");
    if (dtype > static_cast<std::uint8_t>(Dtype::kF32)) {
        return bad(ErrorCode::kBadHeader, fmt::format("element type {} is not defined", dtype));
    }
    layout.dtype = static_cast<Dtype>(dtype);
    if (planes == 0 || planes > LayoutLimits::kPlanes) {
        return bad(ErrorCode::kBadHeader, fmt::format("{} planes per layer, 1 or 2 are defined", planes));
    }
    for (unsigned i = 0; i < planes; ++i) {
        PlaneShape p;
        p.heads = in.varint();
        p.head_dim = in.varint();
        if (p.heads > LayoutLimits::kHeads || p.head_dim > LayoutLimits::kHeadDim) {
            return bad(ErrorCode::kLimitExceeded, "a plane's heads or channels exceed the limits");
        }
        layout.planes.push_back(p);
    }
    if (!read_rope(in, layout.rope) || !in.ok())
        return bad(ErrorCode::kBadHeader, "the RoPE description is not valid");
    if (Status s = check_layout(layout); !s.ok()) return s;
    return layout;
}

}  // namespace kvcast
