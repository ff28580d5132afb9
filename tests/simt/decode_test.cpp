// decode_batch against the CPU decoder, bit for bit: the conformance vectors, every output type, paged rows,
// and damaged blocks.
#include <gtest/gtest.h>

#include <functional>
#include <random>

#include "codec/entropy/block_reader.h"
#include "kernels/cuda/tasks.h"
#include "tests/chunks.h"
#include "tests/simt/device_batch.h"

namespace kvcast::test {
namespace {

std::vector<std::uint8_t> raw(const Cache& cache) {
    std::vector<std::uint8_t> out;
    for (const auto& plane : cache.planes) out.insert(out.end(), plane.begin(), plane.end());
    return out;
}

using Chunks = std::vector<std::unique_ptr<DeviceChunk>>;

Chunks chunks_of(std::span<const std::uint8_t> file, const DeviceOptions& options) {
    Chunks chunks;
    for (const auto object : objects_of(file))
        chunks.push_back(std::make_unique<DeviceChunk>(object, options));
    return chunks;
}

// A file's planes as the vectors hold them: the rows of all its chunks in order.
std::vector<std::uint8_t> joined(const Chunks& chunks) {
    std::vector<std::uint8_t> out;
    const Layout& layout = chunks.front()->header().layout;
    for (std::size_t i = 0; i < layout.layers * layout.planes.size(); ++i) {
        for (const auto& c : chunks) {
            const auto rows = c->plane(i);
            out.insert(out.end(), rows.begin(), rows.end());
        }
    }
    return out;
}

void expect_sound(const BatchResult& result, const Chunks& chunks) {
    EXPECT_EQ(result.failure, "");
    EXPECT_EQ(result.status, std::vector<std::uint32_t>(result.status.size(), 0));
    for (const auto& c : chunks) EXPECT_TRUE(c->intact());
}

class DeviceGolden : public testing::TestWithParam<Case> {
  protected:
    void TearDown() override { set_order(0); }
};

TEST_P(DeviceGolden, DecodesToTheCommittedValues) {
    const auto file = load_vector(GetParam().name + ".kvc");
    for (std::size_t order = 0; order < orders(); ++order) {
        set_order(order);
        const Chunks chunks = chunks_of(file, {.calibration = GetParam().options.calibration});
        expect_sound(decode_on_device(chunks), chunks);
        EXPECT_EQ(joined(chunks), load_vector(GetParam().name + ".raw"));
    }
}

TEST_P(DeviceGolden, DecodesToPagesAtAnotherPosition) {
    if (GetParam().layout.rope.pairing == RopePairing::kNone) return;
    const auto file = load_vector(GetParam().name + ".kvc");
    for (const Rows rows : {Rows::kPaged, Rows::kPagedHeadsOutside}) {
        const Chunks chunks =
            chunks_of(file, {.move = 1000, .rows = rows, .calibration = GetParam().options.calibration});
        expect_sound(decode_on_device(chunks), chunks);
        EXPECT_EQ(joined(chunks), load_vector(GetParam().name + ".moved.raw"));
    }
}

TEST_P(DeviceGolden, ConvertsLikeTheCpuDecoder) {
    const auto file = load_vector(GetParam().name + ".kvc");
    for (const Dtype dtype : {Dtype::kBf16, Dtype::kF16, Dtype::kF32}) {
        const Chunks chunks =
            chunks_of(file, {.dtype = dtype, .calibration = GetParam().options.calibration});
        expect_sound(decode_on_device(chunks), chunks);
        Status status;
        EXPECT_EQ(joined(chunks),
                  raw(decode(file, {.dtype = dtype, .calibration = GetParam().options.calibration}, status)));
        EXPECT_TRUE(status.ok()) << status.message();
    }
}

TEST_P(DeviceGolden, DecodesInPartsToTheCommittedValues) {
    const auto file = load_vector(GetParam().name + ".kvc");
    const Chunks chunks = chunks_of(file, {.calibration = GetParam().options.calibration});
    for (const auto& chunk : chunks) {
        const BatchResult result = decode_in_parts(chunk);
        EXPECT_EQ(result.failure, "");
        EXPECT_EQ(result.status, std::vector<std::uint32_t>(result.status.size(), 0));
        EXPECT_TRUE(chunk->intact());
    }
    EXPECT_EQ(joined(chunks), load_vector(GetParam().name + ".raw"));
}

INSTANTIATE_TEST_SUITE_P(Vectors, DeviceGolden, testing::ValuesIn(conformance_cases()), case_name);

// A server captures its steps once.
TEST(DeviceGraphs, DecodeAsOftenAsTheyAreLaunched) {
    for (const char* name : {"delta5-two-chunks", "klt2-two-chunks"}) {
        const auto file = load_vector(std::string(name) + ".kvc");
        const Chunks chunks = chunks_of(file, {.calibration = case_of(name).options.calibration});
        expect_sound(decode_on_device(chunks, 3), chunks);
        EXPECT_EQ(joined(chunks), load_vector(std::string(name) + ".raw"));
    }
}

// ---- batches and damage

// Bytes of planes where a CPU decodes blocks whose checksums are not looked at.
struct CpuBlocks {
    std::vector<bool> sound;                        // [layer][block]
    std::vector<std::vector<std::uint8_t>> planes;  // [layer][plane]
};

CpuBlocks decode_blocks(std::span<const std::uint8_t> object) {
    auto opened = ChunkDecoder::open(object);
    EXPECT_TRUE(opened.ok()) << opened.status().message();
    const ChunkHeader& h = opened.value().header();
    const std::size_t per_layer = h.layout.planes.size();
    CpuBlocks out;
    const HostPlanes host(h, h.layout.dtype, h.layout.layers);
    DecodeWorkspace workspace;
    for (std::size_t layer = 0; layer < h.layout.layers; ++layer) {
        for (std::size_t b = 0; b < h.blocks_per_layer(); ++b) {
            out.sound.push_back(
                opened.value()
                    .decode_block(layer, b, host.planes().subspan(layer * per_layer, per_layer), workspace)
                    .ok());
        }
    }
    out.planes = host.bytes();
    return out;
}

// Whatever the bytes: the same verdict and the same values as the CPU, and not a byte outside.
void expect_like_cpu(std::span<const std::vector<std::uint8_t>> objects) {
    Chunks chunks;
    for (const auto& o : objects) chunks.push_back(std::make_unique<DeviceChunk>(o, DeviceOptions{}));
    const BatchResult result = decode_on_device(chunks);
    ASSERT_EQ(result.failure, "");
    std::size_t at = 0;
    for (std::size_t i = 0; i < chunks.size(); ++i) {
        const CpuBlocks cpu = decode_blocks(objects[i]);
        for (const bool sound : cpu.sound) EXPECT_EQ(result.status[at++] == 0, sound) << "block " << at - 1;
        for (std::size_t p = 0; p < cpu.planes.size(); ++p) EXPECT_EQ(chunks[i]->plane(p), cpu.planes[p]);
        EXPECT_TRUE(chunks[i]->intact());
    }
    EXPECT_EQ(at, result.status.size());
}

std::vector<std::vector<std::uint8_t>> copies(const std::string& name) {
    const auto file = load_vector(name + ".kvc");
    std::vector<std::vector<std::uint8_t>> out;
    for (const auto o : objects_of(file)) out.emplace_back(o.begin(), o.end());
    return out;
}

constexpr const char* kDamaged[] = {"delta1-anchor-t15",  "delta2-fp16-t64",      "delta3-t5",
                                    "delta5-blocks-of-1", "delta5-blocks-of-2",   "delta7-odd-t100",
                                    "lossless-fp32-t1",   "lossless-blocks-of-4", "lossless-fp16-t64",
                                    "delta3-special",     "delta6-latent-t50"};

// Bodies of whole octets of groups and what is left of them, which the committed vectors are too short for:
// every profile, classes with and without raw bits, some with more than fit into a byte. Warps store the
// first layout's rows themselves, up to 256 tokens, and not the second one's.
void decode_octets_of(const Layout& layout) {
    std::vector<std::vector<std::uint8_t>> objects;
    const auto add = [&](std::size_t tokens, Content content, const EncodeOptions& options) {
        Case c = {"octets", layout, tokens, content, options, 1024};
        const auto file = encode(make_cache(c), c);
        objects.emplace_back(file.begin(), file.end());
    };
    for (const std::size_t tokens : {255, 256, 555}) {
        EncodeOptions options;
        options.profile = Profile::kLossless;
        options.sinks = 0;
        add(tokens, Content::kGaussian, options);
        options.profile = Profile::kDelta;
        options.level = 1;
        for (const double step : {2.0, 0.5, 0.125, 1.0 / 64}) {
            options.layer_steps = {step, step};
            options.sinks = tokens == 256 ? 0 : 4;
            for (const Predictor predictor : {Predictor::kMean, Predictor::kAnchor}) {
                options.predictor = predictor;
                for (const Content content : {Content::kGaussian, Content::kOutliers, Content::kZero})
                    add(tokens, content, options);
            }
        }
    }
    expect_like_cpu(objects);
    for (auto& o : objects) o[o.size() - 33] ^= 16;
    expect_like_cpu(objects);
}

// Chunks of 256 tokens and of more, as most are: with raw bits, without, and elements.
TEST(DeviceOctets, DecodesWholeOnes) {
    std::vector<std::vector<std::uint8_t>> objects;
    for (const std::size_t tokens : {256, 300}) {
        for (const double step : {0.0, 1.5, 0.1}) {
            EncodeOptions options;
            options.profile = step == 0 ? Profile::kLossless : Profile::kDelta;
            options.level = step == 0 ? 0 : 1;
            if (step != 0) options.layer_steps = {step, step};
            Case c = {"whole", make_layout(1, {{2, 16}, {1, 16}}, Dtype::kBf16, RopePairing::kHalf),
                      tokens,  Content::kGaussian,
                      options, 1024};
            const auto file = encode(make_cache(c), c);
            objects.emplace_back(file.begin(), file.end());
        }
    }
    expect_like_cpu(objects);
}

TEST(DeviceOctets, DecodesWhatTheCpuDecodes) {
    decode_octets_of(make_layout(1, {{2, 32}, {1, 48}}, Dtype::kBf16, RopePairing::kHalf));
    decode_octets_of(make_layout(1, {{2, 16}, {1, 24}}, Dtype::kBf16, RopePairing::kHalf));
}

// So many that a block of threads has fewer warps.
TEST(DeviceOctets, DecodesHeadsOfManyChannels) {
    EncodeOptions options;
    options.block_heads = 1;
    const Case c = {"broad", make_layout(1, {{3, 4096}}, Dtype::kBf16, RopePairing::kNone), 9,
                    Content::kGaussian, options};
    const auto file = encode(make_cache(c), c);
    expect_like_cpu(std::vector<std::vector<std::uint8_t>>{{file.begin(), file.end()}});
}

TEST(DeviceDamage, DecodesABatchOfEverythingAtOnce) {
    std::vector<std::vector<std::uint8_t>> objects;
    for (const Case& c : uncalibrated_cases()) {
        for (auto& o : copies(c.name)) objects.push_back(std::move(o));
    }
    expect_like_cpu(objects);
}

TEST(DeviceDamage, FindsWhatTheCpuFindsInFlippedBits) {
    std::mt19937 random(1);
    for (const char* name : kDamaged) {
        auto objects = copies(name);
        for (auto& o : objects) {
            const std::size_t header = read_header(o).value().header_bytes;
            for (int i = 0; i < 3; ++i) {
                std::uint8_t& byte = o[header + random() % (o.size() - header)];
                byte = static_cast<std::uint8_t>(byte ^ 1u << random() % 8);
            }
        }
        SCOPED_TRACE(name);
        expect_like_cpu(objects);
    }
}

TEST(DeviceDamage, FindsWhatTheCpuFindsInNoise) {
    std::mt19937 random(2);
    for (const char* name : kDamaged) {
        for (const unsigned ones : {0u, 255u, 128u}) {
            auto objects = copies(name);
            for (auto& o : objects) {
                const std::size_t header = read_header(o).value().header_bytes;
                for (std::size_t i = header; i < o.size(); ++i)
                    o[i] = static_cast<std::uint8_t>(ones == 128 ? random() : ones);
            }
            SCOPED_TRACE(name);
            expect_like_cpu(objects);
        }
    }
}

TEST(DeviceDamage, LeavesTheOtherBlocksOfABatchAlone) {
    auto objects = copies("delta5-blocks-of-1");
    for (auto& o : copies("lossless-blocks-of-4")) objects.push_back(o);
    const ChunkHeader h = read_header(objects[0]).value();
    ASSERT_GT(h.block_bytes.size(), 2u);
    std::fill_n(objects[0].begin() + static_cast<std::ptrdiff_t>(h.header_bytes + h.block_bytes[0]),
                h.block_bytes[1], std::uint8_t{0xff});
    Chunks chunks;
    for (const auto& o : objects) chunks.push_back(std::make_unique<DeviceChunk>(o, DeviceOptions{}));
    const BatchResult result = decode_on_device(chunks);
    for (std::size_t i = 0; i < result.status.size(); ++i) EXPECT_EQ(result.status[i] != 0, i == 1) << i;
    expect_like_cpu(objects);
}

TEST(DeviceDamage, SaysWhichBlockIsCorruptAsTheCpuDoes) {
    const auto objects = copies("delta5-blocks-of-1");
    const DeviceChunk chunk(objects[0], {});
    const device::ChunkSource source = chunk.source();
    const auto plan = device::DecodePlan::make({&source, 1});
    ASSERT_TRUE(plan.ok());
    std::vector<std::uint32_t> words(plan.value().blocks());
    EXPECT_TRUE(plan.value().batch_status(words).ok());
    words[3] = kernels::cuda::kNotClosed;
    const Status status = plan.value().batch_status(words);
    EXPECT_EQ(status.code(), ErrorCode::kCorruptBlock);
    EXPECT_NE(status.message().find("the coder does not end in its first state"), std::string::npos);
}

// A damaged klt chunk between two sound chunks: the CPU's verdict, and sound neighbours.
void expect_klt_like_cpu(const std::string& name,
                         const std::function<void(std::span<std::uint8_t>)>& damage) {
    const Case c = case_of(name);
    auto object = copies(name)[0];
    const auto neighbour = copies("delta3-t5")[0];
    const auto sound = object;
    damage(std::span(object).subspan(read_header(object).value().header_bytes));
    ASSERT_TRUE(repair_chunk(object));

    Chunks chunks;
    const DeviceOptions options = {.calibration = c.options.calibration};
    chunks.push_back(std::make_unique<DeviceChunk>(sound, options));
    chunks.push_back(std::make_unique<DeviceChunk>(object, options));
    chunks.push_back(std::make_unique<DeviceChunk>(neighbour, DeviceOptions{}));
    const BatchResult result = decode_on_device(chunks);
    ASSERT_EQ(result.failure, "");
    const std::size_t layers = c.layout.layers;
    const auto faults = [&](std::size_t begin, std::size_t end) {
        return std::any_of(result.status.begin() + static_cast<std::ptrdiff_t>(begin),
                           result.status.begin() + static_cast<std::ptrdiff_t>(end),
                           [](auto w) { return w != 0; });
    };
    Status status;
    const DecodeOptions cpu = {.calibration = c.options.calibration};
    const Cache damaged = decode(object, cpu, status);
    EXPECT_EQ(faults(layers, 2 * layers), !status.ok()) << status.message();
    EXPECT_FALSE(faults(0, layers) || faults(2 * layers, result.status.size()));
    for (const auto& chunk : chunks) EXPECT_TRUE(chunk->intact());
    Status good;
    const Cache whole = decode(sound, cpu, good), other = decode(neighbour, {}, good);
    for (std::size_t i = 0; i < whole.planes.size(); ++i) EXPECT_EQ(chunks[0]->plane(i), whole.planes[i]);
    for (std::size_t i = 0; i < other.planes.size(); ++i) EXPECT_EQ(chunks[2]->plane(i), other.planes[i]);
    for (std::size_t i = 0; status.ok() && i < damaged.planes.size(); ++i)
        EXPECT_EQ(chunks[1]->plane(i), damaged.planes[i]);
}

constexpr const char* kDamagedKlt[] = {"klt1-t33", "klt1-unequal-parts", "klt2-latent", "klt3-t1",
                                       "klt3-tail"};

TEST(DeviceDamage, GivesTheCpusVerdictOnFlippedBitsOfKlt) {
    std::mt19937 random(3);
    for (const char* name : kDamagedKlt) {
        for (int round = 0; round < 3; ++round) {
            SCOPED_TRACE(name);
            expect_klt_like_cpu(name, [&](std::span<std::uint8_t> payload) {
                std::uint8_t& byte = payload[random() % payload.size()];
                byte = static_cast<std::uint8_t>(byte ^ 1u << random() % 8);
            });
        }
    }
}

TEST(DeviceDamage, GivesTheCpusVerdictOnNoiseInKlt) {
    std::mt19937 random(4);
    for (const char* name : kDamagedKlt) {
        for (const int ones : {0, 255, -1}) {
            SCOPED_TRACE(name);
            expect_klt_like_cpu(name, [&](std::span<std::uint8_t> payload) {
                for (auto& b : payload)
                    b = static_cast<std::uint8_t>(ones < 0 ? static_cast<int>(random() % 256) : ones);
            });
        }
    }
}

TEST(DeviceDamage, TakesKltChunksAsTheyAre) {
    for (const char* name : kDamagedKlt) expect_klt_like_cpu(name, [](std::span<std::uint8_t>) {});
}

// ---- what a plan refuses

class DevicePlan : public testing::Test {
  protected:
    DevicePlan() : objects_(copies("delta3-t5")), chunk_(objects_[0], {}), source_(chunk_.source()) {
        targets_.assign(source_.planes.begin(), source_.planes.end());
        source_.planes = targets_;
    }

    ErrorCode code() const { return device::DecodePlan::make({&source_, 1}).status().code(); }

    std::vector<std::vector<std::uint8_t>> objects_;
    DeviceChunk chunk_;
    device::ChunkSource source_;
    std::vector<device::DevicePlane> targets_;
};

TEST_F(DevicePlan, TakesASoundChunk) {
    EXPECT_EQ(code(), ErrorCode::kOk);
}

TEST_F(DevicePlan, TakesNoChunks) {
    const auto plan = device::DecodePlan::make({});
    ASSERT_TRUE(plan.ok());
    EXPECT_EQ(plan.value().blocks(), 0u);
    EXPECT_EQ(decode_on_device({}).failure, "");
}

TEST_F(DevicePlan, RefusesAPayloadThatIsTooShortOrMisaligned) {
    --source_.payload_bytes;
    EXPECT_EQ(code(), ErrorCode::kTruncated);
    ++source_.payload_bytes;
    source_.payload = static_cast<const std::uint8_t*>(source_.payload) + 1;
    EXPECT_EQ(code(), ErrorCode::kBadArgument);
}

TEST_F(DevicePlan, RefusesPlanesThatDoNotFit) {
    source_.planes = source_.planes.subspan(1);
    EXPECT_EQ(code(), ErrorCode::kBadArgument);
}

TEST_F(DevicePlan, RefusesMisalignedRows) {
    targets_[0].rows = static_cast<std::uint8_t*>(targets_[0].rows) + 1;
    EXPECT_EQ(code(), ErrorCode::kBadArgument);
    targets_[0] = chunk_.source().planes[0];
    targets_[1].row_bytes += 1;
    EXPECT_EQ(code(), ErrorCode::kBadArgument);
}

TEST_F(DevicePlan, RefusesAMisalignedBlockTable) {
    const std::array<std::int32_t, 2> pages = {};
    targets_[0].page_tokens = 16;
    targets_[0].pages =
        reinterpret_cast<const std::int32_t*>(reinterpret_cast<const char*>(pages.data()) + 1);
    EXPECT_EQ(code(), ErrorCode::kBadArgument);
}

TEST_F(DevicePlan, IsNotDecodedInMisalignedMemory) {
    const auto plan = device::DecodePlan::make({&source_, 1});
    ASSERT_TRUE(plan.ok());
    const auto at = [](std::uintptr_t address) { return reinterpret_cast<void*>(address); };
    const auto outcome = [&](void* image, void* workspace, void* status) {
        return device::decode_batch(plan.value(), image, workspace, static_cast<std::uint32_t*>(status),
                                    nullptr);
    };
    EXPECT_EQ(outcome(at(4096 + 16), at(8192), at(16384)), cudaErrorInvalidValue);
    EXPECT_EQ(outcome(at(4096), at(8192 + 128), at(16384)), cudaErrorInvalidValue);
    EXPECT_EQ(outcome(at(4096), at(8192), at(16384 + 2)), cudaErrorInvalidValue);
}

TEST_F(DevicePlan, RefusesPagesOfNoTokens) {
    const std::int32_t page = 0;
    targets_[0].pages = &page;
    EXPECT_EQ(code(), ErrorCode::kBadArgument);
}

TEST(DevicePlanOfKlt, NeedsItsCalibrationOnBothSides) {
    const Case c = case_of("klt1-t33"), other = case_of("klt2-latent");
    const auto object = copies(c.name)[0];
    const DeviceChunk chunk(object, {.calibration = c.options.calibration});
    device::ChunkSource source = chunk.source();
    const auto code = [&] { return device::DecodePlan::make({&source, 1}).status().code(); };
    EXPECT_EQ(code(), ErrorCode::kOk);
    source.calibration_bytes = static_cast<const std::byte*>(source.calibration_bytes) + 16;
    EXPECT_EQ(code(), ErrorCode::kBadArgument);
    source.calibration_bytes = nullptr;
    EXPECT_EQ(code(), ErrorCode::kBadArgument);
    source.calibration = nullptr;
    EXPECT_EQ(code(), ErrorCode::kMissingCalibration);
    const device::CalibrationImage wrong(other.options.calibration);
    source.calibration = &wrong;
    EXPECT_EQ(code(), ErrorCode::kWrongCalibration);
}

}  // namespace
}  // namespace kvcast::test
