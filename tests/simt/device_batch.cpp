#include "tests/simt/device_batch.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <numeric>
#include <random>

namespace kvcast::test {
namespace {

constexpr std::size_t kPageTokens = 8;
constexpr std::size_t kSlot = 5;  // of the chunk's first token in its first page
constexpr std::byte kUnwritten{0xa5};

}  // namespace

DeviceChunk::DeviceChunk(std::span<const std::uint8_t> object, const DeviceOptions& options)
    : options_(options) {
    auto read = read_header(object);
    EXPECT_TRUE(read.ok()) << read.status().message();
    header_ = std::move(read.value());
    payload_ = to_device(object.subspan(header_.header_bytes, header_.payload_bytes()));
    if (options.calibration != nullptr) {
        calibration_ = std::make_unique<device::CalibrationImage>(options.calibration);
        calibration_bytes_ = aligned(calibration_->bytes());
    }
    const std::size_t unit = kernels::dtype_bytes(options.dtype.value_or(header_.layout.dtype));
    for (std::size_t i = 0; i < header_.layout.layers * header_.layout.planes.size(); ++i) {
        planes_.push_back(make_plane(i, unit));
        targets_.push_back(planes_.back().target);
    }
}

DeviceChunk::Plane DeviceChunk::make_plane(std::size_t index, std::size_t unit) const {
    const PlaneShape& shape = header_.layout.planes[index % header_.layout.planes.size()];
    const std::size_t width = shape.width() * unit;
    Plane p;
    p.heads = shape.heads;
    p.head_bytes = shape.head_dim * unit;
    if (options_.rows == Rows::kContiguous) {
        p.memory.emplace(header_.tokens * width);
        p.target = {.rows = p.memory->data(), .row_bytes = width};
        return p;
    }
    p.page_list.resize((kSlot + header_.tokens + kPageTokens - 1) / kPageTokens);
    std::iota(p.page_list.begin(), p.page_list.end(), 0);
    std::shuffle(p.page_list.begin(), p.page_list.end(), std::mt19937(static_cast<unsigned>(index)));
    p.pages = to_device<std::int32_t>(p.page_list);
    p.memory.emplace(p.page_list.size() * kPageTokens * width);
    const bool outside = options_.rows == Rows::kPagedHeadsOutside;
    p.target = {.rows = p.memory->data(),
                .row_bytes = outside ? p.head_bytes : width,
                .head_bytes = outside ? p.head_bytes * kPageTokens : 0,
                .pages = reinterpret_cast<const std::int32_t*>(p.pages->data()),
                .page_tokens = kPageTokens,
                .page_bytes = kPageTokens * width,
                .slot = kSlot};
    return p;
}

device::ChunkSource DeviceChunk::source() const {
    return {.header = &header_,
            .payload = payload_->data(),
            .payload_bytes = payload_->size(),
            .planes = targets_,
            .dtype = options_.dtype,
            .base_position = header_.base_position + options_.move,
            .calibration = calibration_.get(),
            .calibration_bytes = calibration_bytes_ ? calibration_bytes_->data() : nullptr};
}

std::size_t DeviceChunk::offset(const Plane& p, std::size_t token, std::size_t head) const {
    const device::DevicePlane& t = p.target;
    const std::size_t head_bytes = t.head_bytes != 0 ? t.head_bytes : p.head_bytes;
    if (t.pages == nullptr) return token * t.row_bytes + head * head_bytes;
    const std::size_t s = t.slot + token;
    return static_cast<std::size_t>(p.page_list[s / t.page_tokens]) * t.page_bytes +
           s % t.page_tokens * t.row_bytes + head * head_bytes;
}

std::vector<std::uint8_t> DeviceChunk::plane(std::size_t index) const {
    const Plane& p = planes_[index];
    const std::vector<std::byte> memory = p.memory->read();
    std::vector<std::uint8_t> out;
    for (std::size_t t = 0; t < header_.tokens; ++t) {
        for (std::size_t h = 0; h < p.heads; ++h) {
            const auto* at = reinterpret_cast<const std::uint8_t*>(memory.data() + offset(p, t, h));
            out.insert(out.end(), at, at + p.head_bytes);
        }
    }
    return out;
}

bool DeviceChunk::intact() const {
    bool intact = payload_->intact();
    for (const Plane& p : planes_) {
        const std::vector<std::byte> memory = p.memory->read();
        std::vector<bool> ours(memory.size());
        for (std::size_t t = 0; t < header_.tokens; ++t) {
            for (std::size_t h = 0; h < p.heads; ++h)
                std::fill_n(ours.begin() + static_cast<std::ptrdiff_t>(offset(p, t, h)), p.head_bytes, true);
        }
        for (std::size_t i = 0; i < ours.size(); ++i) intact = intact && (ours[i] || memory[i] == kUnwritten);
        intact = intact && p.memory->intact() && (!p.pages || p.pages->intact());
    }
    return intact;
}

void DeviceChunk::forget() const {
    for (const Plane& p : planes_) p.memory->forget();
}

std::string run_captured(const std::function<cudaError_t(cudaStream_t)>& work, unsigned runs,
                         const std::function<void()>& forget) {
    if (std::string before = finish(); !before.empty())
        return before;  // memory is filled on the default stream
    cudaStream_t stream = nullptr;
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    cudaError_t error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    if (error == cudaSuccess) error = cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal);
    if (error == cudaSuccess) {
        const cudaError_t working = work(stream);
        error = cudaStreamEndCapture(stream, &graph);
        if (working != cudaSuccess) error = working;
    }
    if (error == cudaSuccess) error = cudaGraphInstantiate(&executable, graph, 0);
    for (unsigned run = 0; run < runs && error == cudaSuccess; ++run) {
        forget();
        error = cudaGraphLaunch(executable, stream);
        if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
    }
    const std::string failure = finish();
    if (executable != nullptr) cudaGraphExecDestroy(executable);
    if (graph != nullptr) cudaGraphDestroy(graph);
    cudaStreamDestroy(stream);
    return !failure.empty() || error == cudaSuccess ? failure : cudaGetErrorString(error);
}

namespace {

// Plans a batch and has it decoded by decode(plan, image, workspace, status), which says what went wrong.
template <typename Decode>
BatchResult plan_and_decode(std::span<const std::unique_ptr<DeviceChunk>> chunks, Decode decode) {
    std::vector<device::ChunkSource> sources;
    for (const auto& c : chunks) sources.push_back(c->source());
    const auto made = device::DecodePlan::make(sources);
    EXPECT_TRUE(made.ok()) << made.status().message();
    if (!made.ok()) return {};
    const device::DecodePlan& plan = made.value();
    const DeviceBytes image = aligned(plan.image());
    const DeviceBytes workspace(plan.workspace_bytes());
    const DeviceBytes status(plan.blocks() * sizeof(std::uint32_t));
    BatchResult result = {
        decode(plan, image.data(), workspace.data(), reinterpret_cast<std::uint32_t*>(status.data())),
        std::vector<std::uint32_t>(plan.blocks())};
    EXPECT_TRUE(image.intact() && workspace.intact() && status.intact());
    const auto after = image.read();
    EXPECT_TRUE(std::equal(plan.image().begin(), plan.image().end(), after.begin()));
    const auto words = status.read();
    if (!words.empty()) std::memcpy(result.status.data(), words.data(), words.size());
    return result;
}

}  // namespace

BatchResult decode_on_device(std::span<const std::unique_ptr<DeviceChunk>> chunks, unsigned runs) {
    const auto forget = [&] {
        for (const auto& c : chunks) c->forget();
    };
    return plan_and_decode(chunks, [&](const auto& plan, void* image, void* workspace, auto* status) {
        const auto decode = [&](cudaStream_t stream) {
            return device::decode_batch(plan, image, workspace, status, stream);
        };
        return run_captured(decode, runs, forget);
    });
}

BatchResult decode_in_parts(const std::unique_ptr<DeviceChunk>& chunk) {
    const ChunkHeader& h = chunk->header();
    const std::size_t unit = h.profile == Profile::kKlt ? h.klt.run_layers : 1;
    return plan_and_decode({&chunk, 1}, [&](const auto& plan, void* image, void* workspace, auto* status) {
        cudaError_t e = device::decode_begin(plan, image, workspace, nullptr);
        for (std::size_t first = 0; first < h.layout.layers && e == cudaSuccess; first += unit) {
            const std::size_t end = std::min(first + unit, h.layout.layers);
            e = device::decode_layers(plan, first, end, image, workspace, status, nullptr);
        }
        std::string failure = finish();
        EXPECT_EQ(e == cudaSuccess, failure.empty());
        return failure;
    });
}

DeviceBytes aligned(std::span<const std::byte> image) {
    std::vector<std::byte> padded(image.begin(), image.end());
    padded.resize((image.size() + device::kAlignment - 1) / device::kAlignment * device::kAlignment);
    return DeviceBytes(padded);
}

std::vector<std::uint8_t> load_vector(const std::string& name) {
    const char* elsewhere = std::getenv("KVCAST_VECTORS");  // where the program runs on another machine
    const std::string folder = elsewhere != nullptr ? elsewhere : KVCAST_VECTORS;
    std::ifstream in(folder + "/" + name, std::ios::binary);
    EXPECT_TRUE(in.good()) << name;
    return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

Case case_of(const std::string& name) {
    for (Case& c : conformance_cases()) {
        if (c.name == name) return std::move(c);
    }
    ADD_FAILURE() << name;
    return {};
}

std::vector<Case> uncalibrated_cases() {
    std::vector<Case> out;
    for (Case& c : conformance_cases()) {
        if (c.options.profile != Profile::kKlt) out.push_back(std::move(c));
    }
    return out;
}

std::string case_name(const testing::TestParamInfo<Case>& tested) {
    std::string name = tested.param.name;
    std::replace(name.begin(), name.end(), '-', '_');
    return name;
}

std::vector<std::span<const std::uint8_t>> objects_of(std::span<const std::uint8_t> file) {
    std::vector<std::span<const std::uint8_t>> objects;
    while (!file.empty()) {
        const auto header = read_header(file);
        EXPECT_TRUE(header.ok()) << header.status().message();
        if (!header.ok()) break;
        const std::size_t bytes = header.value().header_bytes + header.value().payload_bytes();
        objects.push_back(file.first(bytes));
        file = file.subspan(bytes);
    }
    return objects;
}

}  // namespace kvcast::test
