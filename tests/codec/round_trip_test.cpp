#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <utility>

#include "tests/codec/synthetic.h"
#include "tests/guarded.h"

namespace kvcast::test {
namespace {

Case lossless_case(Layout layout, std::size_t tokens, Content content) {
    Case c = {"", std::move(layout), tokens, content, {}};
    c.options.profile = Profile::kLossless;
    return c;
}

void expect_exact(const Case& c) {
    const Cache cache = make_cache(c.layout, c.tokens, c.content);
    Status status;
    const Cache back = decode(encode(cache, c), {}, status);
    ASSERT_TRUE(status.ok()) << status.message();
    EXPECT_EQ(back.planes, cache.planes);
    EXPECT_EQ(back.ids, cache.ids);
}

TEST(Lossless, ReturnsEveryBitForEveryShape) {
    for (const std::size_t tokens : {1, 31, 32, 33, 255, 256, 257}) {
        for (const std::size_t heads : {1, 3, 8}) {
            for (const std::size_t dim : {64, 80, 128, 256}) {
                expect_exact(lossless_case(
                    make_layout(1, {{heads, dim}, {heads, dim}}, Dtype::kBf16, RopePairing::kHalf), tokens,
                    Content::kGaussian));
            }
        }
    }
}

TEST(Lossless, ReturnsEveryBitOfSpecialNumbersInEveryType) {
    for (const Dtype dtype : {Dtype::kBf16, Dtype::kF16, Dtype::kF32}) {
        for (const Content content :
             {Content::kSpecial, Content::kZero, Content::kConstant, Content::kOutliers}) {
            expect_exact(
                lossless_case(make_layout(2, {{2, 24}, {1, 40}}, dtype, RopePairing::kNone), 70, content));
        }
    }
}

// A context rarely ends where a chunk does, and its last tokens must not cost more than others.
TEST(Lossless, AnyCountOfTokensCostsWhatItsTokensDo) {
    for (const Dtype dtype : {Dtype::kBf16, Dtype::kF16, Dtype::kF32}) {
        const auto size = [&](std::size_t tokens) {
            const Case c = lossless_case(make_layout(1, {{8, 64}, {8, 64}}, dtype, RopePairing::kHalf),
                                         tokens, Content::kGaussian);
            return static_cast<double>(encode(make_cache(c.layout, c.tokens, c.content), c).size());
        };
        const double token = (size(128) - size(64)) / 64;
        for (std::size_t tokens = 1; tokens <= 64; ++tokens)
            EXPECT_LT(size(tokens), 500 + 1.06 * token * static_cast<double>(tokens)) << tokens;
    }
}

TEST(Lossless, ReturnsALatentPlane) {
    expect_exact(
        lossless_case(make_layout(3, {{1, 576}}, Dtype::kBf16, RopePairing::kNone), 257, Content::kGaussian));
}

// A bound for every value: half a step, a mean in quarter steps does not matter, rounding to bf16 and of the
// rotation.
void expect_close(const Case& c) {
    const Cache cache = make_cache(c.layout, c.tokens, c.content);
    const auto file = encode(cache, c);
    Status status;
    const Cache back = decode(file, {Dtype::kF32, {}}, status);
    ASSERT_TRUE(status.ok()) << status.message();
    const Result<ChunkHeader> header = read_header(file);
    ASSERT_TRUE(header.ok());
    for (std::size_t i = 0; i < cache.planes.size(); ++i) {
        const PlaneParams& p = header.value().planes[i];
        ASSERT_EQ(p.mode, PlaneMode::kQuantised);
        const double step = kernels::value_of(1 << p.guard_bits, p.scale);
        const bool turned = i % 2 == 0 && c.options.unrotate;
        const std::size_t width = c.layout.planes[i % c.layout.planes.size()].width();
        for (std::size_t t = c.options.sinks; t < c.tokens; ++t) {
            for (std::size_t ch = 0; ch < width; ++ch) {
                const double x = cache.value(i, t, ch);
                ASSERT_NEAR(back.value(i, t, ch), x, step * (turned ? 0.75 : 0.51) + std::abs(x) * 1e-3)
                    << c.name << " plane " << i << " token " << t << " channel " << ch;
            }
        }
        for (std::size_t t = 0; t < std::min(c.tokens, c.options.sinks); ++t) {
            for (std::size_t ch = 0; ch < width; ++ch) ASSERT_EQ(back.value(i, t, ch), cache.value(i, t, ch));
        }
    }
}

TEST(Delta, KeepsEveryValueWithinHalfAStepAndSinksExactly) {
    for (const auto predictor : {Predictor::kMean, Predictor::kAnchor}) {
        for (const bool unrotate : {true, false}) {
            for (unsigned level = 1; level <= kDeltaLevels; ++level) {
                for (const std::size_t tokens : {9, 33, 260}) {
                    Case c = {"",
                              make_layout(1, {{2, 32}, {2, 32}}, Dtype::kF32, RopePairing::kHalf),
                              tokens,
                              Content::kGaussian,
                              {}};
                    c.options.level = level;
                    c.options.predictor = predictor;
                    c.options.unrotate = unrotate;
                    c.chunk = 512;
                    expect_close(c);
                }
            }
        }
    }
}

// Memory for a cache whose rows begin `offset` bytes behind a page's begin, and stay `gap` bytes apart.
class Memory {
  public:
    Memory(const Cache& like, std::size_t gap, std::size_t offset) {
        const std::size_t tokens = like.ids.size();
        for (std::size_t i = 0; i < like.planes.size(); ++i) {
            const std::size_t row = like.row_bytes(i);
            row_bytes_.push_back(row);
            planes_.push_back(
                std::make_unique<GuardedBytes>(offset + tokens * (row + gap), Edge::kBegin, 0xee));
            std::memset(planes_.back()->data(), 0xee, planes_.back()->size());
            buffers_.push_back({planes_.back()->data() + offset, row + gap});
        }
    }

    std::span<const PlaneBuffer> buffers() const { return buffers_; }

    // Plane by plane; fails the test where anything lies between rows.
    std::vector<std::vector<std::uint8_t>> values(std::size_t tokens) const {
        std::vector<std::vector<std::uint8_t>> out(buffers_.size());
        for (std::size_t i = 0; i < buffers_.size(); ++i) {
            EXPECT_TRUE(planes_[i]->intact());
            for (std::size_t t = 0; t < tokens; ++t) {
                const auto* row =
                    static_cast<const std::uint8_t*>(buffers_[i].rows) + t * buffers_[i].row_bytes;
                out[i].insert(out[i].end(), row, row + row_bytes_[i]);
                EXPECT_TRUE(std::all_of(row + row_bytes_[i], row + buffers_[i].row_bytes,
                                        [](std::uint8_t b) { return b == 0xee; }));
            }
        }
        return out;
    }

  private:
    std::vector<std::size_t> row_bytes_;
    std::vector<std::unique_ptr<GuardedBytes>> planes_;
    std::vector<PlaneBuffer> buffers_;
};

// Chunks so large that their rows go past the caches: into rows of whole lines, of others, and by several
// workers, all the same; and workspaces whose last chunk was damaged, or whose memory is gone, do no harm.
TEST(Decoder, WritesTheSameRowsPastTheCaches) {
    for (const Dtype dtype : {Dtype::kBf16, Dtype::kF32}) {
        for (const Profile profile : {Profile::kLossless, Profile::kDelta}) {
            Case c = {"",
                      make_layout(5, {{3, 64}, {2, 96}}, dtype, RopePairing::kHalf),
                      300,
                      Content::kGaussian,
                      {}};
            c.options.profile = profile;
            c.options.level = 3;
            c.chunk = 300;
            const Cache cache = make_cache(c);
            ASSERT_GT(cache.layout.values_per_token() * 300 * kernels::dtype_bytes(dtype),
                      std::size_t{1} << 20);
            const std::vector<std::uint8_t> object = encode(cache, c);
            std::vector<std::uint8_t> damaged = object;
            damaged[object.size() * 2 / 3] ^= 1;
            ThreadPool pool(3);
            SerialExecutor serial;
            std::vector<DecodeWorkspace> workspaces(4);
            std::vector<std::vector<std::uint8_t>> expected;
            for (Executor* executor : {static_cast<Executor*>(&serial), static_cast<Executor*>(&pool)}) {
                for (const auto& [gap, offset] :
                     {std::pair<std::size_t, std::size_t>{2, 2}, {0, 0}, {64, 128}, {64, 32}, {16, 64}}) {
                    {
                        const Memory lost(cache, gap, offset);
                        auto decoder = ChunkDecoder::open(damaged, {});
                        ASSERT_TRUE(decoder.ok());
                        ASSERT_EQ(decoder.value().decode(lost.buffers(), *executor, workspaces).code(),
                                  ErrorCode::kBlockChecksum);
                    }
                    const Memory memory(cache, gap, offset);
                    auto decoder = ChunkDecoder::open(object, {});
                    ASSERT_TRUE(decoder.ok());
                    const Status decoded = decoder.value().decode(memory.buffers(), *executor, workspaces);
                    ASSERT_TRUE(decoded.ok()) << decoded.message();
                    if (expected.empty()) expected = memory.values(300);
                    ASSERT_EQ(memory.values(300), expected)
                        << gap << " between rows, " << offset << " in front";
                    const Memory by_block(cache, gap, offset);
                    for (std::size_t l = 0; l < 5; ++l)
                        ASSERT_TRUE(decoder.value()
                                        .decode_layer(l, by_block.buffers().subspan(2 * l, 2), workspaces[0])
                                        .ok());
                    ASSERT_EQ(by_block.values(300), expected);
                }
            }
            ASSERT_TRUE(profile != Profile::kLossless || expected == cache.planes);
        }
    }
}

TEST(Delta, CoarserLevelsAreSmaller) {
    Case c = {"",
              make_layout(2, {{3, 64}, {3, 64}}, Dtype::kBf16, RopePairing::kHalf),
              256,
              Content::kGaussian,
              {}};
    const Cache cache = make_cache(c.layout, c.tokens, c.content);
    std::size_t last = ~std::size_t{0};
    for (unsigned level = 1; level <= kDeltaLevels; ++level) {
        c.options.level = level;
        const std::size_t bytes = encode(cache, c).size();
        EXPECT_LT(bytes, last);
        last = bytes;
    }
}

TEST(Delta, StoresPlanesThatAreNotFiniteExactly) {
    Case c = {
        "", make_layout(1, {{2, 16}, {2, 16}}, Dtype::kF16, RopePairing::kHalf), 40, Content::kSpecial, {}};
    expect_exact(c);
}

TEST(Delta, StoresAnAllZeroPlaneInAlmostNothing) {
    Case c = {
        "", make_layout(1, {{8, 128}, {8, 128}}, Dtype::kBf16, RopePairing::kHalf), 256, Content::kZero, {}};
    c.options.sinks = 0;
    const Cache cache = make_cache(c.layout, c.tokens, c.content);
    const auto file = encode(cache, c);
    EXPECT_LT(file.size(), 2500u);
    expect_exact(c);
}

TEST(Delta, StoresManyExactRowsOfNarrowHeads) {
    for (const std::size_t dim : {1, 2, 4, 17}) {
        Case c = {"",
                  make_layout(1, {{1, dim}, {1, dim}}, Dtype::kF32, RopePairing::kNone),
                  1000,
                  Content::kSpecial,
                  {}};
        c.options.sinks = 1000;
        c.chunk = 1000;
        expect_exact(c);
    }
}

TEST(Delta, MovingAChunkEqualsEncodingItThere) {
    Case c = {
        "", make_layout(1, {{1, 32}, {1, 32}}, Dtype::kF32, RopePairing::kHalf), 40, Content::kGaussian, {}};
    c.options.level = 1;
    const Cache cache = make_cache(c.layout, c.tokens, c.content);
    const auto file = encode(cache, c);
    Status status;
    const Cache moved = decode(file, {{}, 5000}, status);
    ASSERT_TRUE(status.ok());
    const Cache still = decode(file, {}, status);
    for (std::size_t t = 0; t < c.tokens; ++t) {
        for (std::size_t p = 0; p < 16; ++p) {
            const double angle = 5000.0 * std::pow(10000.0, -2.0 * static_cast<double>(p) / 32.0);
            const double a = still.value(0, t, p);
            const double b = still.value(0, t, p + 16);
            EXPECT_NEAR(moved.value(0, t, p), a * std::cos(angle) - b * std::sin(angle), 3e-3);
            EXPECT_NEAR(moved.value(0, t, p + 16), b * std::cos(angle) + a * std::sin(angle), 3e-3);
        }
    }
    EXPECT_EQ(moved.planes[1], still.planes[1]);
}

TEST(Encoder, WritesTheSameBytesOnAnyExecutor) {
    Case c = {"",
              make_layout(7, {{3, 64}, {3, 64}}, Dtype::kBf16, RopePairing::kHalf),
              100,
              Content::kGaussian,
              {}};
    const Cache cache = make_cache(c.layout, c.tokens, c.content);
    ThreadPool pool(4);
    EXPECT_EQ(encode(cache, c, pool), encode(cache, c));
}

TEST(Decoder, GivesTheSameValuesOnAnyExecutor) {
    Case c = {"",
              make_layout(7, {{3, 64}, {3, 64}}, Dtype::kBf16, RopePairing::kHalf),
              100,
              Content::kGaussian,
              {}};
    c.options.block_heads = 1;
    const Cache cache = make_cache(c.layout, c.tokens, c.content);
    const auto file = encode(cache, c);
    Status status;
    const Cache serial = decode(file, {}, status);
    ThreadPool pool(4);
    std::vector<DecodeWorkspace> workspaces(4);
    const auto decoder = ChunkDecoder::open(file);
    ASSERT_TRUE(decoder.ok());
    for (int i = 0; i < 20; ++i) {
        Cache parallel = serial;
        std::vector<PlaneBuffer> buffers;
        for (std::size_t p = 0; p < parallel.planes.size(); ++p) {
            std::fill(parallel.planes[p].begin(), parallel.planes[p].end(), std::uint8_t{0xee});
            buffers.push_back({parallel.planes[p].data(), parallel.row_bytes(p)});
        }
        ASSERT_TRUE(decoder.value().decode(buffers, pool, workspaces).ok());
        ASSERT_EQ(parallel.planes, serial.planes);
    }
}

}  // namespace
}  // namespace kvcast::test
