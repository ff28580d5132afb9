// encode_batch against the CPU encoder, byte for byte.
#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <numeric>
#include <random>

#include "codec/device.h"
#include "tests/simt/device_batch.h"

namespace kvcast::test {
namespace {

constexpr std::size_t kPageTokens = 8;
constexpr std::size_t kSlot = 3;

// One chunk of a cache on its way through the device.
class Source {
  public:
    // Rows from `first` on, contiguous or paged.
    Source(const Cache& cache, std::size_t first, std::size_t count, const ChunkInput& input, bool paged,
           std::size_t capacity)
        : input_(input), payload_(capacity) {
        for (std::size_t i = 0; i < cache.planes.size(); ++i) {
            const std::size_t row_bytes = cache.row_bytes(i);
            const auto rows = std::span(cache.planes[i]).subspan(first * row_bytes, count * row_bytes);
            paged ? add_pages(rows, row_bytes, i) : add_rows(rows, row_bytes);
        }
    }

    device::ChunkToEncode chunk() const { return {input_, planes_, payload_.data(), payload_.size()}; }
    const DeviceBytes& payload() const { return payload_; }

  private:
    void add_rows(std::span<const std::uint8_t> rows, std::size_t row_bytes) {
        memory_.push_back(to_device(rows));
        planes_.push_back({.rows = memory_.back().data(), .row_bytes = row_bytes});
    }

    void add_pages(std::span<const std::uint8_t> rows, std::size_t row_bytes, std::size_t seed) {
        const std::size_t tokens = rows.size() / row_bytes;
        std::vector<std::int32_t> pages((kSlot + tokens + kPageTokens - 1) / kPageTokens);
        std::iota(pages.begin(), pages.end(), 0);
        std::shuffle(pages.begin(), pages.end(), std::mt19937(static_cast<unsigned>(seed)));
        std::vector<std::uint8_t> memory(pages.size() * kPageTokens * row_bytes, 0x77);
        for (std::size_t t = 0; t < tokens; ++t) {
            const std::size_t s = kSlot + t;
            const std::size_t row =
                static_cast<std::size_t>(pages[s / kPageTokens]) * kPageTokens + s % kPageTokens;
            std::memcpy(memory.data() + row * row_bytes, rows.data() + t * row_bytes, row_bytes);
        }
        memory_.push_back(to_device<std::int32_t>(pages));
        const auto* table = reinterpret_cast<const std::int32_t*>(memory_.back().data());
        memory_.push_back(to_device<std::uint8_t>(memory));
        planes_.push_back({.rows = memory_.back().data(),
                           .row_bytes = row_bytes,
                           .pages = table,
                           .page_tokens = kPageTokens,
                           .page_bytes = kPageTokens * row_bytes,
                           .slot = kSlot});
    }

    ChunkInput input_;
    std::vector<DeviceBytes> memory_;
    std::vector<device::DevicePlane> planes_;
    DeviceBytes payload_;
};

// All chunks of a case in one batch. `spare` is how much payload there is beyond what the CPU's chunks need.
std::vector<Result<std::vector<std::uint8_t>>> encode_on_device(const Case& c, bool paged,
                                                                std::ptrdiff_t spare) {
    const Cache cache = make_cache(c);
    const auto file = load_vector(c.name + ".kvc");
    std::vector<std::unique_ptr<Source>> sources;
    std::vector<device::ChunkToEncode> chunks;
    Hash parent = {};
    std::size_t first = 0;
    for (const auto object : objects_of(file)) {
        const ChunkHeader h = read_header(object).value();
        const auto ids = std::span(cache.ids).subspan(first, h.tokens);
        const ChunkInput input = {&cache.layout,   "test model", "", ids, first,
                                  c.base_position, parent,       {}, 0};
        sources.push_back(std::make_unique<Source>(
            cache, first, h.tokens, input, paged,
            static_cast<std::size_t>(static_cast<std::ptrdiff_t>(h.payload_bytes()) + spare)));
        chunks.push_back(sources.back()->chunk());
        parent = h.chain;
        first += h.tokens;
    }
    const auto made = device::EncodePlan::make(chunks, c.options);
    EXPECT_TRUE(made.ok()) << made.status().message();
    const device::EncodePlan& plan = made.value();
    const DeviceBytes image = aligned(plan.image()), workspace(plan.workspace_bytes()),
                      report(plan.report_bytes());
    const cudaError_t error =
        device::encode_batch(plan, image.data(), workspace.data(), report.data(), nullptr);
    const std::string failure = finish();
    EXPECT_EQ(failure, "");
    EXPECT_EQ(error, cudaSuccess);
    EXPECT_TRUE(image.intact() && workspace.intact() && report.intact());
    std::vector<Result<std::vector<std::uint8_t>>> objects;
    for (std::size_t i = 0; i < sources.size(); ++i) {
        EXPECT_TRUE(sources[i]->payload().intact());
        const auto bytes = sources[i]->payload().read();
        objects.push_back(plan.object(i, report.read(),
                                      {reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size()}));
    }
    return objects;
}

void expect_committed_bytes(const Case& c, bool paged) {
    std::vector<std::uint8_t> file;
    for (const auto& object : encode_on_device(c, paged, 0)) {
        ASSERT_TRUE(object.ok()) << object.status().message();
        file.insert(file.end(), object.value().begin(), object.value().end());
    }
    EXPECT_EQ(file, load_vector(c.name + ".kvc"));
}

class DeviceEncoding : public testing::TestWithParam<Case> {
  protected:
    void TearDown() override { set_order(0); }
};

TEST_P(DeviceEncoding, WritesTheCommittedBytes) {
    for (std::size_t order = 0; order < orders(); ++order) {
        set_order(order);
        expect_committed_bytes(GetParam(), false);
    }
}

TEST_P(DeviceEncoding, WritesTheCommittedBytesFromPages) {
    expect_committed_bytes(GetParam(), true);
}

INSTANTIATE_TEST_SUITE_P(Vectors, DeviceEncoding, testing::ValuesIn(uncalibrated_cases()), case_name);

TEST(DeviceEncodingLimits, SaysThatAPayloadDidNotFitAndWritesNothingBehindIt) {
    for (const auto& object : encode_on_device(case_of("delta5-blocks-of-2"), false, -2))
        EXPECT_EQ(object.status().code(), ErrorCode::kBufferTooSmall);
}

TEST(DeviceEncodingLimits, PlansNoMoreThanTheGreatestPayload) {
    const Case c = case_of("lossless-fp16-special");
    const Cache cache = make_cache(c);
    const ChunkInput input = {&cache.layout, "test model", "", cache.ids, 0, c.base_position, {}, {}, 0};
    const auto most = device::EncodePlan::greatest_payload(input, c.options);
    ASSERT_TRUE(most.ok());
    EXPECT_GE(most.value(), load_vector(c.name + ".kvc").size());
    ChunkInput nothing = input;
    nothing.token_ids = {};
    EXPECT_EQ(device::EncodePlan::greatest_payload(nothing, c.options).status().code(),
              ErrorCode::kBadArgument);
}

TEST(DeviceEncodingLimits, LeavesKltToTheHost) {
    const Case c = case_of("klt1-t33");
    const Cache cache = make_cache(c);
    const ChunkInput input = {&cache.layout, "test model", "", cache.ids, 0, c.base_position, {}, {}, 0};
    const device::ChunkToEncode chunk = {input, {}, nullptr, 0};
    EXPECT_EQ(device::EncodePlan::make({&chunk, 1}, c.options).status().code(),
              ErrorCode::kUnsupportedProfile);
}

TEST(DeviceEncodingLimits, RefusesPlanesThatDoNotFit) {
    const Case c = case_of("delta3-t5");
    const Cache cache = make_cache(c);
    const ChunkInput input = {&cache.layout, "test model", "", cache.ids, 0, c.base_position, {}, {}, 0};
    const Source source(cache, 0, cache.ids.size(), input, false, 64);
    device::ChunkToEncode chunk = source.chunk();
    const auto code = [&] { return device::EncodePlan::make({&chunk, 1}, c.options).status().code(); };
    EXPECT_EQ(code(), ErrorCode::kOk);
    chunk.payload = static_cast<std::byte*>(chunk.payload) + 1;
    EXPECT_EQ(code(), ErrorCode::kBadArgument);
    chunk.payload = source.chunk().payload;
    chunk.planes = chunk.planes.subspan(1);
    EXPECT_EQ(code(), ErrorCode::kBadArgument);
}

TEST(DeviceEncodingLimits, EncodesNoChunks) {
    const auto made = device::EncodePlan::make({}, {});
    ASSERT_TRUE(made.ok());
    const DeviceBytes image = aligned(made.value().image()), rest(0);
    EXPECT_EQ(device::encode_batch(made.value(), image.data(), rest.data(), rest.data(), nullptr),
              cudaSuccess);
    EXPECT_EQ(finish(), "");
}

}  // namespace
}  // namespace kvcast::test
