// DeviceEncoder and DeviceDecoder against the CPU's, over the emulated runtime, whose streams do everything
// as late as they may.
#include "codec/device/coder.h"

#include <gtest/gtest.h>

#include <cstdlib>

#include "tests/chunks.h"
#include "tests/simt/device_batch.h"
#include "tests/simt/runtime.h"

namespace kvcast::test {
namespace {

using device::DeviceDecoder;
using device::DeviceEncoder;

// The chunk objects of a case, one after another.
std::vector<std::uint8_t> encode_on_device(const Case& c) {
    const Cache cache = make_cache(c);
    auto encoder = DeviceEncoder::open(c.options);
    EXPECT_TRUE(encoder.ok()) << encoder.status().message();
    std::vector<std::uint8_t> file, object;
    Hash chain = {};
    for (std::size_t first = 0; first < cache.ids.size(); first += c.chunk) {
        const auto ids = std::span(cache.ids).subspan(first, std::min(c.chunk, cache.ids.size() - first));
        const auto rows = cache.rows(first);
        const std::size_t tail = c.options.tail_level != 0 ? 5 : 0;
        const ChunkInput input = {&cache.layout,   "test model", "",   ids, first,
                                  c.base_position, chain,        rows, tail};
        const Status s = encoder.value().encode(input, object, chain);
        EXPECT_TRUE(s.ok()) << s.message();
        file.insert(file.end(), object.begin(), object.end());
    }
    return file;
}

void expect_like_cpu(const Case& c, const DecodeOptions& options) {
    auto decoder = DeviceDecoder::open(options);
    ASSERT_TRUE(decoder.ok()) << decoder.status().message();
    const auto file = load_vector(c.name + ".kvc");
    SerialExecutor serial;
    std::vector<DecodeWorkspace> workspaces(1);
    for (const auto object : objects_of(file)) {
        const auto cpu = ChunkDecoder::open(object, options);
        ASSERT_TRUE(cpu.ok());
        const ChunkHeader& h = cpu.value().header();
        for (std::size_t first = 0; first < h.layout.layers; first += 2) {
            const std::size_t end = first == 0 ? h.layout.layers : first + 1;
            const HostPlanes expected(h, cpu.value().dtype(), end - first),
                found(h, cpu.value().dtype(), end - first);
            ASSERT_TRUE(cpu.value().decode_layers(first, end, expected.planes(), serial, workspaces).ok());
            const Status s = decoder.value().decode_layers(object, first, end, found.planes());
            ASSERT_TRUE(s.ok()) << s.message();
            EXPECT_EQ(found.bytes(), expected.bytes()) << "layers " << first << " to " << end;
        }
    }
}

class DeviceCoding : public testing::TestWithParam<Case> {};

TEST_P(DeviceCoding, EncodesFromHostMemoryToTheCommittedBytes) {
    EXPECT_EQ(encode_on_device(GetParam()), load_vector(GetParam().name + ".kvc"));
}

TEST_P(DeviceCoding, DecodesToHostMemoryAsTheCpuDoes) {
    expect_like_cpu(GetParam(), {.calibration = GetParam().options.calibration});
}

INSTANTIATE_TEST_SUITE_P(Vectors, DeviceCoding, testing::ValuesIn(conformance_cases()), case_name);

TEST(DeviceCoder, ConvertsAndMovesAsTheCpuDoes) {
    for (const char* name : {"delta5-two-chunks", "klt2-two-chunks"}) {
        const Case c = case_of(name);
        expect_like_cpu(c,
                        {.dtype = Dtype::kF32, .base_position = 12345, .calibration = c.options.calibration});
    }
}

TEST(DeviceCoder, DecodesStraightIntoPages) {
    const Case c = case_of("klt2-two-chunks");
    const auto file = load_vector(c.name + ".kvc");
    auto decoder = DeviceDecoder::open({.calibration = c.options.calibration});
    ASSERT_TRUE(decoder.ok());
    for (const auto object : objects_of(file)) {
        const DeviceChunk pages(object, {.rows = Rows::kPaged, .calibration = c.options.calibration});
        const DeviceChunk rows(object, {.calibration = c.options.calibration});
        for (const DeviceChunk* target : {&pages, &rows}) {
            const Status s = decoder.value().decode(object, [&](const ChunkHeader&) {
                const auto planes = target->source().planes;
                return std::vector(planes.begin(), planes.end());
            });
            ASSERT_TRUE(s.ok()) << s.message();
            EXPECT_TRUE(target->intact());
        }
        for (std::size_t i = 0; i < rows.source().planes.size(); ++i)
            EXPECT_EQ(pages.plane(i), rows.plane(i));
    }
}

TEST(DeviceCoder, NamesDamageAsTheCpuDoesAndGoesOn) {
    for (const char* name : {"delta1-bf16-t33", "klt2-tokens-t64"}) {
        const Case c = case_of(name);
        const auto sound = load_vector(c.name + ".kvc");
        auto decoder = DeviceDecoder::open({.calibration = c.options.calibration});
        ASSERT_TRUE(decoder.ok());
        const ChunkHeader h = read_header(sound).value();
        const HostPlanes out(h, h.layout.dtype, h.layout.layers);
        const auto code = [&](std::span<const std::uint8_t> object, std::size_t end) {
            return decoder.value()
                .decode_layers(object, 0, end, out.planes().first(end * h.layout.planes.size()))
                .code();
        };
        auto damaged = sound;
        damaged.back() ^= 1;
        EXPECT_EQ(code(damaged, h.layout.layers), ErrorCode::kBlockChecksum);
        EXPECT_EQ(code(damaged, 1), ErrorCode::kOk);  // only the last layer is damaged
        EXPECT_EQ(code(std::span(sound).first(sound.size() - 2), h.layout.layers), ErrorCode::kTruncated);
        EXPECT_EQ(code(std::span(sound).first(sound.size() - 2), 1), ErrorCode::kOk);
        EXPECT_EQ(code(std::span(sound).first(20), h.layout.layers), ErrorCode::kTruncated);
        EXPECT_EQ(code(sound, h.layout.layers), ErrorCode::kOk);
    }
}

// A block whose checksum holds and whose data does not.
TEST(DeviceCoder, FindsWhatChecksumsDoNot) {
    for (const char* name : {"delta1-bf16-t33", "klt2-tokens-t64"}) {
        const Case c = case_of(name);
        auto object = load_vector(c.name + ".kvc");
        const ChunkHeader h = read_header(object).value();
        object[h.header_bytes] ^= 1;  // of a coder's state
        ASSERT_TRUE(repair_chunk(object));
        auto decoder = DeviceDecoder::open({.calibration = c.options.calibration});
        const HostPlanes out(h, h.layout.dtype, h.layout.layers);
        EXPECT_EQ(decoder.value().decode_layers(object, 0, h.layout.layers, out.planes()).code(),
                  ErrorCode::kCorruptBlock);
    }
}

TEST(DeviceCoder, AsksForItsCalibration) {
    const Case c = case_of("klt1-t33");
    const auto file = load_vector(c.name + ".kvc");
    auto decoder = DeviceDecoder::open({});
    ASSERT_TRUE(decoder.ok());
    const ChunkHeader h = read_header(file).value();
    const HostPlanes out(h, h.layout.dtype, h.layout.layers);
    const auto code = [&] {
        return decoder.value().decode_layers(file, 0, h.layout.layers, out.planes()).code();
    };
    EXPECT_EQ(code(), ErrorCode::kMissingCalibration);
    ASSERT_TRUE(decoder.value().set_calibration(case_of("klt2-latent").options.calibration).ok());
    EXPECT_EQ(code(), ErrorCode::kWrongCalibration);
    ASSERT_TRUE(decoder.value().set_calibration(c.options.calibration).ok());
    EXPECT_EQ(code(), ErrorCode::kOk);
    EncodeOptions options = c.options;
    options.calibration = nullptr;
    EXPECT_EQ(DeviceEncoder::open(options).status().code(), ErrorCode::kMissingCalibration);
}

TEST(DeviceCoder, SaysThatThereIsNoDevice) {
    ::setenv("SIMT_DEVICES", "0", 1);
    const Status encoder = DeviceEncoder::open({}).status(), decoder = DeviceDecoder::open({}).status();
    ::unsetenv("SIMT_DEVICES");
    EXPECT_EQ(encoder.code(), ErrorCode::kNoDevice);
    EXPECT_EQ(decoder.code(), ErrorCode::kNoDevice);
    EXPECT_NE(decoder.message().find("no CUDA-capable device"), std::string::npos) << decoder.message();
}

TEST(DeviceCoder, SaysThatMemoryIsUsedUpAndGoesOnWhenThereIsSome) {
    const Case c = case_of("delta1-bf16-t33");
    const auto file = load_vector(c.name + ".kvc");
    const ChunkHeader h = read_header(file).value();
    const HostPlanes out(h, h.layout.dtype, h.layout.layers);
    auto decoder = DeviceDecoder::open({});
    ASSERT_TRUE(decoder.ok());
    const auto code = [&] {
        return decoder.value().decode_layers(file, 0, h.layout.layers, out.planes()).code();
    };
    simt::set_device_limit(20000);
    EXPECT_EQ(code(), ErrorCode::kDevice);
    simt::set_device_limit(~std::size_t{0});
    EXPECT_EQ(code(), ErrorCode::kOk);
}

void expect_committed_values(const Case& c) {
    const auto file = load_vector(c.name + ".kvc");
    std::vector<std::unique_ptr<DeviceChunk>> chunks;
    chunks.push_back(
        std::make_unique<DeviceChunk>(file, DeviceOptions{.calibration = c.options.calibration}));
    EXPECT_EQ(decode_on_device(chunks).failure, "");
    std::vector<std::uint8_t> decoded;
    for (std::size_t i = 0; i < c.layout.layers * c.layout.planes.size(); ++i) {
        const auto plane = chunks[0]->plane(i);
        decoded.insert(decoded.end(), plane.begin(), plane.end());
    }
    EXPECT_EQ(decoded, load_vector(c.name + ".raw"));
}

// Chains ask for more shared memory than some devices give: waves decode there, to the same values.
TEST(DeviceCoder, DecodesKltWhereSharedMemoryIsShort) {
    simt::set_most_shared(std::size_t{7} << 10);
    expect_committed_values(case_of("klt2-tokens-t64"));
    simt::set_most_shared(simt::kMostOptIn);
}

// The fewer multiprocessors there are, the more tokens a block of threads takes, as far as memory goes.
TEST(DeviceCoder, DecodesKltOnFewMultiprocessors) {
    simt::set_multiprocessors(1);
    for (const char* name : {"klt2-tokens-t64", "klt3-tail", "klt1-t33"})
        expect_committed_values(case_of(name));
    simt::set_most_shared(std::size_t{16} << 10);
    expect_committed_values(case_of("klt2-tokens-t64"));
    simt::set_most_shared(simt::kMostOptIn);
    simt::set_multiprocessors(simt::kMultiprocessors);
}

}  // namespace
}  // namespace kvcast::test
