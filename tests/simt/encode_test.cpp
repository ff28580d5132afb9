// encode_batch against the CPU encoder, byte for byte.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <numeric>
#include <random>

#include "codec/device.h"
#include "tests/codec/synthetic_calibration.h"
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

// A calibration with its inverses, both on the device; nothing where there is none.
class Images {
  public:
    explicit Images(const std::shared_ptr<const Calibration>& calibration) {
        if (calibration == nullptr) return;
        calibration_ = std::make_unique<device::CalibrationImage>(calibration);
        auto analysis = device::AnalysisImage::make(calibration);
        EXPECT_TRUE(analysis.ok()) << analysis.status().message();
        analysis_ = std::make_unique<device::AnalysisImage>(std::move(analysis.value()));
        calibration_bytes_ = aligned(calibration_->bytes());
        analysis_bytes_ = aligned(analysis_->bytes());
    }

    device::KltOnDevice on_device() const {
        if (calibration_ == nullptr) return {};
        return {calibration_.get(), calibration_bytes_->data(), analysis_.get(), analysis_bytes_->data()};
    }

  private:
    std::unique_ptr<device::CalibrationImage> calibration_;
    std::unique_ptr<device::AnalysisImage> analysis_;
    std::optional<DeviceBytes> calibration_bytes_, analysis_bytes_;
};

// All chunks of a case in one batch; `file` is what the CPU makes of them. `spare` is how much payload there
// is beyond what the CPU's chunks need.
std::vector<Result<std::vector<std::uint8_t>>> encode_on_device(const Case& c,
                                                                std::span<const std::uint8_t> file,
                                                                bool paged, std::ptrdiff_t spare,
                                                                unsigned runs = 1) {
    const Cache cache = make_cache(c);
    std::vector<std::unique_ptr<Source>> sources;
    std::vector<device::ChunkToEncode> chunks;
    Hash parent = {};
    std::size_t first = 0;
    for (const auto object : objects_of(file)) {
        const ChunkHeader h = read_header(object).value();
        const auto ids = std::span(cache.ids).subspan(first, h.tokens);
        const ChunkInput input = {&cache.layout,    "test model", "", ids, first, c.base_position, parent, {},
                                  h.klt.tail_tokens};
        sources.push_back(std::make_unique<Source>(
            cache, first, h.tokens, input, paged,
            static_cast<std::size_t>(static_cast<std::ptrdiff_t>(h.payload_bytes()) + spare)));
        chunks.push_back(sources.back()->chunk());
        parent = h.chain;
        first += h.tokens;
    }
    const Images images(c.options.calibration);
    const auto made = device::EncodePlan::make(chunks, c.options, images.on_device());
    EXPECT_TRUE(made.ok()) << made.status().message();
    const device::EncodePlan& plan = made.value();
    const DeviceBytes image = aligned(plan.image()), workspace(plan.workspace_bytes()),
                      report(plan.report_bytes());
    const auto encode = [&](cudaStream_t stream) {
        return device::encode_batch(plan, image.data(), workspace.data(), report.data(), stream);
    };
    const auto forget = [&] {
        for (const auto& s : sources) s->payload().forget();
        report.forget();
    };
    EXPECT_EQ(run_captured(encode, runs, forget), "");
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

void expect_bytes(const Case& c, std::span<const std::uint8_t> expected, bool paged, unsigned runs = 1) {
    std::vector<std::uint8_t> file;
    for (const auto& object : encode_on_device(c, expected, paged, 0, runs)) {
        ASSERT_TRUE(object.ok()) << object.status().message();
        file.insert(file.end(), object.value().begin(), object.value().end());
    }
    EXPECT_TRUE(std::ranges::equal(file, expected)) << file.size() << " bytes, " << expected.size();
}

void expect_committed_bytes(const Case& c, bool paged) {
    expect_bytes(c, load_vector(c.name + ".kvc"), paged);
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

TEST(DeviceEncodingGraphs, EncodeAsOftenAsTheyAreLaunched) {
    for (const char* name : {"delta5-two-chunks", "klt2-two-chunks"})
        expect_bytes(case_of(name), load_vector(std::string(name) + ".kvc"), false, 3);
}

INSTANTIATE_TEST_SUITE_P(Vectors, DeviceEncoding, testing::ValuesIn(conformance_cases()), case_name);

// ---- delta and lossless beyond the vectors: batches of 256 tokens, whole, and one after another

class LongEncoding : public testing::TestWithParam<Case> {};

TEST_P(LongEncoding, WritesWhatTheCpuWrites) {
    const Case& c = GetParam();
    const auto expected = encode(make_cache(c), c);
    for (const bool paged : {false, true}) expect_bytes(c, expected, paged);
}

std::vector<Case> long_cases() {
    using enum RopePairing;
    const Layout halves = make_layout(1, {{2, 16}, {1, 10}}, Dtype::kBf16, kHalf);
    const Layout odd = make_layout(1, {{1, 22}, {1, 7}}, Dtype::kBf16, kInterleaved);
    const Layout wide = make_layout(1, {{1, 264}, {1, 264}}, Dtype::kBf16, kHalf);
    const Layout bands = make_layout(1, {{2, 96}, {1, 128}}, Dtype::kBf16, kHalf);
    const Layout broad = make_layout(1, {{1, 144}, {1, 200}}, Dtype::kBf16, kHalf);
    const Layout fp16 = make_layout(1, {{1, 18}, {1, 18}}, Dtype::kF16, kHalf);
    const Layout fp32 = make_layout(1, {{1, 18}, {1, 18}}, Dtype::kF32, kNone);
    std::vector<Case> out;
    const auto add = [&](const char* layout_name, const Layout& layout, std::size_t tokens, Content content) {
        for (const char* profile : {"Lossless", "Fine", "Coarse", "Anchored"}) {
            Case c = {fmt::format("{}{}{}", profile, layout_name, tokens), layout, tokens, content};
            const bool lossless = profile == std::string("Lossless"), fine = profile == std::string("Fine");
            c.options.profile = lossless ? Profile::kLossless : Profile::kDelta;
            c.options.level = lossless ? 0 : fine ? 1 : 6;
            if (profile == std::string("Anchored")) c.options.predictor = Predictor::kAnchor;
            c.chunk = tokens;
            out.push_back(c);
        }
    };
    add("Halves", halves, 256, Content::kGaussian);
    add("Halves", halves, 260, Content::kOutliers);
    add("Odd", odd, 245, Content::kGaussian);
    add("Odd", odd, 261, Content::kGaussian);
    add("Odd", odd, 523, Content::kOutliers);
    add("Wide", wide, 36, Content::kGaussian);
    add("Broad", broad, 37, Content::kOutliers);
    add("Bands", bands, 254, Content::kOutliers);
    add("Bands", bands, 40, Content::kGaussian);
    add("Half", fp16, 300, Content::kGaussian);
    add("Single", fp32, 300, Content::kGaussian);
    add("Special", halves, 257, Content::kSpecial);
    add("Constant", halves, 258, Content::kConstant);
    return out;
}

INSTANTIATE_TEST_SUITE_P(Cases, LongEncoding, testing::ValuesIn(long_cases()), case_name);

// ---- klt beyond the vectors

struct KltShape {
    std::string name;
    Layout layout;
    std::size_t tokens;
    CalibrationShape calibration;
    Content content = Content::kGaussian;
    std::size_t chunk = 256;
    unsigned tail_level = 0;
    std::size_t sinks = 1;
};

class KltEncoding : public testing::TestWithParam<KltShape> {};

// Bytes as the CPU writes them, at every level.
TEST_P(KltEncoding, WritesWhatTheCpuWrites) {
    const KltShape& shape = GetParam();
    Case c = {shape.name, shape.layout, shape.tokens, shape.content};
    c.chunk = shape.chunk;
    c.vocabulary = 900;
    c.options.profile = Profile::kKlt;
    c.options.calibration = make_calibration(shape.layout, shape.calibration);
    c.options.tail_level = shape.tail_level;
    c.options.sinks = shape.sinks;
    for (unsigned level = 1; level <= 3; ++level) {
        c.options.level = level;
        expect_bytes(c, encode(make_cache(c), c), level == 2);
    }
}

std::vector<KltShape> klt_shapes() {
    using enum RopePairing;
    const Layout narrow = make_layout(2, {{2, 16}, {2, 16}}, Dtype::kBf16, kHalf);
    const Layout wide = make_layout(3, {{3, 50}, {1, 130}}, Dtype::kF16, kInterleaved);
    const Layout parts = make_layout(2, {{4, 33}, {2, 21}}, Dtype::kF32, kNone);
    const Layout single = make_layout(2, {{1, 2}, {1, 1}}, Dtype::kBf16, kHalf);
    return {
        {"TailWithinASlice", narrow, 140, {{1, 1}, 6, 2}, Content::kGaussian, 135, 1},
        {"TailOfAllTokens", narrow, 4, {{1, 1}}, Content::kGaussian, 256, 3},
        {"SeveralTiles", wide, 70, {{1, 1}, 10, 4}},
        {"Parts", parts, 65, {{2, 2}, 4, 0}},
        {"OneChannel", single, 33, {{1, 1}}},
        {"ChunksOfUnequalLength", narrow, 100, {{1, 1}}, Content::kGaussian, 64},
        {"OutliersBesideSinks", narrow, 70, {{1, 1}}, Content::kOutliers, 40, 1, 4},
        {"SpecialValues", parts, 66, {{4, 2}}, Content::kSpecial},
        {"SinksOnly", narrow, 3, {{1, 1}}, Content::kGaussian, 256, 0, 4},
        {"NoSinks", narrow, 32, {{1, 1}}, Content::kConstant, 256, 0, 0},
    };
}

INSTANTIATE_TEST_SUITE_P(Shapes, KltEncoding, testing::ValuesIn(klt_shapes()),
                         [](const auto& tested) { return tested.param.name; });

TEST(DeviceEncodingLimits, SaysThatAPayloadDidNotFitAndWritesNothingBehindIt) {
    for (const char* name : {"delta5-blocks-of-2", "klt2-two-chunks"}) {
        const auto objects =
            encode_on_device(case_of(name), load_vector(std::string(name) + ".kvc"), false, -2);
        for (const auto& object : objects) EXPECT_EQ(object.status().code(), ErrorCode::kBufferTooSmall);
    }
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

TEST(DeviceEncodingLimits, WantsTheCalibrationOfItsOptions) {
    Case c = case_of("klt1-t33");
    const Cache cache = make_cache(c);
    const ChunkInput input = {&cache.layout, "test model", "", cache.ids, 0, c.base_position, {}, {}, 0};
    const Source source(cache, 0, cache.ids.size(), input, false, 64);
    const device::ChunkToEncode chunk = source.chunk();
    const Images images(c.options.calibration), others(case_of("klt2-latent").options.calibration);
    const auto code = [&](const device::KltOnDevice& klt) {
        return device::EncodePlan::make({&chunk, 1}, c.options, klt).status().code();
    };
    EXPECT_EQ(code(images.on_device()), ErrorCode::kOk);
    EXPECT_EQ(code({}), ErrorCode::kMissingCalibration);
    EXPECT_EQ(code(others.on_device()), ErrorCode::kWrongCalibration);
    device::KltOnDevice elsewhere = images.on_device();
    elsewhere.analysis_bytes = nullptr;
    EXPECT_EQ(code(elsewhere), ErrorCode::kBadArgument);
    c.options.level = 4;
    EXPECT_EQ(code(images.on_device()), ErrorCode::kBadArgument);
    c.options.calibration = nullptr;
    EXPECT_EQ(code(images.on_device()), ErrorCode::kMissingCalibration);
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
