// The parts below the codec: tables, side vectors, RoPE, headers, identities.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>

#include "codec/chunk_assembly.h"
#include "codec/entropy/block_reader.h"
#include "codec/entropy/block_writer.h"
#include "codec/format/chain.h"
#include "tests/codec/synthetic.h"

namespace kvcast::test {
namespace {

TEST(Tables, GiveEverySlotToOneSymbolAndRank) {
    for (std::size_t t = 0; t < entropy::kTables; ++t) {
        const kernels::AliasTable& alias = entropy::decode_table(t).alias;
        const kernels::EncodeTable& encode = entropy::encode_table(t);
        std::uint32_t total = 0;
        for (const std::uint32_t f : encode.frequency) total += f;
        ASSERT_EQ(total, kernels::kProbabilityTotal);
        for (std::uint32_t slot = 0; slot < kernels::kProbabilityTotal; ++slot) {
            const std::uint32_t bucket = slot / kernels::kBucketSlots;
            const std::uint32_t entry =
                alias.entry[2 * bucket + (slot % kernels::kBucketSlots >= alias.divider[bucket])];
            const std::uint32_t symbol = kernels::entry_symbol(entry);
            const std::uint32_t rank = (slot + kernels::entry_adjust(entry)) & kernels::kProbabilityMask;
            ASSERT_EQ(kernels::entry_frequency(entry), encode.frequency[symbol]);
            ASSERT_LT(rank, encode.frequency[symbol]);
            ASSERT_EQ(encode.slot[encode.start[symbol] + rank], slot);
        }
    }
}

// What the backends with vectors look up says the same as the tables that FORMAT.md describes.
TEST(Tables, AreTheSameInHalvesAndBytes) {
    for (std::size_t t = 0; t < entropy::kTables; ++t) {
        const kernels::DecodeTable& table = entropy::decode_table(t);
        const kernels::AliasTable& alias = table.alias;
        for (std::uint32_t low = 0; low < 0x10000; ++low) {
            const std::uint32_t slot = low & kernels::kProbabilityMask, bucket = slot / kernels::kBucketSlots;
            const bool beyond = slot % kernels::kBucketSlots >= alias.divider[bucket];
            const std::uint32_t entry = 2 * bucket + beyond, packed = alias.entry[entry];
            const std::uint32_t symbol = kernels::entry_symbol(packed);
            const std::uint32_t rank = (slot + kernels::entry_adjust(packed)) & kernels::kProbabilityMask;

            const std::uint32_t sum = low + table.halves.carry[(low >> kernels::kBucketBits) % 32];
            ASSERT_EQ((sum >> kernels::kBucketBits) % 32, entry) << "table " << t << ", low half " << low;
            ASSERT_EQ(table.halves.frequency[entry], 4 * kernels::entry_frequency(packed));
            ASSERT_EQ(static_cast<std::uint16_t>(slot + table.halves.rank[entry]), rank);
            ASSERT_EQ(table.halves.symbol[entry], 2 * symbol);
            ASSERT_EQ(table.halves.value[entry], symbol == kernels::kEscape
                                                     ? kernels::kEscapeMark
                                                     : static_cast<int>(symbol) - kernels::kSymbolZero);

            const kernels::ByteTable& b = table.bytes;
            const auto word = [](const std::uint8_t(&bytes)[2][kernels::kSymbols], std::size_t at) {
                return static_cast<std::uint32_t>(bytes[0][at] | bytes[1][at] << 8);
            };
            ASSERT_EQ(static_cast<std::int16_t>(word(b.last, bucket)),
                      static_cast<std::int32_t>(alias.divider[bucket]) - 1);
            ASSERT_EQ(beyond ? b.second[bucket] : bucket, symbol);
            ASSERT_EQ(word(b.frequency, symbol), 4 * kernels::entry_frequency(packed));
            ASSERT_EQ(static_cast<std::uint16_t>(slot + word(b.rank[beyond], bucket)), rank);
        }
    }
}

TEST(Tables, DivideAndFindSlotsInHalves) {
    using kernels::EncodeHalves;
    for (std::size_t t = 0; t < entropy::kTables; ++t) {
        const kernels::EncodeTable& encode = entropy::encode_table(t);
        const EncodeHalves& h = encode.halves;
        for (std::size_t s = 0; s < kernels::kSymbols; ++s) {
            ASSERT_EQ(h.frequency[s], 4 * encode.frequency[s]);
            const std::uint32_t divisor = std::uint32_t{h.frequency[s]} << h.shift[s];
            ASSERT_GE(divisor, 0x8000u);
            ASSERT_LT(divisor, 0x10000u);
            ASSERT_EQ(h.reciprocal[s] + 0x10000u, 0xffffffffu / divisor);
            for (std::uint32_t rank = 0; rank < encode.frequency[s]; ++rank) {
                const std::uint32_t index = h.first[s] + rank, cell = index >> EncodeHalves::kCellBits;
                ASSERT_LT(cell, EncodeHalves::kCells);
                std::size_t n = 0;
                while (n < EncodeHalves::kBounds && index >= h.bound[n][cell]) ++n;
                ASSERT_EQ(static_cast<std::uint16_t>(index + h.offset[n][cell]),
                          encode.slot[encode.start[s] + rank])
                    << "table " << t << ", symbol " << s << ", rank " << rank;
            }
        }
    }
}

TEST(Blocks, ReturnStripsOfEveryClassAndLength) {
    for (unsigned spread_class = 1; spread_class < entropy::kClasses; ++spread_class) {
        for (const std::size_t count : {1, 16, 17, 32, 33, 100}) {
            std::vector<std::int16_t> values(count);
            for (std::size_t i = 0; i < count; ++i) {
                const auto v = static_cast<std::int32_t>(i * 2654435761u >> 8) %
                               (2 << entropy::class_coding(spread_class).shift);
                values[i] = static_cast<std::int16_t>(i % 13 == 5 ? (i % 2 ? 30000 : -30000) : v);
            }
            entropy::BlockWriter writer(kernels::scalar_ops());
            writer.strip(spread_class, values);
            entropy::BlockReader reader(kernels::scalar_ops(), writer.finish());
            std::vector<std::int16_t> back(count);
            reader.strip(spread_class, count, back.data());
            ASSERT_TRUE(reader.close().ok()) << reader.close().message();
            ASSERT_EQ(back, values);
        }
    }
}

// Whatever order parts come in, and whether the header has the length of the one before it or not.
TEST(Assembly, PutsPartsInTheirOrderBehindAnyHeader) {
    ChunkAssembly assembly;
    std::mt19937 random(6);
    std::vector<std::uint8_t> object = {9, 9, 9};
    for (const std::size_t header_bytes : {7, 7, 3, 12, 12, 0, 5}) {
        std::vector<std::uint8_t> header(header_bytes, static_cast<std::uint8_t>(random())),
            expected = header;
        std::vector<std::vector<std::uint8_t>> parts(random() % 6);
        for (auto& part : parts) {
            for (std::size_t n = random() % 40; n > 0; --n)
                part.push_back(static_cast<std::uint8_t>(random()));
            expected.insert(expected.end(), part.begin(), part.end());
        }
        std::vector<std::size_t> order(parts.size());
        std::iota(order.begin(), order.end(), std::size_t{0});
        std::shuffle(order.begin(), order.end(), random);
        assembly.begin(object, parts.size());
        for (const std::size_t p : order) {
            const ChunkAssembly::Bytes all = parts[p];
            const ChunkAssembly::Bytes pieces[] = {all.first(all.size() / 3), all.subspan(all.size() / 3)};
            assembly.add(p, pieces);
        }
        assembly.finish(header);
        ASSERT_EQ(object, expected);
    }
}

TEST(Blocks, AreTheSameCodedPieceByPiece) {
    const std::vector<std::int16_t> values = {1, -2, 3, 0, 700, -4, 5, 0, 2};
    const auto piece = [&](entropy::BlockWriter& w, std::int16_t add) {
        w.word(static_cast<std::uint16_t>(4000 + add));
        auto moved = values;
        for (auto& v : moved) v = static_cast<std::int16_t>(v + add);
        w.vector(moved);
        w.strip(9, values);
    };
    entropy::BlockWriter whole(kernels::scalar_ops()), pieces(kernels::scalar_ops());
    for (int round = 0; round < 3; ++round) {  // a writer is used again
        for (std::int16_t i = 0; i < 20; ++i) piece(whole, i);
        entropy::BlockWriter::Block block = {&pieces, nullptr, {}};
        FetchAhead nothing;
        for (std::int16_t i = 20; i-- > 0;) {
            piece(pieces, i);
            entropy::BlockWriter::code_all({&block, 1}, nothing);
        }
        const entropy::BlockWriter::Bytes expected = whole.finish(), got = pieces.finish();
        ASSERT_TRUE(std::equal(expected.begin(), expected.end(), got.begin(), got.end())) << round;
    }
}

TEST(Blocks, ReturnVectorsAndRefuseValuesOutsideTheirRange) {
    const std::vector<std::int16_t> values = {5, 5, 6, 900, -3, 0, 12, 16000, -16000};
    entropy::BlockWriter writer(kernels::scalar_ops());
    writer.vector(values);
    writer.word(4711);
    const entropy::BlockWriter::Bytes block = writer.finish();
    std::vector<std::int16_t> back(values.size());
    entropy::BlockReader reader(kernels::scalar_ops(), block);
    EXPECT_TRUE(reader.vector(back, -16000, 16000));
    EXPECT_EQ(back, values);
    EXPECT_EQ(reader.word(), 4711);
    EXPECT_TRUE(reader.close().ok());
    entropy::BlockReader again(kernels::scalar_ops(), block);
    EXPECT_FALSE(again.vector(back, 0, 31));
    EXPECT_FALSE(again.close().ok());
}

TEST(Classes, FollowTheMeanMagnitude) {
    const auto plainly = [](std::uint64_t sum, std::size_t count) {
        if (sum == 0) return 0u;
        const auto thresholds = entropy::class_thresholds();
        return static_cast<unsigned>(std::count_if(thresholds.begin(), thresholds.end(),
                                                   [&](std::uint32_t t) { return t <= sum * 256 / count; })) +
               1;
    };
    for (const std::size_t count : {1, 2, 3, 31, 32, 64, 252, 255, 256, 257, 1000, 65535}) {
        for (const std::uint32_t threshold : entropy::class_thresholds()) {
            const std::uint64_t at = threshold * std::uint64_t{count} / 256;
            for (std::uint64_t sum = at < 3 ? 0 : at - 3; sum <= at + 3; ++sum)
                ASSERT_EQ(entropy::class_for(sum, count), plainly(sum, count)) << sum << " of " << count;
        }
        for (const std::uint64_t sum : {std::uint64_t{0}, std::uint64_t{1}, std::uint64_t{count} * 32767})
            ASSERT_EQ(entropy::class_for(sum, count), plainly(sum, count)) << sum << " of " << count;
    }
}

TEST(Vectors, AreDifferencesToTheirMedianOfTheCheapestClass) {
    std::mt19937_64 random(5);
    for (int round = 0; round < 2000; ++round) {
        std::vector<std::int16_t> values(1 + random() % 100);
        const auto bits = static_cast<unsigned>(random() % 15);
        const int offset = round % 3 == 0 ? static_cast<int>(random() % 3000) - 1500 : 0;
        for (auto& v : values)
            v = static_cast<std::int16_t>((static_cast<std::int16_t>(random()) >> (15 - bits)) / 2 + offset);
        const entropy::VectorModel model = entropy::cheapest_vector_model(values);
        auto sorted = values;
        std::sort(sorted.begin(), sorted.end());
        ASSERT_EQ(model.reference, std::clamp<int>(sorted[sorted.size() / 2], -1024, 1023)) << round;
        unsigned cheapest = 0;
        std::uint64_t least = std::numeric_limits<std::uint64_t>::max();
        for (unsigned c = 1; c < kernels::kClasses; ++c) {
            std::uint64_t cost = 0;
            for (const std::int16_t v : values) cost += entropy::value_cost(c, v - model.reference);
            if (cost >= least) continue;
            least = cost;
            cheapest = c;
        }
        const bool equal =
            std::all_of(values.begin(), values.end(), [&](auto v) { return v == model.reference; });
        ASSERT_EQ(model.spread_class, equal ? 0 : cheapest) << round;
    }
    EXPECT_EQ(entropy::cheapest_vector_model({}).spread_class, 0u);
}

TEST(Rope, SinesAndCosinesAreWithinOneUnit) {
    for (std::uint64_t i = 0; i < 100000; ++i) {
        const std::uint64_t phase = i * 0x9e3779b97f4a7c15u;
        const double angle = static_cast<double>(phase) * 6.283185307179586 / 0x1p64;
        const kernels::SinCos v = kernels::sin_cos(phase);
        ASSERT_NEAR(v.cos, 16384 * std::cos(angle), 0.75);
        ASSERT_NEAR(v.sin, 16384 * std::sin(angle), 0.75);
    }
    EXPECT_EQ(kernels::sin_cos(0).cos, 16384);
    EXPECT_EQ(kernels::sin_cos(0).sin, 0);
}

TEST(Rope, TheBaseOfAGeometricSeriesIsFoundAgain) {
    for (const double theta : {10000.0, 100000.0, 500000.0, 1000000.0, 8000000.0}) {
        for (const std::size_t dim : {16, 64, 80, 128})
            EXPECT_EQ(geometric_theta(geometric_frequencies(theta, dim)), theta);
    }
    EXPECT_EQ(geometric_theta({1, 2, 3}), 0);
}

// Values of 80 digits' arithmetic: who publishes and who fetches may have unlike long doubles.
TEST(Rope, TheRatioOfASeriesIsTheSameOnEveryPlatform) {
    const auto ratio = [](double theta, std::size_t dim) {
        std::vector<std::uint8_t> bytes;
        ByteWriter writer(bytes);
        Layout layout = make_layout(1, {{1, dim}}, Dtype::kBf16, RopePairing::kHalf);
        layout.rope.frequencies = geometric_frequencies(theta, dim);
        write_layout(layout, writer);
        std::uint64_t last = 0;
        std::memcpy(&last, bytes.data() + bytes.size() - sizeof last, sizeof last);
        return last;
    };
    EXPECT_EQ(ratio(10000, 64), 13833106561912589467u);
    EXPECT_EQ(ratio(10000, 128), 15974222249986187368u);
    EXPECT_EQ(ratio(100000, 64), 12872702205717009733u);
    EXPECT_EQ(ratio(500000, 128), 15027035630984883927u);
    EXPECT_EQ(ratio(1000000, 128), 14865164601434254472u);
    EXPECT_EQ(ratio(8000000, 80), 12397738531080135014u);
}

TEST(Rope, OneRadianIsTheFirstTermOfEverySeries) {
    EXPECT_EQ(frequency_from_radians(1.0), geometric_frequencies(10000, 64)[0]);
    EXPECT_EQ(frequency_from_radians(-1.0), -geometric_frequencies(10000, 64)[0]);
    EXPECT_EQ(frequency_from_radians(0.0), 0u);
    for (const std::uint64_t f : geometric_frequencies(500000, 128)) {
        EXPECT_NEAR(radians_from_frequency(frequency_from_radians(radians_from_frequency(f))),
                    radians_from_frequency(f), 1e-16);
    }
}

TEST(Numbers, RoundToTheNearestEvenOfEachType) {
    EXPECT_EQ(kernels::to_bf16(1.0f), 0x3f80);
    EXPECT_EQ(kernels::to_bf16(std::bit_cast<float>(0x3f808000u)), 0x3f80);
    EXPECT_EQ(kernels::to_bf16(std::bit_cast<float>(0x3f818000u)), 0x3f82);
    EXPECT_EQ(kernels::to_bf16(3.4e38f), 0x7f7f);
    EXPECT_EQ(kernels::to_bf16(NAN), 0x7fc0);
    EXPECT_EQ(kernels::to_f16(65519.0f), 0x7bff);
    EXPECT_EQ(kernels::to_f16(1e9f), 0x7bff);
    EXPECT_EQ(kernels::to_f16(-INFINITY), 0xfc00);
    for (std::uint32_t h = 0; h < 65536; ++h) {
        const float f = kernels::from_f16(static_cast<std::uint16_t>(h));
        ASSERT_TRUE(std::isnan(f) || kernels::to_f16(f) == h);
        const float b = kernels::from_bf16(static_cast<std::uint16_t>(h));
        ASSERT_TRUE(std::isnan(b) || kernels::to_bf16(b) == h);
    }
    const float half_way = 0x1.002p0f;  // between two neighbours of binary16
    EXPECT_EQ(kernels::to_f16(half_way), 0x3c00);
    EXPECT_EQ(kernels::to_f16(0x1.8p-25f), 1);  // rounds up to the least denormal
    EXPECT_EQ(kernels::to_f16(0x1p-25f), 0);    // ties to even
}

TEST(Header, ReturnsEveryFieldAndTokenId) {
    for (const std::vector<std::int32_t>& ids :
         {std::vector<std::int32_t>{0, 0, 0}, {1, 131071, 7}, {-1, 5, 2147483647}}) {
        Case c = {"",
                  make_layout(2, {{3, 8}, {2, 6}}, Dtype::kF16, RopePairing::kInterleaved),
                  3,
                  Content::kGaussian,
                  {}};
        Cache cache = make_cache(c.layout, c.tokens, c.content);
        cache.ids = ids;
        c.base_position = 77;
        const auto file = encode(cache, c);
        const ChunkHeader h = read_header(file).value();
        EXPECT_EQ(h.token_ids, ids);
        EXPECT_EQ(h.layout, c.layout);
        EXPECT_EQ(h.base_position, 77u);
        EXPECT_EQ(h.model, "test model");
        const auto again = write_header(h);
        ASSERT_TRUE(again.ok());
        EXPECT_TRUE(std::equal(again.value().begin(), again.value().end(), file.begin()));
    }
}

TEST(Header, IsNotWrittenWhereAReaderWouldRefuseIt) {
    const Case c = {
        "", make_layout(1, {{1, 8}, {1, 8}}, Dtype::kBf16, RopePairing::kHalf), 3, Content::kGaussian, {}};
    const ChunkHeader good = read_header(encode(make_cache(c.layout, c.tokens, c.content), c)).value();
    const auto code = [&](auto change) {
        ChunkHeader h = good;
        change(h);
        return write_header(h).status().code();
    };
    EXPECT_EQ(code([](ChunkHeader&) {}), ErrorCode::kOk);
    EXPECT_EQ(code([](ChunkHeader& h) { h.block_bytes[0] = 2; }), ErrorCode::kBadHeader);
    EXPECT_EQ(code([](ChunkHeader& h) { h.exact_rows = 4; }), ErrorCode::kBadHeader);
    EXPECT_EQ(code([](ChunkHeader& h) { h.delta.anchor_group = 1; }), ErrorCode::kBadHeader);
    EXPECT_EQ(code([](ChunkHeader& h) { h.level = 0; }), ErrorCode::kBadHeader);
    EXPECT_EQ(code([](ChunkHeader& h) { h.calibration.emplace(); }), ErrorCode::kBadHeader);
    EXPECT_EQ(code([](ChunkHeader& h) { h.first_token = ChunkLimits::kPosition + 1; }),
              ErrorCode::kLimitExceeded);
    EXPECT_EQ(code([](ChunkHeader& h) { h.tokens = 2; }), ErrorCode::kBadArgument);
}

TEST(Header, ALosslessChunkSaysHowManyRowsAreExactOnlyIfThereAreAny) {
    Case c = {
        "", make_layout(1, {{1, 64}, {1, 64}}, Dtype::kBf16, RopePairing::kHalf), 19, Content::kGaussian, {}};
    c.options.profile = Profile::kLossless;
    const Cache cache = make_cache(c.layout, c.tokens, c.content);
    ChunkHeader h = read_header(encode(cache, c)).value();
    EXPECT_EQ(h.exact_rows, 3u);
    const std::vector<std::uint8_t> good = write_header(h).value();
    h.exact_rows = 4;
    const auto at =
        static_cast<std::size_t>(std::ranges::mismatch(good, write_header(h).value()).in1 - good.begin());
    ASSERT_EQ(good[at], 3);
    for (const unsigned rows : {0u, 20u, 127u}) {
        std::vector<std::uint8_t> bad = good;
        bad[at] = static_cast<std::uint8_t>(rows);
        const std::uint32_t crc = crc32(std::span(bad).first(bad.size() - 4));
        std::memcpy(bad.data() + bad.size() - 4, &crc, 4);
        EXPECT_EQ(read_header(bad).status().code(), ErrorCode::kBadHeader) << rows;
    }
}

TEST(ThreadPool, ThrowsWhatATaskThrowsAndGoesOn) {
    ThreadPool pool(3);
    for (int round = 0; round < 20; ++round) {
        EXPECT_THROW(pool.run(50,
                              [](std::size_t i, std::size_t) {
                                  if (i >= 7) throw std::bad_alloc();
                              }),
                     std::bad_alloc);
        std::atomic<std::size_t> done = 0;
        pool.run(50, [&](std::size_t, std::size_t) { ++done; });
        EXPECT_EQ(done, 50u);
    }
}

TEST(Varint, HasOneSpellingForEveryNumber) {
    const std::vector<std::uint8_t> padded = {0x81, 0x00};
    ByteReader in(padded);
    in.varint();
    EXPECT_FALSE(in.ok());
    for (const std::uint64_t v :
         {std::uint64_t{0}, std::uint64_t{127}, std::uint64_t{128}, ~std::uint64_t{0}}) {
        std::vector<std::uint8_t> bytes;
        ByteWriter(bytes).varint(v);
        ByteReader back(bytes);
        EXPECT_EQ(back.varint(), v);
        EXPECT_TRUE(back.ok() && back.left() == 0);
    }
}

TEST(Identity, DependsOnEverythingTheCacheWasComputedFrom) {
    EXPECT_EQ(to_hex(sha256(std::vector<std::uint8_t>{'a', 'b', 'c'})),
              "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    const std::vector<std::int32_t> ids = {1, 2, 3};
    const std::vector<std::int32_t> others = {1, 2, 4};
    const Hash layout = {9};
    const Hash h = chain_hash({}, "salt", layout, "model", ids);
    EXPECT_EQ(h, chain_hash({}, "salt", layout, "model", ids));
    EXPECT_NE(h, chain_hash({1}, "salt", layout, "model", ids));
    EXPECT_NE(h, chain_hash({}, "", layout, "model", ids));
    EXPECT_NE(h, chain_hash({}, "salt", {}, "model", ids));
    EXPECT_NE(h, chain_hash({}, "salt", layout, "other", ids));
    EXPECT_NE(h, chain_hash({}, "salt", layout, "model", others));
    EXPECT_NE(chain_hash({}, "ab", layout, "c", ids), chain_hash({}, "a", layout, "bc", ids));
}

}  // namespace
}  // namespace kvcast::test
