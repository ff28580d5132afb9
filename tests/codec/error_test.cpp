// Damage is found, and named.
#include <gtest/gtest.h>

#include <array>
#include <cstring>

#include "tests/codec/synthetic.h"

namespace kvcast::test {
namespace {

Case small_case() {
    Case c = {
        "", make_layout(2, {{1, 8}, {1, 8}}, Dtype::kBf16, RopePairing::kHalf), 12, Content::kGaussian, {}};
    c.options.sinks = 1;
    return c;
}

std::vector<std::uint8_t> small_file() {
    const Case c = small_case();
    return encode(make_cache(c.layout, c.tokens, c.content), c);
}

ErrorCode outcome(std::span<const std::uint8_t> file, const DecodeOptions& options = {}) {
    Status status;
    decode(file, options, status);
    EXPECT_EQ(status.ok(), status.message().empty());
    return status.code();
}

// Makes the header's checksum right again after a change.
void repair(std::vector<std::uint8_t>& file) {
    std::uint32_t length = 0;
    std::memcpy(&length, file.data() + 8, 4);
    const std::uint32_t crc = crc32(std::span(file).first(length - 4));
    std::memcpy(file.data() + length - 4, &crc, 4);
}

TEST(Damage, EveryTruncationIsNamed) {
    const auto file = small_file();
    for (std::size_t length = 1; length < file.size(); ++length) {
        const ErrorCode code = outcome(std::span(file).first(length));
        ASSERT_TRUE(code == ErrorCode::kTruncated) << length << ": " << error_name(code);
    }
}

TEST(Damage, EverySingleBitFlipIsFound) {
    const auto file = small_file();
    for (std::size_t bit = 0; bit < file.size() * 8; ++bit) {
        auto flipped = file;
        flipped[bit / 8] ^= static_cast<std::uint8_t>(1u << (bit % 8));
        ASSERT_NE(outcome(flipped), ErrorCode::kOk) << "bit " << bit;
    }
}

TEST(Damage, BlockBitFlipsBehindARepairedChecksumAreHarmless) {
    const auto file = small_file();
    const std::size_t header = read_header(file).value().header_bytes;
    std::size_t found = 0;
    std::size_t total = 0;
    for (std::size_t bit = header * 8; bit < file.size() * 8; bit += 3, ++total) {
        auto flipped = file;
        flipped[bit / 8] ^= static_cast<std::uint8_t>(1u << (bit % 8));
        ChunkHeader h = read_header(file).value();
        std::size_t at = header;
        for (std::size_t l = 0; l < h.layout.layers; ++l) {
            h.layer_crc[l] = crc32(std::span(flipped).subspan(at, h.layer_payload_bytes(l)));
            at += h.layer_payload_bytes(l);
        }
        const auto rewritten = write_header(h);
        ASSERT_TRUE(rewritten.ok());
        std::copy(rewritten.value().begin(), rewritten.value().end(), flipped.begin());
        const ErrorCode code = outcome(flipped);
        found += code == ErrorCode::kCorruptBlock;
        ASSERT_TRUE(code == ErrorCode::kCorruptBlock || code == ErrorCode::kOk) << error_name(code);
    }
    EXPECT_GT(found, total / 2);  // raw bits of exact rows carry no redundancy of their own
}

TEST(Damage, ForeignBytesAreNotAChunk) {
    const std::string text = "GIF89a, and then some more bytes";
    EXPECT_EQ(outcome({reinterpret_cast<const std::uint8_t*>(text.data()), text.size()}),
              ErrorCode::kBadMagic);
}

TEST(Damage, AFutureVersionIsRefused) {
    auto file = small_file();
    file[4] = 2;
    repair(file);
    EXPECT_EQ(outcome(file), ErrorCode::kUnsupportedVersion);
}

TEST(Damage, AnUnknownProfileIsRefused) {
    auto file = small_file();
    file[12] = 3;
    repair(file);
    EXPECT_EQ(outcome(file), ErrorCode::kUnsupportedProfile);
}

TEST(Damage, AnAbsurdHeaderLengthIsRefused) {
    auto file = small_file();
    file[11] = 0x7f;
    EXPECT_EQ(outcome(file), ErrorCode::kLimitExceeded);
}

// A size that is right in 64 bits and two bytes in 32.
TEST(Damage, ABlockCannotClaimMoreThanFourGiB) {
    ChunkHeader h;
    h.profile = Profile::kLossless;
    h.layout.layers = 1;
    h.layout.planes = {{1024, 1}};
    h.tokens = ChunkLimits::kTokens;
    h.token_ids.assign(h.tokens, 7);
    h.block_heads = 1024;
    h.planes.resize(1);
    h.block_bytes = {0xfffffffe};
    const std::array<std::uint8_t, 2> payload = {1, 2};
    h.layer_crc = {crc32(payload)};
    std::vector<std::uint8_t> file = write_header(h).value();
    EXPECT_TRUE(read_header(file).ok());
    // Half of the size in five bytes, the layer's checksum, the header's.
    file[file.size() - 13] = 0x81;
    for (std::size_t i = 12; i > 9; --i) file[file.size() - i] = 0x80;
    file[file.size() - 9] = 0x08;
    repair(file);
    file.insert(file.end(), payload.begin(), payload.end());
    EXPECT_EQ(read_header(file).status().code(), ErrorCode::kBadHeader);
    EXPECT_EQ(outcome(file), ErrorCode::kBadHeader);
}

TEST(Damage, AChangedHeaderByteBreaksItsChecksum) {
    auto file = small_file();
    file[20] ^= 1;
    EXPECT_EQ(outcome(file), ErrorCode::kHeaderChecksum);
}

TEST(Damage, EveryHeaderByteChangeBehindARepairedChecksumIsRefusedOrHarmless) {
    const auto file = small_file();
    const std::size_t header = read_header(file).value().header_bytes;
    for (std::size_t at = 12; at + 4 < header; ++at) {
        for (const unsigned value : {0u, 1u, 0x7fu, 0x80u, 0xffu}) {
            auto changed = file;
            changed[at] = static_cast<std::uint8_t>(value);
            repair(changed);
            const Result<ChunkHeader> h = read_header(changed);
            if (h.ok() && h.value().tokens * h.value().layout.values_per_token() < 1 << 22)
                (void)outcome(changed);
        }
    }
}

TEST(Damage, AChangedBlockByteBreaksItsLayersChecksum) {
    auto file = small_file();
    file.back() ^= 0x10;
    EXPECT_EQ(outcome(file), ErrorCode::kBlockChecksum);
}

TEST(Damage, RopelessChunksDoNotMove) {
    Case c = small_case();
    c.layout.rope = {};
    const auto file = encode(make_cache(c.layout, c.tokens, c.content), c);
    EXPECT_EQ(outcome(file, {{}, 7}), ErrorCode::kBadArgument);
}

TEST(Damage, ChunksThatDoNotFollowEachOtherAreNamed) {
    Case c = small_case();
    c.chunk = 6;
    const auto file = encode(make_cache(c.layout, c.tokens, c.content), c);
    const ChunkHeader first = read_header(file).value();
    ChunkHeader second =
        read_header(std::span(file).subspan(first.header_bytes + first.payload_bytes())).value();
    EXPECT_TRUE(check_consecutive(first, second).ok());
    EXPECT_EQ(check_consecutive(first, first).code(), ErrorCode::kNotConsecutive);
    second.parent[0] ^= 1;
    EXPECT_EQ(check_consecutive(first, second).code(), ErrorCode::kBrokenChain);
    second.model = "another";
    EXPECT_EQ(check_consecutive(first, second).code(), ErrorCode::kNotConsecutive);
}

TEST(Arguments, ThatDoNotFitAreRefused) {
    const Case c = small_case();
    const Cache cache = make_cache(c.layout, c.tokens, c.content);
    SerialExecutor serial;
    std::vector<std::uint8_t> object;
    Hash chain = {};
    const auto rows = cache.rows(0);
    const ChunkInput good = {&cache.layout, "m", "", cache.ids, 0, 0, {}, rows};
    const auto code = [&](const ChunkInput& input, const EncodeOptions& o) {
        return ChunkEncoder(o).encode(input, serial, object, chain).code();
    };
    EXPECT_EQ(code(good, {}), ErrorCode::kOk);
    EncodeOptions bad;
    bad.level = 8;
    EXPECT_EQ(code(good, bad), ErrorCode::kBadArgument);
    bad = {};
    bad.layer_steps = {1, 1};
    EXPECT_EQ(code(good, bad), ErrorCode::kBadArgument);
    bad.layer_steps = {1, 1, 1, -1};
    EXPECT_EQ(code(good, bad), ErrorCode::kBadArgument);
    ChunkInput input = good;
    input.token_ids = {};
    EXPECT_EQ(code(input, {}), ErrorCode::kBadArgument);
    input = good;
    input.planes = input.planes.first(3);
    EXPECT_EQ(code(input, {}), ErrorCode::kBadArgument);
    input = good;
    input.base_position = ChunkLimits::kPosition + 1;
    EXPECT_EQ(code(input, {}), ErrorCode::kLimitExceeded);
    // More values than a block may hold are refused before anything is coded.
    const Layout wide = make_layout(1, {{32, 128}, {32, 128}}, Dtype::kBf16, RopePairing::kNone);
    const std::vector<std::int32_t> ids(ChunkLimits::kTokens);
    const std::vector<PlaneRows> nowhere(2);
    EncodeOptions one_block;
    one_block.block_heads = 64;
    EXPECT_EQ(code({&wide, "m", "", ids, 0, 0, {}, nowhere}, one_block), ErrorCode::kLimitExceeded);
    const auto decoder = ChunkDecoder::open(object);
    ASSERT_TRUE(decoder.ok());
    std::vector<DecodeWorkspace> none;
    EXPECT_EQ(decoder.value().decode({}, serial, none).code(), ErrorCode::kBadArgument);
}

}  // namespace
}  // namespace kvcast::test
