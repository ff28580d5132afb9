#include "tests/codec/synthetic.h"

#include "tests/codec/synthetic_calibration.h"

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace kvcast::test {
namespace {

class Random {
  public:
    explicit Random(std::uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}

    std::uint64_t bits() {
        state_ ^= state_ << 13;
        state_ ^= state_ >> 7;
        state_ ^= state_ << 17;
        return state_;
    }
    // Twelve uniforms: nearly Gaussian, exactly the same everywhere.
    float gaussian() {
        std::int64_t sum = 0;
        for (int i = 0; i < 12; ++i) sum += static_cast<std::int64_t>(bits() >> 44);
        return static_cast<float>(sum - 12 * (1 << 19)) / static_cast<float>(1 << 20);
    }

  private:
    std::uint64_t state_;
};

float sample(Random& random, Content content, std::size_t channel, std::size_t token) {
    switch (content) {
        case Content::kZero:
            return 0;
        case Content::kConstant:
            return 1.5f;
        case Content::kOutliers: {
            const float x = random.gaussian();
            return channel % 7 == 0 ? x * 60 : token % 50 == 3 ? x * 20 : x * 0.3f;
        }
        default: {
            const float spread = 0.25f * static_cast<float>(1 + channel % 9);
            return spread * random.gaussian() + static_cast<float>(channel % 5) - 2;
        }
    }
}

// Every kind of number a file may hold.
std::uint32_t special(Random& random, Dtype dtype) {
    const unsigned mantissa = kernels::mantissa_bits(dtype);
    const std::uint32_t range = kernels::exponent_mask(dtype);
    const auto any = static_cast<std::uint32_t>(random.bits());
    const unsigned total = dtype == Dtype::kF32 ? 32 : 16;
    const std::uint32_t fraction = any & ((1u << mantissa) - 1);
    const std::uint32_t exponents[4] = {0, range, range / 2, any >> 8 & range};
    return (any >> 31) << (total - 1) | exponents[any >> 24 & 3] << mantissa | fraction;
}

void put(std::vector<std::uint8_t>& plane, std::size_t index, Dtype dtype, std::uint32_t bits) {
    const std::size_t size = kernels::dtype_bytes(dtype);
    std::memcpy(plane.data() + index * size, &bits, size);
}

[[noreturn]] void die(const Status& s) {
    std::fprintf(stderr, "%s\n", s.message().c_str());
    std::abort();
}

}  // namespace

Layout make_layout(std::size_t layers, std::vector<PlaneShape> planes, Dtype dtype, RopePairing pairing) {
    Layout layout;
    layout.layers = layers;
    layout.planes = std::move(planes);
    layout.dtype = dtype;
    if (pairing == RopePairing::kNone) return layout;
    const std::size_t dim = layout.planes[0].head_dim / 2 * 2;
    layout.rope = {pairing, 0, dim, geometric_frequencies(10000, dim)};
    return layout;
}

std::size_t Cache::row_bytes(std::size_t plane) const {
    return layout.row_bytes(plane);
}

std::vector<PlaneRows> Cache::rows(std::size_t token) const {
    std::vector<PlaneRows> out;
    for (std::size_t i = 0; i < planes.size(); ++i) {
        out.push_back({planes[i].data() + token * row_bytes(i), row_bytes(i)});
    }
    return out;
}

double Cache::value(std::size_t plane, std::size_t token, std::size_t channel) const {
    const std::size_t size = kernels::dtype_bytes(layout.dtype);
    std::uint32_t bits = 0;
    std::memcpy(&bits, planes[plane].data() + token * row_bytes(plane) + channel * size, size);
    return kernels::from_bits(layout.dtype, bits);
}

Cache make_cache(const Layout& layout, std::size_t tokens, Content content, std::uint64_t seed) {
    Random random(seed);
    Cache cache = {layout, {}, {}};
    for (std::size_t t = 0; t < tokens; ++t)
        cache.ids.push_back(static_cast<std::int32_t>(random.bits() % 49152));
    for (std::size_t i = 0; i < layout.layers * layout.planes.size(); ++i) {
        const std::size_t width = layout.planes[i % layout.planes.size()].width();
        auto& plane = cache.planes.emplace_back(tokens * width * kernels::dtype_bytes(layout.dtype));
        for (std::size_t t = 0; t < tokens; ++t) {
            for (std::size_t c = 0; c < width; ++c) {
                const std::uint32_t bits =
                    content == Content::kSpecial
                        ? special(random, layout.dtype)
                        : kernels::to_bits(layout.dtype, sample(random, content, c, t));
                put(plane, t * width + c, layout.dtype, bits);
            }
        }
    }
    return cache;
}

Cache make_cache(const Case& c) {
    Cache cache = make_cache(c.layout, c.tokens, c.content);
    for (std::int32_t& id : cache.ids) id %= c.vocabulary;
    return cache;
}

std::vector<std::uint8_t> encode(const Cache& cache, const Case& c, Executor& executor) {
    ChunkEncoder encoder(c.options);
    std::vector<std::uint8_t> file;
    std::vector<std::uint8_t> object;
    Hash chain = {};
    for (std::size_t first = 0; first < cache.ids.size(); first += c.chunk) {
        const auto ids = std::span(cache.ids).subspan(first, std::min(c.chunk, cache.ids.size() - first));
        const auto rows = cache.rows(first);
        const ChunkInput input = {
            &cache.layout, "test model", "",
            ids,           first,        c.base_position,
            chain,         rows,         c.options.tail_level != 0 ? std::size_t{5} : std::size_t{0}};
        if (const Status s = encoder.encode(input, executor, object, chain); !s.ok()) die(s);
        file.insert(file.end(), object.begin(), object.end());
    }
    return file;
}

std::vector<std::uint8_t> encode(const Cache& cache, const Case& c) {
    SerialExecutor serial;
    return encode(cache, c, serial);
}

Cache decode(std::span<const std::uint8_t> file, const DecodeOptions& options, Status& status) {
    Cache out;
    SerialExecutor serial;
    std::vector<DecodeWorkspace> workspaces(1);
    while (!file.empty()) {
        auto opened = ChunkDecoder::open(file, options);
        status = opened.status();
        if (!status.ok()) return out;
        const ChunkDecoder& decoder = opened.value();
        const ChunkHeader& h = decoder.header();
        if (out.planes.empty()) out.planes.resize(h.layout.layers * h.layout.planes.size());
        out.layout = h.layout;
        out.layout.dtype = decoder.dtype();
        std::vector<PlaneBuffer> buffers;
        for (std::size_t i = 0; i < out.planes.size(); ++i) {
            const std::size_t at = out.planes[i].size();
            out.planes[i].resize(at + h.tokens * out.row_bytes(i));
            buffers.push_back({out.planes[i].data() + at, out.row_bytes(i)});
        }
        status = decoder.decode(buffers, serial, workspaces);
        if (!status.ok()) return out;
        out.ids.insert(out.ids.end(), h.token_ids.begin(), h.token_ids.end());
        file = file.subspan(decoder.object_bytes());
    }
    return out;
}

namespace {

using enum RopePairing;

EncodeOptions delta(unsigned level, Predictor predictor = Predictor::kMean, bool unrotate = true,
                    std::size_t sinks = 4) {
    EncodeOptions o;
    o.level = level;
    o.predictor = predictor;
    o.unrotate = unrotate;
    o.sinks = sinks;
    return o;
}

EncodeOptions lossless() {
    EncodeOptions o;
    o.profile = Profile::kLossless;
    return o;
}

EncodeOptions with_blocks(EncodeOptions o, std::size_t heads) {
    o.block_heads = heads;
    return o;
}

Case klt(std::string name, const Layout& layout, std::size_t tokens, unsigned level, CalibrationShape shape,
         Content content = Content::kGaussian) {
    Case c = {std::move(name), layout, tokens, content};
    const CalibrationData data = make_calibration_data(layout, shape);
    c.calibration = calibration_bytes(data);
    c.options.profile = Profile::kKlt;
    c.options.level = level;
    c.options.sinks = 1;
    c.options.run_layers = 2;
    c.options.calibration = Calibration::read(c.calibration).value();
    c.vocabulary = 900;
    return c;
}

Case with_tail(Case c, unsigned level) {
    c.options.tail_level = level;
    return c;
}

Case in_chunks(Case c, std::size_t chunk, std::uint64_t base_position) {
    c.chunk = chunk;
    c.base_position = base_position;
    return c;
}

Layout explicit_rope(Layout layout) {
    for (std::size_t i = 0; i < layout.rope.frequencies.size(); ++i) {
        layout.rope.frequencies[i] = frequency_from_radians(1.0 / static_cast<double>(1 + 3 * i));
    }
    return layout;
}

Layout offset_rope(Layout layout, std::size_t offset, std::size_t dim) {
    layout.rope = {kHalf, offset, dim, geometric_frequencies(500000, dim)};
    return layout;
}

std::vector<Case> make_conformance_cases() {
    const Layout bf16 = make_layout(2, {{3, 64}, {3, 64}}, Dtype::kBf16, kHalf);
    const Layout fp16 = make_layout(1, {{1, 80}, {1, 80}}, Dtype::kF16, kInterleaved);
    const Layout fp32 = make_layout(1, {{1, 64}, {1, 64}}, Dtype::kF32, kNone);
    const Layout wide = make_layout(1, {{1, 128}, {1, 96}}, Dtype::kBf16, kHalf);
    const Layout many = make_layout(1, {{8, 16}, {8, 8}}, Dtype::kBf16, kInterleaved);
    const Layout latent = offset_rope(make_layout(2, {{1, 72}}, Dtype::kBf16, kHalf), 64, 8);
    const Layout odd = make_layout(1, {{2, 7}, {2, 5}}, Dtype::kF16, kHalf);
    const Layout deep = make_layout(5, {{2, 16}, {2, 16}}, Dtype::kBf16, kHalf);
    const Layout heads = make_layout(3, {{4, 20}, {4, 12}}, Dtype::kF16, kInterleaved);
    const Layout plain = make_layout(3, {{1, 40}, {1, 33}}, Dtype::kF32, kNone);
    constexpr auto anchor = Predictor::kAnchor;
    return {
        {"lossless-bf16-t33", bf16, 33, Content::kGaussian, lossless()},
        {"lossless-bf16-special", bf16, 31, Content::kSpecial, lossless()},
        {"lossless-fp16-t64", fp16, 64, Content::kGaussian, lossless()},
        {"lossless-fp16-special", fp16, 32, Content::kSpecial, lossless()},
        {"lossless-fp32-special", fp32, 33, Content::kSpecial, lossless()},
        {"lossless-fp32-t1", fp32, 1, Content::kGaussian, lossless()},
        {"lossless-latent", latent, 40, Content::kGaussian, lossless()},
        {"lossless-rows-only", bf16, 9, Content::kGaussian, lossless()},
        {"lossless-odd-t23", odd, 23, Content::kGaussian, lossless()},
        {"lossless-base-1000", latent, 35, Content::kGaussian, lossless(), 17, 1000},
        {"lossless-zero", many, 32, Content::kZero, lossless()},
        {"delta1-bf16-t33", bf16, 33, Content::kGaussian, delta(1)},
        {"delta2-fp16-t64", fp16, 64, Content::kGaussian, delta(2)},
        {"delta3-fp32-t33", fp32, 33, Content::kGaussian, delta(3)},
        {"delta4-wide-t63", wide, 63, Content::kGaussian, delta(4)},
        {"delta5-many-t65", many, 65, Content::kGaussian, delta(5)},
        {"delta6-latent-t50", latent, 50, Content::kGaussian, delta(6)},
        {"delta7-odd-t100", odd, 100, Content::kGaussian, delta(7)},
        {"delta5-two-chunks", bf16, 50, Content::kGaussian, delta(5), 32},
        {"delta5-base-1000", bf16, 33, Content::kGaussian, delta(5), 256, 1000},
        {"delta3-explicit-frequencies", explicit_rope(many), 40, Content::kGaussian, delta(3)},
        {"delta3-rope-offset", offset_rope(wide, 32, 64), 40, Content::kGaussian, delta(3)},
        {"delta3-as-stored", bf16, 33, Content::kGaussian, delta(3, Predictor::kMean, false)},
        {"delta3-no-sinks", many, 33, Content::kGaussian, delta(3, Predictor::kMean, true, 0)},
        {"delta3-sinks-only", many, 3, Content::kGaussian, delta(3)},
        {"delta3-t1", many, 1, Content::kGaussian, delta(3, Predictor::kMean, true, 0)},
        {"delta3-t5", many, 5, Content::kGaussian, delta(3)},
        {"delta3-anchor-t64", many, 64, Content::kGaussian, delta(3, anchor)},
        {"delta6-anchor-t47", fp16, 47, Content::kGaussian, delta(6, anchor)},
        {"delta1-anchor-t15", odd, 15, Content::kGaussian, delta(1, anchor)},
        {"delta3-anchor-as-stored", many, 33, Content::kGaussian, delta(3, anchor, false)},
        {"delta3-zero", bf16, 33, Content::kZero, delta(3)},
        {"delta3-constant", many, 33, Content::kConstant, delta(3)},
        {"delta3-special", many, 33, Content::kSpecial, delta(3)},
        {"delta1-outliers", many, 200, Content::kOutliers, delta(1)},
        {"delta7-outliers", many, 200, Content::kOutliers, delta(7)},
        {"delta5-blocks-of-1", bf16, 40, Content::kGaussian, with_blocks(delta(5), 1)},
        {"delta5-blocks-of-2", bf16, 40, Content::kGaussian, with_blocks(delta(5), 2)},
        {"lossless-blocks-of-4", many, 40, Content::kGaussian, with_blocks(lossless(), 4)},
        klt("klt1-t33", deep, 33, 1, {{1, 1}}),
        klt("klt2-tokens-t64", deep, 64, 2, {{1, 1}, 20, 8}),
        klt("klt3-t1", deep, 1, 3, {{1, 1}, 6, 6}),
        klt("klt2-parts-fp16", heads, 40, 2, {{2, 2}, 10, 0}),
        klt("klt1-unequal-parts", heads, 31, 1, {{4, 1}}),
        klt("klt2-no-rope-fp32", plain, 35, 2, {{1, 1}, 4, 2}),
        klt("klt2-latent", latent, 70, 2, {{1}}),
        klt("klt1-outliers", deep, 120, 1, {{1, 1}}, Content::kOutliers),
        klt("klt2-special", deep, 33, 2, {{1, 1}}, Content::kSpecial),
        klt("klt3-zero", deep, 32, 3, {{1, 1}}, Content::kZero),
        with_tail(klt("klt3-tail", deep, 40, 3, {{1, 1}, 12, 2}), 1),
        in_chunks(klt("klt2-two-chunks", deep, 50, 2, {{1, 1}}), 32, 77),
    };
}

}  // namespace

// Making the calibrations takes sanitizers most of a second, and every instantiation of tests asks.
std::vector<Case> conformance_cases() {
    static const std::vector<Case> made = make_conformance_cases();
    return made;
}

}  // namespace kvcast::test
