// The calibrated profile: closed loop, calibration files and the rules about them, layers in order.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>

#include "codec/entropy/block_writer.h"
#include "codec/format/byte_writer.h"
#include "codec/format/chain.h"
#include "codec/klt/calibration_block.h"
#include "codec/klt/klt_analysis.h"
#include "codec/klt/klt_chunk.h"
#include "codec/klt/reconstruction.h"
#include "tests/codec/synthetic.h"
#include "tests/codec/synthetic_calibration.h"

namespace kvcast::test {
namespace {

Case find_case(const std::string& name) {
    for (Case& c : conformance_cases()) {
        if (c.name == name) return c;
    }
    ADD_FAILURE() << name;
    return {};
}

ErrorCode open_code(const std::vector<std::uint8_t>& file, std::shared_ptr<const Calibration> calibration) {
    return ChunkDecoder::open(file, {.calibration = std::move(calibration)}).status().code();
}

double mean_error(const Cache& a, const Cache& b) {
    double sum = 0;
    std::size_t count = 0;
    for (std::size_t p = 0; p < a.planes.size(); ++p) {
        for (std::size_t t = 0; t < a.ids.size(); ++t) {
            const std::size_t width = a.layout.planes[p % a.layout.planes.size()].width();
            for (std::size_t c = 0; c < width; ++c, ++count)
                sum += std::abs(a.value(p, t, c) - b.value(p, t, c));
        }
    }
    return sum / static_cast<double>(count);
}

struct Strip {
    std::size_t level;
    int gain;
    std::vector<std::uint32_t> tokens;

    friend bool operator==(const Strip&, const Strip&) = default;
};

std::vector<Strip> strips_of(const ChunkHeader& header, const std::vector<std::uint32_t>& body,
                             const std::vector<std::int16_t>& gains) {
    TokenStrips strips;
    strips.make(header, body, gains);
    std::vector<Strip> out;
    for (const TokenStrip& s : strips.strips()) {
        const auto tokens = strips.tokens(s);
        out.push_back({s.level, s.gain, {tokens.begin(), tokens.end()}});
    }
    return out;
}

TEST(TokenStrips, TakeTokensByFallingGainAndThoseOfTheTailBehindAllOthers) {
    ChunkHeader header;
    header.tokens = 8;
    header.level = 4;
    header.klt.tail_tokens = 3;
    header.klt.tail_level = 2;
    const std::vector<Strip> expected = {{3, 1, {4, 1, 2, 3}}, {1, 15, {7, 5, 6}}};
    EXPECT_EQ(strips_of(header, {1, 2, 3, 4, 5, 6, 7}, {0, 0, -15, 1, 2, 2, 15}), expected);
}

TEST(TokenStrips, HoldThirtyTwoTokensAndHaveTheGainOfTheirFirst) {
    ChunkHeader header;
    header.tokens = 70;
    header.level = 1;
    header.klt.tail_level = 1;
    std::vector<std::uint32_t> body;
    std::vector<std::int16_t> gains;
    for (std::uint32_t t = 0; t < 70; ++t) {
        body.push_back(t);
        gains.push_back(static_cast<std::int16_t>(t < 40 ? -3 : 2));
    }
    const std::vector<Strip> strips = strips_of(header, body, gains);
    ASSERT_EQ(strips.size(), 3u);
    EXPECT_EQ(strips[0].gain, 2);
    EXPECT_EQ(strips[0].tokens.size(), 32u);
    EXPECT_EQ(strips[0].tokens.front(), 40u);
    EXPECT_EQ(strips[0].tokens.back(), 1u);
    EXPECT_EQ(strips[1].gain, -3);
    EXPECT_EQ(strips[2].tokens, (std::vector<std::uint32_t>{34, 35, 36, 37, 38, 39}));
}

TEST(TokenStrips, AreNoneWithoutTokens) {
    ChunkHeader header;
    header.level = header.klt.tail_level = 1;
    EXPECT_TRUE(strips_of(header, {}, {}).empty());
}

// What comes of a chunk must not depend on how its tokens are cut into slices, on one thread or several.
TEST(Klt, PlanesOfUnequalWidthsKeepTheirPredictionsApart) {
    Case c = find_case("klt1-t33");
    c.layout = make_layout(3, {{3, 20}, {1, 13}}, Dtype::kBf16, RopePairing::kHalf);
    c.tokens = c.chunk = 200;
    c.options.sinks = 0;
    c.options.calibration = make_calibration(c.layout, {{1, 1}, 10, 4});
    const Cache cache = make_cache(c);
    const auto file = encode(cache, c);
    Status status;
    const Cache decoded = decode(file, {.calibration = c.options.calibration}, status);
    ASSERT_TRUE(status.ok()) << status.message();
    // Tokens of every slice are as close to the truth as those of the first.
    const auto error_of = [&](std::size_t first) {
        double sum = 0;
        for (std::size_t p = 0; p < cache.planes.size(); ++p) {
            const std::size_t width = c.layout.planes[p % 2].width();
            for (std::size_t i = 0; i < 50 * width; ++i)
                sum += std::abs(cache.value(p, first + i / width, i % width) -
                                decoded.value(p, first + i / width, i % width));
        }
        return sum;
    };
    for (const std::size_t first : {50, 100, 150}) EXPECT_LT(error_of(first), 1.2 * error_of(0)) << first;
}

// Whatever is computed once for several tokens: each gets what its own id predicts.
TEST(Klt, IdsPredictAlikeWhereverTheyStand) {
    const Layout layout = make_layout(2, {{2, 24}, {2, 24}}, Dtype::kBf16, RopePairing::kHalf);
    const auto calibration = make_calibration(layout, {{2, 2}, 9, 3});
    const CalibrationData& data = calibration->data();
    const auto beyond = static_cast<std::int32_t>(data.tokens.vocabulary);
    const std::vector<std::int32_t> ids = {5,          7,  5, -1,        beyond, 5,        0,
                                           beyond - 1, -1, 7, INT32_MIN, 3,      INT32_MAX};
    for (const kernels::Ops* ops : kernels::available_ops()) {
        KltStates states;
        states.reset(*calibration, calibration->set(0), ids);
        EXPECT_EQ(states.ids(), 9u);
        for (std::size_t i = 0; i < states.ids(); i += 2)
            states.make_starts(*ops, 0, 0, {i, std::min<std::size_t>(2, states.ids() - i)});
        for (std::size_t part = 0; part < 2; ++part) {
            const CalibrationUnit& unit = calibration->set(0).unit(0, 0, part);
            ASSERT_EQ(unit.terms.size(), 1u);
            const ShiftedMatrix& m = unit.terms[0].matrix;
            std::vector<std::int32_t> sums(ids.size() * m.outputs);
            states.predict(*ops, 0, 0, part, {0, ids.size()}, sums.data());
            for (std::size_t t = 0; t < ids.size(); ++t) {
                for (std::size_t o = 0; o < m.outputs; ++o) {
                    std::int64_t sum = std::int64_t{1} << (m.shifts[o] - 1);
                    const bool known = ids[t] >= 0 && ids[t] < beyond;
                    for (std::size_t i = 0; known && i < m.inputs; ++i) {
                        const std::size_t at = static_cast<std::size_t>(ids[t]) * m.inputs + i;
                        sum += 256 * m.entries[o * m.inputs + i] * data.tokens.rows[at];
                    }
                    ASSERT_EQ(sums[t * m.outputs + o], unit.bias[o] + (sum >> m.shifts[o])) << ids[t];
                }
            }
        }
    }
}

TEST(Klt, FinerLevelsAreCloserAndLarger) {
    Case c = find_case("klt1-t33");
    const Cache cache = make_cache(c);
    double previous_error = 0;
    std::size_t previous_size = ~std::size_t{0};
    for (unsigned level = 1; level <= 3; ++level) {
        c.options.level = level;
        const auto file = encode(cache, c);
        Status status;
        const double error = mean_error(cache, decode(file, {.calibration = c.options.calibration}, status));
        ASSERT_TRUE(status.ok()) << status.message();
        EXPECT_GT(error, previous_error);
        EXPECT_LT(file.size(), previous_size);
        previous_error = error;
        previous_size = file.size();
    }
    EXPECT_LT(previous_error, 1.5);
}

TEST(Klt, ExactTokensAreExact) {
    const Case c = find_case("klt2-special");
    const Cache cache = make_cache(c);
    const auto file = encode(cache, c);
    Status status;
    const Cache back = decode(file, {.calibration = c.options.calibration}, status);
    ASSERT_TRUE(status.ok()) << status.message();
    const auto header = read_header(file);
    ASSERT_TRUE(header.ok());
    const auto& exact = header.value().klt.exact_tokens;
    ASSERT_FALSE(exact.empty());
    for (std::size_t p = 0; p < cache.planes.size(); ++p) {
        const std::size_t row = cache.row_bytes(p);
        for (const std::uint32_t t : exact)
            EXPECT_EQ(0, std::memcmp(cache.planes[p].data() + t * row, back.planes[p].data() + t * row, row));
    }
}

TEST(Klt, ThreadsAndLayersOneByOneGiveTheSameValues) {
    const Case c = find_case("klt1-outliers");
    const Cache cache = make_cache(c);
    const auto file = encode(cache, c);
    ThreadPool pool(3);
    EXPECT_EQ(encode(cache, c, pool), file);
    Status status;
    const Cache all = decode(file, {.calibration = c.options.calibration}, status);
    const auto decoder = ChunkDecoder::open(file, {.calibration = c.options.calibration});
    ASSERT_TRUE(decoder.ok());
    DecodeWorkspace workspace;
    const std::size_t planes = c.layout.planes.size();
    for (std::size_t l = 0; l < c.layout.layers; ++l) {
        std::vector<std::vector<std::uint8_t>> out;
        std::vector<PlaneBuffer> buffers;
        for (std::size_t p = 0; p < planes; ++p) out.emplace_back(c.tokens * all.row_bytes(p));
        for (std::size_t p = 0; p < planes; ++p) buffers.push_back({out[p].data(), all.row_bytes(p)});
        ASSERT_TRUE(decoder.value().decode_layer(l, buffers, workspace).ok());
        for (std::size_t p = 0; p < planes; ++p) EXPECT_EQ(out[p], all.planes[l * planes + p]);
    }
    std::vector<std::vector<std::uint8_t>> out(planes);
    std::vector<PlaneBuffer> buffers;
    for (std::size_t p = 0; p < planes; ++p) {
        out[p].resize(c.tokens * all.row_bytes(p));
        buffers.push_back({out[p].data(), all.row_bytes(p)});
    }
    std::vector<DecodeWorkspace> workspaces(3);
    ASSERT_TRUE(decoder.value().decode_layers(3, 4, buffers, pool, workspaces).ok());
    for (std::size_t p = 0; p < planes; ++p) EXPECT_EQ(out[p], all.planes[3 * planes + p]);
}

// Threads read a layer ahead: what they find there is told when its turn comes, as without them.
TEST(Klt, DamageIsTheSameWithThreads) {
    const Case c = find_case("klt1-outliers");
    const auto file = encode(make_cache(c), c);
    const ChunkHeader intact = read_header(file).value();
    std::vector<std::vector<std::uint8_t>> out;
    std::vector<PlaneBuffer> buffers;
    for (std::size_t i = 0; i < c.layout.layers * c.layout.planes.size(); ++i) {
        const std::size_t row = c.layout.planes[i % c.layout.planes.size()].width() * 4;
        out.emplace_back(c.tokens * row);
        buffers.push_back({out.back().data(), row});
    }
    ThreadPool pool(3);
    SerialExecutor serial;
    std::vector<DecodeWorkspace> workspaces(3);
    std::size_t found = 0;
    for (std::size_t at = intact.header_bytes; at < file.size(); at += 41) {
        auto damaged = file;
        damaged[at] ^= 0x10;
        ChunkHeader h = intact;
        std::size_t begin = h.header_bytes;
        for (std::size_t l = 0; l < h.layout.layers; begin += h.layer_payload_bytes(l), ++l)
            h.layer_crc[l] = crc32(std::span(damaged).subspan(begin, h.layer_payload_bytes(l)));
        const auto rewritten = write_header(h);
        ASSERT_TRUE(rewritten.ok());
        std::copy(rewritten.value().begin(), rewritten.value().end(), damaged.begin());
        const auto decoder = ChunkDecoder::open(damaged, {.calibration = c.options.calibration});
        ASSERT_TRUE(decoder.ok());
        const Status alone = decoder.value().decode(buffers, serial, workspaces);
        const Status together = decoder.value().decode(buffers, pool, workspaces);
        ASSERT_EQ(alone.code(), together.code()) << "byte " << at;
        ASSERT_EQ(alone.message(), together.message()) << "byte " << at;
        found += !alone.ok();
    }
    EXPECT_GT(found, 2u);
}

// Not only a run's last layer, where the coder's states are checked.
TEST(Klt, EveryLayerUsesItsWordsUp) {
    const Case c = find_case("klt1-t33");
    const auto file = encode(make_cache(c), c);
    ChunkHeader h = read_header(file).value();
    ASSERT_GT(h.klt.run_layers, 1u);
    std::vector<std::uint8_t> payload(file.begin() + static_cast<std::ptrdiff_t>(h.header_bytes), file.end());
    payload.insert(payload.begin() + h.block_bytes[0], {0, 0});
    h.block_bytes[0] += 2;
    h.layer_crc[0] = crc32(std::span(payload).first(h.block_bytes[0]));
    std::vector<std::uint8_t> longer = write_header(h).value();
    longer.insert(longer.end(), payload.begin(), payload.end());
    const auto decoder = ChunkDecoder::open(longer, {.calibration = c.options.calibration});
    ASSERT_TRUE(decoder.ok());
    std::vector<std::uint8_t> out(1 << 20);
    const std::vector<PlaneBuffer> buffers(2, {out.data(), 64});
    DecodeWorkspace workspace;
    EXPECT_EQ(decoder.value().decode_layer(0, buffers, workspace).code(), ErrorCode::kCorruptBlock);
}

TEST(Klt, LayersOutOfOrderAreRefused) {
    const Case c = find_case("klt1-t33");
    const auto file = encode(make_cache(c), c);
    const auto decoder = ChunkDecoder::open(file, {.calibration = c.options.calibration});
    ASSERT_TRUE(decoder.ok());
    std::vector<std::uint8_t> out(1 << 20);
    const std::vector<PlaneBuffer> buffers(2, {out.data(), 64});
    DecodeWorkspace workspace;
    EXPECT_EQ(decoder.value().decode_layer(1, buffers, workspace).code(), ErrorCode::kBadArgument);
    EXPECT_TRUE(decoder.value().decode_layer(0, buffers, workspace).ok());
    EXPECT_EQ(decoder.value().decode_layer(2, buffers, workspace).code(), ErrorCode::kBadArgument);
    EXPECT_EQ(decoder.value().decode_block(0, 0, buffers, workspace).code(), ErrorCode::kBadArgument);
    const auto other = ChunkDecoder::open(file, {.calibration = c.options.calibration});
    EXPECT_EQ(other.value().decode_layer(1, buffers, workspace).code(), ErrorCode::kBadArgument);
}

TEST(Klt, TheTailIsFiner) {
    Case c = find_case("klt3-tail");
    const Cache cache = make_cache(c);
    Status status;
    const Cache back = decode(encode(cache, c), {.calibration = c.options.calibration}, status);
    double head = 0, tail = 0;
    for (std::size_t p = 0; p < cache.planes.size(); ++p) {
        for (std::size_t channel = 0; channel < 32; ++channel) {
            for (std::size_t t = 1; t < 40; ++t) {
                const double error = std::abs(cache.value(p, t, channel) - back.value(p, t, channel));
                (t < 35 ? head : tail) += error / (t < 35 ? 34 : 5);
            }
        }
    }
    EXPECT_LT(tail, head / 2);
}

TEST(Klt, TheCalibrationIsAskedForByName) {
    const Case c = find_case("klt1-t33");
    const auto file = encode(make_cache(c), c);
    const auto missing = ChunkDecoder::open(file);
    EXPECT_EQ(missing.status().code(), ErrorCode::kMissingCalibration);
    EXPECT_NE(missing.status().message().find(to_hex(c.options.calibration->id())), std::string::npos);
    const auto other = make_calibration(c.layout, {{1, 1}, 0, 0, 99});
    const auto wrong = ChunkDecoder::open(file, {.calibration = other});
    EXPECT_EQ(wrong.status().code(), ErrorCode::kWrongCalibration);
    EXPECT_NE(wrong.status().message().find(to_hex(c.options.calibration->id())), std::string::npos);
    EXPECT_NE(wrong.status().message().find(to_hex(other->id())), std::string::npos);
    EXPECT_EQ(open_code(file, c.options.calibration), ErrorCode::kOk);
}

TEST(Klt, EncodersRefuseWhatTheCalibrationDoesNotHave) {
    Case c = find_case("klt1-t33");
    const Cache cache = make_cache(c);
    const auto code = [&] {
        ChunkEncoder encoder(c.options);
        SerialExecutor serial;
        std::vector<std::uint8_t> object;
        Hash chain = {};
        const auto rows = cache.rows(0);
        return encoder.encode({&cache.layout, "m", "", cache.ids, 0, 0, chain, rows}, serial, object, chain)
            .code();
    };
    c.options.level = 4;
    EXPECT_EQ(code(), ErrorCode::kBadArgument);
    c.options.level = 0;
    EXPECT_EQ(code(), ErrorCode::kBadArgument);
    c.options.level = 1;
    c.options.calibration =
        make_calibration(make_layout(4, {{2, 16}, {2, 16}}, Dtype::kBf16, RopePairing::kHalf), {{1, 1}});
    EXPECT_EQ(code(), ErrorCode::kBadArgument);
    c.options.calibration = nullptr;
    EXPECT_EQ(code(), ErrorCode::kMissingCalibration);
}

// ---- calibration files ----

CalibrationData small_data() {
    return make_calibration_data(make_layout(3, {{2, 16}, {2, 16}}, Dtype::kBf16, RopePairing::kHalf),
                                 {{1, 1}, 6, 2});
}

ErrorCode written(const CalibrationData& data) {
    return write_calibration(data).status().code();
}

TEST(CalibrationFile, RoundTrips) {
    const CalibrationData data = small_data();
    const auto bytes = calibration_bytes(data);
    const auto back = Calibration::read(bytes);
    ASSERT_TRUE(back.ok()) << back.status().message();
    EXPECT_EQ(back.value()->data(), data);
    EXPECT_EQ(back.value()->reach(), 2u);
    EXPECT_EQ(back.value()->id(), sha256(bytes));
    EXPECT_EQ(write_calibration(back.value()->data()).value(), bytes);
}

TEST(CalibrationFile, CostsAddUpToTheFile) {
    const CalibrationData data = small_data();
    const auto bytes = calibration_bytes(data);
    const CalibrationCost cost = Calibration::read(bytes).value()->cost();
    EXPECT_GT(cost.token_table, data.tokens.rows.size() / 2);
    EXPECT_LT(cost.token_table, data.tokens.rows.size() * 5 / 4);
    // Off the diagonal, transforms have eight bits in the first set and two in the second.
    EXPECT_GT(cost.transforms, 12 * 32 * 32 * 5 / 8u);
    EXPECT_LT(cost.transforms, 12 * 32 * 32 * 8 / 8u);
    EXPECT_GT(cost.previous_layer, cost.earlier_layers);
    EXPECT_GT(cost.earlier_layers, 0u);
    EXPECT_GT(cost.same_layer, 0u);
    EXPECT_GT(cost.tokens, 0u);
    EXPECT_GT(cost.classes, 0u);
    EXPECT_EQ(cost.transforms + cost.previous_layer + cost.earlier_layers + cost.same_layer + cost.tokens +
                  cost.token_table + cost.classes + cost.rest,
              bytes.size());
}

TEST(CalibrationFile, ValuesAtTheirLimitsRoundTrip) {
    CalibrationData data = small_data();
    ShiftedMatrix& m = data.units[0].transform;
    std::fill(m.entries.begin(), m.entries.end(), std::int16_t{0});
    m.entries[0] = 16383;
    m.entries[1] = -16383;
    m.shifts[0] = 4;
    m.shifts[1] = 23;
    data.units[0].classes[0] = -128;
    data.units[0].classes[1] = 127;
    data.tokens.shifts = {0, 0, 1, 4, 6, 7};
    for (std::size_t i = 0; i < data.tokens.rows.size(); ++i) {
        const int unit = 1 << data.tokens.shifts[i % 6];
        data.tokens.rows[i] = static_cast<std::int8_t>(i % 12 < 6 ? -128 : 127 / unit * unit);
    }
    const auto back = Calibration::read(calibration_bytes(data));
    ASSERT_TRUE(back.ok()) << back.status().message();
    EXPECT_EQ(back.value()->data(), data);
    std::int16_t row[6];
    data.tokens.unpack(1, row);
    EXPECT_THAT(row, testing::ElementsAre(127, 127, 126, 112, 64, 0));
}

TEST(CalibrationFile, DamageIsNamed) {
    const auto good = calibration_bytes(small_data());
    const auto code = [](std::vector<std::uint8_t> bytes) {
        return Calibration::read(bytes).status().code();
    };
    for (std::size_t n = 0; n < good.size(); n += 97) {
        const auto cut =
            std::vector<std::uint8_t>(good.begin(), good.begin() + static_cast<std::ptrdiff_t>(n));
        EXPECT_NE(code(cut), ErrorCode::kOk) << n;
    }
    for (std::size_t bit = 0; bit < good.size() * 8; bit += 1009) {
        auto bytes = good;
        bytes[bit / 8] ^= static_cast<std::uint8_t>(1u << bit % 8);
        EXPECT_NE(code(bytes), ErrorCode::kOk) << bit;
    }
    auto bytes = good;
    bytes[0] = 0;
    EXPECT_EQ(code(bytes), ErrorCode::kBadMagic);
    bytes = good;
    for (const int version : {0, 1, 3}) {
        bytes[4] = static_cast<std::uint8_t>(version);
        EXPECT_EQ(code(bytes), ErrorCode::kUnsupportedVersion);
    }
    bytes = good;
    bytes[100] ^= 1;
    EXPECT_EQ(code(bytes), ErrorCode::kHeaderChecksum);
    bytes = good;
    bytes.push_back(0);
    EXPECT_EQ(code(bytes), ErrorCode::kBadHeader);
    bytes = good;
    bytes.resize(bytes.size() - 1);
    EXPECT_EQ(code(bytes), ErrorCode::kTruncated);
}

// Whoever reads the blocks, and in whatever order they come: the same numbers, and the same first fault.
TEST(CalibrationFile, ThreadsReadTheSame) {
    const auto good = calibration_bytes(small_data());
    ThreadPool pool(3);
    const auto one = Calibration::read(good), three = Calibration::read(good, pool);
    ASSERT_TRUE(one.ok() && three.ok());
    EXPECT_EQ(three.value()->data(), one.value()->data());
    EXPECT_EQ(three.value()->id(), one.value()->id());
    EXPECT_EQ(three.value()->cost().tokens, one.value()->cost().tokens);
    EXPECT_EQ(three.value()->cost().rest, one.value()->cost().rest);
    std::size_t faults = 0;
    for (std::size_t at = 40; at + 4 < good.size(); at += 151) {
        auto bytes = good;
        bytes[at] ^= 0x10;
        bytes[at / 2 + 20] ^= 0x08;
        const std::uint32_t crc = crc32(std::span(bytes).first(bytes.size() - 4));
        std::memcpy(bytes.data() + bytes.size() - 4, &crc, 4);
        const Status s = Calibration::read(bytes).status(), t = Calibration::read(bytes, pool).status();
        EXPECT_EQ(t.code(), s.code()) << at;
        EXPECT_EQ(t.message(), s.message()) << at;
        faults += !s.ok();
    }
    EXPECT_GT(faults, 20u);
}

// Narrow matrices are padded, each to as much as a wide one.
TEST(CalibrationFile, MemoryIsInProportionToTheFile) {
    const Layout layout = make_layout(150, {{1, 1}, {1, 1}}, Dtype::kBf16, RopePairing::kNone);
    CalibrationData data = make_calibration_data(layout, {{1, 1}});
    EXPECT_EQ(written(data), ErrorCode::kOk);
    constexpr std::size_t kFeatures = 4096;
    data.tokens = {kFeatures, 1, std::vector<std::uint8_t>(kFeatures), std::vector<std::int8_t>(kFeatures)};
    PredictionTerm term;
    term.source = PredictionTerm::Source::kTokens;
    term.matrix = {1, kFeatures, std::vector<std::int16_t>(kFeatures), {8}};
    for (CalibrationUnit& unit : data.units) unit.terms = {term};
    EXPECT_EQ(written(data), ErrorCode::kLimitExceeded);
}

TEST(CalibrationFile, RulesAreChecked) {
    const auto broken = [](const auto& change) {
        CalibrationData data = small_data();
        change(data);
        return written(data);
    };
    constexpr auto kBad = ErrorCode::kBadHeader;
    EXPECT_EQ(broken([](CalibrationData&) {}), ErrorCode::kOk);
    EXPECT_EQ(broken([](CalibrationData& d) { d.levels.clear(); }), kBad);
    EXPECT_EQ(broken([](CalibrationData& d) { d.levels[0].multiplier = 0; }), kBad);
    EXPECT_EQ(broken([](CalibrationData& d) { d.levels[0].multiplier = 5000; }), kBad);
    EXPECT_EQ(broken([](CalibrationData& d) { d.levels[0].set = 2; }), kBad);
    EXPECT_EQ(broken([](CalibrationData& d) { d.sets = 0; }), kBad);
    EXPECT_EQ(broken([](CalibrationData& d) { d.sets = 9; }), kBad);
    EXPECT_EQ(broken([](CalibrationData& d) { d.sets = 1, d.levels[2].set = 0; }), kBad);
    EXPECT_EQ(broken([](CalibrationData& d) { d.units[0].transform.entries[0] = 16384; }), kBad);
    EXPECT_EQ(broken([](CalibrationData& d) { d.units[0].transform.entries.pop_back(); }), kBad);
    EXPECT_EQ(broken([](CalibrationData& d) { d.units[0].scale.mantissa = 1; }), kBad);
    EXPECT_EQ(broken([](CalibrationData& d) { d.units[0].scale.exponent = 104; }), kBad);
    EXPECT_EQ(broken([](CalibrationData& d) { d.units[0].feature_factors[0] = 127; }), kBad);
    EXPECT_EQ(broken([](CalibrationData& d) { d.units[0].feature_factors[1] = -128; }), kBad);
    EXPECT_EQ(broken([](CalibrationData& d) { d.units[0].feature_factors.pop_back(); }), kBad);
    EXPECT_EQ(broken([](CalibrationData& d) { d.units[0].transform.shifts[3] = 3; }), kBad);
    EXPECT_EQ(broken([](CalibrationData& d) { d.units[0].transform.shifts[3] = 24; }), kBad);
    EXPECT_EQ(broken([](CalibrationData& d) {
                  for (std::size_t i = 0; i < 32; ++i) d.units[0].transform.entries[i] = 2033;
              }),
              kBad);
    EXPECT_EQ(broken([](CalibrationData& d) { d.units[1].terms[0].plane = 1; }), kBad);
    EXPECT_EQ(broken([](CalibrationData& d) { d.units[2].terms[0].layers_back = 2; }), kBad);
    EXPECT_EQ(broken([](CalibrationData& d) { d.units[2].terms[0].plane = 7; }), kBad);
    EXPECT_EQ(broken([](CalibrationData& d) { d.tokens.shifts[3] = 8; }), kBad);
    EXPECT_EQ(broken([](CalibrationData& d) { d.tokens.shifts.pop_back(); }), kBad);
    EXPECT_EQ(broken([](CalibrationData& d) { d.tokens.rows.pop_back(); }), kBad);
    EXPECT_EQ(broken([](CalibrationData& d) { d.tokens.rows[3] = 8; }), kBad);
    EXPECT_EQ(broken([](CalibrationData& d) {
                  d.tokens.vocabulary = 10000;  // all zero: its 128 bytes of states and 12 of words
                  d.tokens.rows.assign(60000, 0);
              }),
              ErrorCode::kLimitExceeded);
    EXPECT_EQ(broken([](CalibrationData& d) { d.tokens.features = 5000; }), ErrorCode::kLimitExceeded);
    EXPECT_EQ(broken([](CalibrationData& d) { d.parts[0] = 3; }), kBad);
    EXPECT_EQ(broken([](CalibrationData& d) { d.units.pop_back(); }), kBad);
    EXPECT_EQ(broken([](CalibrationData& d) { d.units[0].terms.resize(7, d.units[2].terms[0]); }), kBad);
}

// A file of one unit of two channels and two features, put together by hand.
class HandMade {
  public:
    // Written where they stand, whatever they are.
    std::size_t vocabulary = 3;
    std::uint8_t shift = 0;
    std::int16_t feature = 5;
    std::int16_t row_shift = 10;
    std::int16_t entry = 100;
    std::int16_t spread_class = 3;
    std::size_t table_cut = 0;  // bytes that a block lacks at its end
    std::size_t unit_cut = 0;
    std::size_t table_more = 0;  // zero bytes that it has too many
    std::size_t unit_more = 0;

    ErrorCode code() const { return Calibration::read(bytes()).status().code(); }

  private:
    using Vector = std::vector<std::int16_t>;

    std::vector<std::uint8_t> bytes() const {
        std::vector<std::uint8_t> out = {0x89, 0x4b, 0x43, 0x4c, 2, 0, 0, 0};
        ByteWriter w(out);
        w.fixed(std::uint64_t{0});
        w.fixed(std::uint8_t{0});  // model
        write_layout(make_layout(1, {{1, 2}}, Dtype::kBf16, RopePairing::kNone), w);
        w.bytes(std::vector<std::uint8_t>{1, 1, 1, 1, 0});  // parts, sets, one level of multiplier 1
        for (std::size_t i = 0; i < 9; ++i) w.fixed(std::uint8_t{0});
        w.varint(2);
        w.varint(vocabulary);
        w.fixed(shift);
        w.fixed(shift);
        block({Vector(vocabulary, feature), Vector(vocabulary, 0)}, table_cut, table_more, w);
        w.fixed(std::uint8_t{128});
        w.fixed(std::int16_t{0});
        w.fixed(std::uint32_t{0});           // bias
        w.fixed(std::uint32_t{0x01000080});  // factors of features
        w.fixed(std::uint8_t{0});            // terms
        block({{row_shift, 10}, {entry, 0}, {0, 1}, {spread_class}}, unit_cut, unit_more, w);
        const std::uint64_t length = out.size() + 4;
        std::memcpy(out.data() + 8, &length, sizeof(length));
        w.fixed(crc32(out));
        return out;
    }

    static void block(const std::vector<Vector>& vectors, std::size_t cut, std::size_t more,
                      ByteWriter& out) {
        entropy::BlockWriter writer(kernels::scalar_ops());
        for (const Vector& v : vectors) writer.vector(v);
        const entropy::BlockWriter::Bytes coded = writer.finish();
        std::vector<std::uint8_t> bytes(coded.begin(), coded.end());
        bytes.resize(bytes.size() - cut + more);
        out.varint(bytes.size());
        out.bytes(bytes);
    }
};

ErrorCode changed(const auto& change) {
    HandMade made;
    change(made);
    return made.code();
}

TEST(CalibrationFile, BlocksAreChecked) {
    constexpr auto kBad = ErrorCode::kBadHeader;
    EXPECT_EQ(changed([](HandMade&) {}), ErrorCode::kOk);
    EXPECT_EQ(changed([](HandMade& f) { f.feature = 127; }), ErrorCode::kOk);
    EXPECT_EQ(changed([](HandMade& f) { f.feature = 128; }), kBad);
    EXPECT_EQ(changed([](HandMade& f) { f.feature = -129; }), kBad);
    EXPECT_EQ(changed([](HandMade& f) { f.shift = 4, f.feature = 7; }), ErrorCode::kOk);
    EXPECT_EQ(changed([](HandMade& f) { f.shift = 4, f.feature = 8; }), kBad);
    EXPECT_EQ(changed([](HandMade& f) { f.shift = 4, f.feature = -9; }), kBad);
    EXPECT_EQ(changed([](HandMade& f) { f.shift = 8, f.feature = 0; }), kBad);
    EXPECT_EQ(changed([](HandMade& f) { f.row_shift = 3; }), kBad);
    EXPECT_EQ(changed([](HandMade& f) { f.row_shift = 24; }), kBad);
    EXPECT_EQ(changed([](HandMade& f) { f.entry = -16384; }), kBad);
    EXPECT_EQ(changed([](HandMade& f) { f.spread_class = 128; }), kBad);
    for (const std::size_t n : {1u, 2u, 4u}) {
        EXPECT_EQ(changed([&](HandMade& f) { f.table_cut = n; }), kBad) << n;
        EXPECT_EQ(changed([&](HandMade& f) { f.unit_cut = n; }), kBad) << n;
        EXPECT_EQ(changed([&](HandMade& f) { f.table_more = n; }), kBad) << n;
        EXPECT_EQ(changed([&](HandMade& f) { f.unit_more = n; }), kBad) << n;
    }
    EXPECT_EQ(changed([](HandMade& f) { f.table_cut = 100; }), kBad);  // not even states
}

// Whatever a file has bytes for.
TEST(CalibrationFile, ATokenTableHasAtMostAGibibyte) {
    TokenTable table;
    table.features = 1 << 12;
    table.vocabulary = 1 << 18;
    EXPECT_TRUE(check_shape(table).ok());
    table.vocabulary += 1;
    EXPECT_EQ(check_shape(table).code(), ErrorCode::kLimitExceeded);
}

// Equal values cost nothing: 132 bytes would stand for any number of them.
TEST(CalibrationFile, ABlockHasAtMost64ValuesPerByte) {
    EXPECT_EQ(changed([](HandMade& f) { f.vocabulary = 132 * 32; }), ErrorCode::kOk);
    EXPECT_EQ(changed([](HandMade& f) { f.vocabulary = 132 * 32 + 1; }), ErrorCode::kLimitExceeded);
    EXPECT_EQ(changed([](HandMade& f) { f.vocabulary = (1 << 22) + 1; }), ErrorCode::kLimitExceeded);
    // A row's own word stands for 128 entries.
    const Layout wide = make_layout(1, {{1, 512}, {1, 512}}, Dtype::kBf16, RopePairing::kNone);
    CalibrationData data = make_calibration_data(wide, {{1, 1}});
    EXPECT_EQ(written(data), ErrorCode::kOk);
    std::fill(data.units[0].transform.entries.begin(), data.units[0].transform.entries.end(),
              std::int16_t{0});
    EXPECT_EQ(written(data), ErrorCode::kLimitExceeded);
}

// ---- arithmetic ----

TEST(Projection, SumsAtTheBoundsDoNotOverflow) {
    const kernels::Ops& ops = kernels::scalar_ops();
    // 65024 in one row, against the most negative features: the largest sum that the rules allow.
    std::vector<std::int16_t> matrix = {32512, 32512};
    std::vector<std::int16_t> features = {-32768, -32768};
    for (const std::uint8_t shift : {std::uint8_t{4}, std::uint8_t{23}}) {
        std::int32_t sums = 7;
        const kernels::PackedMatrix packed = kernels::pack_matrix(matrix, 1, 2);
        ops.project({features.data(), 2, 2, matrix.data(), &packed, &shift, 1, 1, &sums, 1});
        const std::int64_t exact = (std::int64_t{65024} * -32768 + (std::int64_t{1} << (shift - 1))) >> shift;
        EXPECT_EQ(sums, 7 + exact);
    }
}

// ---- analysis ----

std::shared_ptr<const Calibration> with_transforms(CalibrationData data,
                                                   const std::function<void(ShiftedMatrix&)>& change) {
    for (CalibrationUnit& unit : data.units) change(unit.transform);
    const auto made = Calibration::read(calibration_bytes(data));
    EXPECT_TRUE(made.ok()) << made.status().message();
    return made.value();
}

TEST(KltAnalysis, UndoesTheTransformWithinTheLimitsOfMatrices) {
    const kernels::Ops& ops = kernels::scalar_ops();
    const auto calibration = Calibration::read(find_case("klt2-tokens-t64").calibration).value();
    const auto analysis = KltAnalysis::make(calibration);
    ASSERT_TRUE(analysis.ok()) << analysis.status().message();
    for (std::size_t u = 0; u < calibration->data().units.size(); ++u) {
        const ShiftedMatrix& transform = calibration->data().units[u].transform;
        const ShiftedMatrix& inverse = analysis.value()->matrix(u);
        const std::size_t n = transform.inputs;
        ASSERT_EQ(inverse.entries.size(), n * n);
        for (std::size_t o = 0; o < n; ++o) {
            std::uint32_t norm = 0;
            for (std::size_t i = 0; i < n; ++i)
                norm += static_cast<std::uint32_t>(std::abs(int{inverse.entries[o * n + i]}));
            EXPECT_LE(norm, CalibrationLimits::kRowNorm);
            EXPECT_GE(inverse.shifts[o], CalibrationLimits::kShiftMin);
            EXPECT_LE(inverse.shifts[o], CalibrationLimits::kShiftMax);
        }
        // 250 of each coefficient come back, from states that are rounded to integers.
        for (std::size_t j = 0; j < n; ++j) {
            std::vector<std::int16_t> states(n);
            double largest = 0;
            for (std::size_t o = 0; o < n; ++o) {
                const double state = std::ldexp(250.0 * transform.entries[o * n + j], -transform.shifts[o]);
                states[o] = static_cast<std::int16_t>(std::lround(state));
                largest = std::max(largest, std::abs(state));
            }
            ASSERT_LT(largest, 32000);
            std::vector<std::int32_t> sums(n, 99);
            analysis.value()->multiply(ops, u, states.data(), 1, n, sums.data());
            for (std::size_t k = 0; k < n; ++k) {
                const float coefficient = static_cast<float>(sums[k]) * analysis.value()->fraction(u);
                EXPECT_NEAR(coefficient, k == j ? 250 : 0, 1) << "unit " << u << ", " << j << " to " << k;
            }
        }
    }
}

TEST(KltAnalysis, TransformsWithoutAnInverseAreRefused) {
    const CalibrationData data = Calibration::read(find_case("klt2-tokens-t64").calibration).value()->data();
    const auto same_rows = with_transforms(data, [](ShiftedMatrix& m) {
        std::copy_n(m.entries.begin(), m.inputs, m.entries.begin() + static_cast<std::ptrdiff_t>(m.inputs));
        m.shifts[1] = m.shifts[0];
    });
    EXPECT_EQ(KltAnalysis::make(same_rows).status().code(), ErrorCode::kBadArgument);
    const auto nothing =
        with_transforms(data, [](ShiftedMatrix& m) { std::fill_n(m.entries.begin(), m.inputs, 0); });
    EXPECT_EQ(KltAnalysis::make(nothing).status().code(), ErrorCode::kBadArgument);
}

TEST(Projection, IsExactInOddShapesAndWithZerosBehind) {
    const kernels::Ops& ops = kernels::scalar_ops();
    std::uint64_t state = 12345;
    const auto next = [&](int most) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        return static_cast<std::int16_t>(static_cast<int>(state >> 40) % (2 * most + 1) - most);
    };
    for (const std::size_t outputs : {1u, 7u, 33u, 300u}) {
        for (const std::size_t inputs : {1u, 8u, 31u}) {
            for (const std::size_t tokens : {1u, 4u, 5u}) {
                const std::size_t stride = inputs + 3;
                std::vector<std::int16_t> rows(outputs * inputs), features(tokens * stride);
                std::vector<std::uint8_t> shifts;
                for (std::size_t o = 0; o < outputs; ++o)
                    shifts.push_back(static_cast<std::uint8_t>(4 + o % 20));
                for (auto& m : rows) m = next(2000);
                for (std::size_t t = 0; t < tokens; ++t) {
                    for (std::size_t i = 0; i < inputs; ++i)
                        features[t * stride + i] = i % 7 > t ? std::int16_t{0} : next(32767);
                }
                std::vector<std::int32_t> sums(tokens * (outputs + 1), 5);
                const kernels::PackedMatrix packed = kernels::pack_matrix(rows, outputs, inputs);
                ops.project({features.data(), stride, inputs, rows.data(), &packed, shifts.data(), outputs,
                             tokens, sums.data(), outputs + 1});
                for (std::size_t t = 0; t < tokens; ++t) {
                    for (std::size_t o = 0; o < outputs; ++o) {
                        std::int64_t exact = 1 << (shifts[o] - 1);
                        for (std::size_t i = 0; i < inputs; ++i)
                            exact += rows[o * inputs + i] * features[t * stride + i];
                        ASSERT_EQ(sums[t * (outputs + 1) + o], 5 + (exact >> shifts[o]));
                    }
                    ASSERT_EQ(sums[t * (outputs + 1) + outputs], 5);
                }
            }
        }
    }
}

}  // namespace
}  // namespace kvcast::test
