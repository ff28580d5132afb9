// bench_device: decode and encode speed on a GPU, per profile, level and batch size, beside the device's own
// memcpy. Every row's output is compared with the CPU decoder's before it is timed. Speed counts bytes of
// output, as bf16; what is timed is a captured CUDA graph of decode_batch or encode_batch, so that launches
// cost what they cost a server that captures its steps.
#include <cuda_runtime.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>

#include "bench/calibrations.h"
#include "codec/decoder.h"
#include "codec/device.h"
#include "codec/encoder.h"
#include "tools/common/calibration_file.h"
#include "tools/common/cli.h"
#include "tools/common/kv_file.h"

namespace {

using namespace kvcast;
using namespace kvcast::tools;

constexpr unsigned kWarmUps = 3;
constexpr std::size_t kMostValues = std::size_t{64} << 20;  // of a batch

void check(cudaError_t error) {
    if (error != cudaSuccess) throw Error(fmt::format("CUDA: {}", cudaGetErrorString(error)));
}

// ---- memory, streams, time

class DeviceBuffer {
  public:
    explicit DeviceBuffer(std::size_t bytes) : bytes_(bytes) {
        check(cudaMalloc(&data_, std::max<std::size_t>(bytes, 1)));
    }
    explicit DeviceBuffer(std::span<const std::byte> content) : DeviceBuffer(content.size()) {
        check(cudaMemcpy(data_, content.data(), content.size(), cudaMemcpyHostToDevice));
    }
    ~DeviceBuffer() { cudaFree(data_); }
    DeviceBuffer(DeviceBuffer&& other) noexcept
        : data_(std::exchange(other.data_, nullptr)), bytes_(other.bytes_) {}
    DeviceBuffer& operator=(DeviceBuffer&&) = delete;

    void* data() const { return data_; }
    std::size_t size() const { return bytes_; }
    std::vector<std::byte> read() const {
        std::vector<std::byte> out(bytes_);
        check(cudaMemcpy(out.data(), data_, bytes_, cudaMemcpyDeviceToHost));
        return out;
    }

  private:
    void* data_ = nullptr;
    std::size_t bytes_;
};

class Stream {
  public:
    Stream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
    ~Stream() { cudaStreamDestroy(stream_); }
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;

    cudaStream_t get() const { return stream_; }
    void wait() const { check(cudaStreamSynchronize(stream_)); }

  private:
    cudaStream_t stream_ = nullptr;
};

class Graph {
  public:
    // What `work` puts on the stream.
    template <typename Work>
    Graph(const Stream& stream, Work&& work) {
        cudaGraph_t graph = nullptr;
        check(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeGlobal));
        work();
        check(cudaStreamEndCapture(stream.get(), &graph));
        check(cudaGraphInstantiate(&executable_, graph, 0));
        check(cudaGraphDestroy(graph));
    }
    ~Graph() { cudaGraphExecDestroy(executable_); }
    Graph(const Graph&) = delete;
    Graph& operator=(const Graph&) = delete;

    void launch(const Stream& stream) const { check(cudaGraphLaunch(executable_, stream.get())); }

  private:
    cudaGraphExec_t executable_ = nullptr;
};

struct Times {
    double median = 0;  // seconds
    double least = 0;
};

Times time(const Stream& stream, const Graph& graph, unsigned repetitions) {
    cudaEvent_t begin = nullptr, end = nullptr;
    check(cudaEventCreate(&begin));
    check(cudaEventCreate(&end));
    std::vector<double> seconds;
    for (unsigned i = 0; i < kWarmUps + repetitions; ++i) {
        check(cudaEventRecord(begin, stream.get()));
        graph.launch(stream);
        check(cudaEventRecord(end, stream.get()));
        check(cudaEventSynchronize(end));
        float ms = 0;
        check(cudaEventElapsedTime(&ms, begin, end));
        if (i >= kWarmUps) seconds.push_back(static_cast<double>(ms) / 1000);
    }
    check(cudaEventDestroy(begin));
    check(cudaEventDestroy(end));
    std::sort(seconds.begin(), seconds.end());
    return {seconds[seconds.size() / 2], seconds.front()};
}

Times time_memcpy(const Stream& stream, std::size_t bytes, unsigned repetitions) {
    const DeviceBuffer from(bytes), to(bytes);
    const Graph graph(stream, [&] {
        check(cudaMemcpyAsync(to.data(), from.data(), bytes, cudaMemcpyDeviceToDevice, stream.get()));
    });
    return time(stream, graph, repetitions);
}

// ---- what is decoded

// A cache of one chunk in host memory.
struct Source {
    std::string name;
    Layout layout;
    std::string model;
    std::vector<std::int32_t> ids;
    std::uint64_t base_position = 0;
    std::vector<PlaneRows> planes;
    std::vector<std::vector<std::uint16_t>> memory;  // of synthetic planes
};

// 256 tokens of a model as wide as those of 8 billion parameters, which have 32 layers: 8 heads of 128
// channels, normal values with a mean and a spread per channel. Its ratio says nothing about real KV.
Source synthetic(std::string name, std::size_t layers) {
    Source s;
    s.name = std::move(name);
    s.layout.layers = layers;
    s.layout.planes = {{8, 128}, {8, 128}};
    s.layout.rope = {RopePairing::kHalf, 0, 128, geometric_frequencies(500000, 128)};
    s.model = "synthetic";
    s.ids.assign(256, 0);
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    for (std::size_t i = 0; i < s.layout.layers * 2; ++i) {
        auto& plane = s.memory.emplace_back(256 * 1024);
        for (std::size_t c = 0; c < 1024; ++c) {
            const float mean = normal(random), spread = std::exp(normal(random));
            for (std::size_t t = 0; t < 256; ++t)
                plane[t * 1024 + c] = kernels::to_bf16(mean + spread * normal(random));
        }
        s.planes.push_back({plane.data(), 1024 * sizeof(std::uint16_t)});
    }
    return s;
}

Source first_chunk(const KvInput& kv, const std::string& name) {
    const std::size_t tokens = std::min<std::size_t>(kv.token_ids().size(), 256);
    return {name,
            kv.layout(),
            kv.model(),
            {kv.token_ids().begin(), kv.token_ids().begin() + tokens},
            kv.base_position(),
            kv.rows(0),
            {}};
}

std::vector<std::uint8_t> encode(const Source& s, const EncodeOptions& options) {
    ChunkEncoder encoder(options);
    SerialExecutor serial;
    std::vector<std::uint8_t> object;
    Hash chain = {};
    const ChunkInput input = {&s.layout, s.model, "", s.ids, 0, s.base_position, {}, s.planes};
    if (const Status failed = encoder.encode(input, serial, object, chain); !failed.ok())
        throw Error(failed.message());
    return object;
}

// The planes [layer][plane] as a CPU decodes them to bf16, one after another.
std::vector<std::byte> decode_on_cpu(const std::vector<std::uint8_t>& object,
                                     const std::shared_ptr<const Calibration>& calibration) {
    auto opened = ChunkDecoder::open(object, {.dtype = Dtype::kBf16, .calibration = calibration});
    if (!opened.ok()) throw Error(opened.status().message());
    const ChunkHeader& h = opened.value().header();
    std::vector<std::byte> out(h.tokens * h.layout.values_per_token() * 2);
    std::vector<PlaneBuffer> buffers;
    std::size_t at = 0;
    for (std::size_t i = 0; i < h.layout.layers * h.layout.planes.size(); ++i) {
        const std::size_t row_bytes = h.layout.planes[i % h.layout.planes.size()].width() * 2;
        buffers.push_back({out.data() + at, row_bytes});
        at += h.tokens * row_bytes;
    }
    SerialExecutor serial;
    std::vector<DecodeWorkspace> workspaces(1);
    if (const Status s = opened.value().decode(buffers, serial, workspaces); !s.ok())
        throw Error(s.message());
    return out;
}

// The same chunk `count` times, each with its own payload and its own output.
class Batch {
  public:
    Batch(const std::vector<std::uint8_t>& object, std::size_t count, const device::KltOnDevice& klt)
        : header_(read_header(object).value()) {
        const auto payload = std::as_bytes(std::span(object).subspan(header_.header_bytes));
        const std::size_t planes = header_.layout.layers * header_.layout.planes.size();
        for (std::size_t i = 0; i < count; ++i) {
            payloads_.emplace_back(payload);
            outputs_.emplace_back(header_.tokens * header_.layout.values_per_token() * 2);
            auto& targets = targets_.emplace_back();
            auto* rows = static_cast<std::byte*>(outputs_.back().data());
            for (std::size_t p = 0; p < planes; ++p) {
                const std::size_t row_bytes =
                    header_.layout.planes[p % header_.layout.planes.size()].width() * 2;
                targets.push_back({.rows = rows, .row_bytes = row_bytes});
                rows += header_.tokens * row_bytes;
            }
        }
        std::vector<device::ChunkSource> sources;
        for (std::size_t i = 0; i < count; ++i) {
            sources.push_back({.header = &header_,
                               .payload = payloads_[i].data(),
                               .payload_bytes = payloads_[i].size(),
                               .planes = targets_[i],
                               .dtype = Dtype::kBf16,
                               .calibration = klt.calibration,
                               .calibration_bytes = klt.calibration_bytes});
        }
        auto made = device::DecodePlan::make(sources);
        if (!made.ok()) throw Error(made.status().message());
        plan_ = std::move(made.value());
        image_.emplace_back(plan_.image());
        workspace_.emplace_back(plan_.workspace_bytes());
        status_.emplace_back(plan_.blocks() * sizeof(std::uint32_t));
    }

    void decode(const Stream& stream) const {
        check(device::decode_batch(plan_, image_[0].data(), workspace_[0].data(),
                                   static_cast<std::uint32_t*>(status_[0].data()), stream.get()));
    }

    void verify(const std::vector<std::byte>& expected) const {
        const auto bytes = status_[0].read();
        std::vector<std::uint32_t> words(plan_.blocks());
        std::memcpy(words.data(), bytes.data(), bytes.size());
        if (const Status s = plan_.batch_status(words); !s.ok()) throw Error(s.message());
        for (const DeviceBuffer& output : outputs_) {
            if (output.read() != expected) throw Error("the device decodes other values than the CPU");
        }
    }

    std::size_t workspace_bytes() const { return plan_.workspace_bytes(); }

  private:
    ChunkHeader header_;
    std::vector<DeviceBuffer> payloads_;
    std::vector<DeviceBuffer> outputs_;
    std::vector<std::vector<device::DevicePlane>> targets_;
    device::DecodePlan plan_;
    std::vector<DeviceBuffer> image_, workspace_, status_;  // one each
};

// A calibration with its inverses, both on the device.
class Calibrated {
  public:
    explicit Calibrated(const std::shared_ptr<const Calibration>& calibration)
        : image_(calibration),
          analysis_(inverted(calibration)),
          image_bytes_(image_.bytes()),
          analysis_bytes_(analysis_.bytes()) {}

    device::KltOnDevice on_device() const {
        return {&image_, image_bytes_.data(), &analysis_, analysis_bytes_.data()};
    }

  private:
    static device::AnalysisImage inverted(const std::shared_ptr<const Calibration>& calibration) {
        auto made = device::AnalysisImage::make(calibration);
        if (!made.ok()) throw Error(made.status().message());
        return std::move(made.value());
    }

    device::CalibrationImage image_;
    device::AnalysisImage analysis_;
    DeviceBuffer image_bytes_, analysis_bytes_;
};

// The same chunk `count` times, each from its own rows to its own payload.
class EncodeBatch {
  public:
    EncodeBatch(const Source& source, const EncodeOptions& options, std::size_t count,
                const device::KltOnDevice& klt) {
        const ChunkInput input = {&source.layout,       source.model, "", source.ids, 0,
                                  source.base_position, {},           {}, 0};
        const auto capacity = device::EncodePlan::greatest_payload(input, options);
        if (!capacity.ok()) throw Error(capacity.status().message());
        std::vector<device::ChunkToEncode> chunks;
        for (std::size_t i = 0; i < count; ++i) {
            auto& planes = planes_.emplace_back();
            for (std::size_t p = 0; p < source.planes.size(); ++p) {
                const std::size_t width = source.layout.planes[p % source.layout.planes.size()].width() * 2;
                std::vector<std::byte> rows(source.ids.size() * width);
                for (std::size_t t = 0; t < source.ids.size(); ++t) {
                    const auto* row =
                        static_cast<const std::byte*>(source.planes[p].rows) + t * source.planes[p].row_bytes;
                    std::copy_n(row, width, rows.data() + t * width);
                }
                memory_.emplace_back(rows);
                planes.push_back({.rows = memory_.back().data(), .row_bytes = width});
            }
            payloads_.emplace_back(capacity.value());
        }
        for (std::size_t i = 0; i < count; ++i)
            chunks.push_back({input, planes_[i], payloads_[i].data(), payloads_[i].size()});
        auto made = device::EncodePlan::make(chunks, options, klt);
        if (!made.ok()) throw Error(made.status().message());
        plan_ = std::move(made.value());
        image_.emplace_back(plan_.image());
        workspace_.emplace_back(plan_.workspace_bytes());
        report_.emplace_back(plan_.report_bytes());
    }

    void encode(const Stream& stream) const {
        check(device::encode_batch(plan_, image_[0].data(), workspace_[0].data(), report_[0].data(),
                                   stream.get()));
    }

    void verify(const std::vector<std::uint8_t>& expected) const {
        const auto report = report_[0].read();
        for (std::size_t i = 0; i < payloads_.size(); ++i) {
            const auto payload = payloads_[i].read();
            const auto object = plan_.object(
                i, report, {reinterpret_cast<const std::uint8_t*>(payload.data()), payload.size()});
            if (!object.ok()) throw Error(object.status().message());
            if (object.value() != expected) throw Error("the device writes other bytes than the CPU");
        }
    }

    std::size_t workspace_bytes() const { return plan_.workspace_bytes(); }

  private:
    std::vector<DeviceBuffer> memory_, payloads_;
    std::vector<std::vector<device::DevicePlane>> planes_;
    device::EncodePlan plan_;
    std::vector<DeviceBuffer> image_, workspace_, report_;  // one each
};

// ---- rows

struct Coding {
    EncodeOptions options;
    std::string name;
};

// Blocks as encoders make them by default, and as small as they may be: they cost bytes, and let more warps
// decode a chunk.
std::vector<Coding> with_small_blocks(const std::vector<Coding>& codings) {
    std::vector<Coding> out;
    for (const Coding& c : codings) {
        out.push_back(c);
        Coding& small = out.emplace_back(c);
        if (c.options.profile == Profile::kKlt) {
            small.options.run_layers = 1;
            small.name += " r1";
        } else {
            small.options.block_heads = 1;
            small.name += " h1";
        }
    }
    return out;
}

std::vector<Coding> uncalibrated() {
    std::vector<Coding> out(1);
    out[0].options.profile = Profile::kLossless;
    out[0].name = "lossless";
    for (unsigned level = 1; level <= kDeltaLevels; level += 2) {
        Coding& c = out.emplace_back();
        c.options.level = level;
        c.name = fmt::format("delta {}", level);
    }
    return with_small_blocks(out);
}

std::vector<Coding> calibrated_by(const std::shared_ptr<const Calibration>& calibration,
                                  const std::string& name) {
    std::vector<Coding> out;
    for (unsigned level = 1; level <= calibration->data().levels.size(); level += 5) {
        Coding& c = out.emplace_back();
        c.options.profile = Profile::kKlt;
        c.options.level = level;
        c.options.sinks = kKltSinks;
        c.options.calibration = calibration;
        c.name = fmt::format("{} {}", name, level);
    }
    return with_small_blocks(out);
}

// What a row is about; times and bytes come with it.
struct Row {
    const Source& source;
    const Coding& coding;
    const char* operation;
    std::size_t chunks;
    std::size_t values;  // of all chunks
    std::size_t object_bytes;
    std::size_t workspace_bytes;
};

nlohmann::json report(const Row& row, Times t, Times copy) {
    const std::size_t bytes = row.values * 2;
    const double gbs = static_cast<double>(bytes) / 1e9 / t.median;
    const double copy_gbs = static_cast<double>(bytes) / 1e9 / copy.median;
    fmt::print(
        "{:<14} {:<18} {} {:>5} chunks {:>12} bytes {:>10.1f} us {:>9.1f} GB/s, memcpy {:>9.1f} GB/s\n",
        row.source.name, row.coding.name, row.operation, row.chunks, bytes, t.median * 1e6, gbs, copy_gbs);
    std::fflush(stdout);
    return {{"source", row.source.name},
            {"coding", row.coding.name},
            {"operation", row.operation},
            {"chunks", row.chunks},
            {"values", row.values},
            {"bf16_bytes", bytes},
            {"object_bytes", row.object_bytes},
            {"workspace_bytes", row.workspace_bytes},
            {"seconds_median", t.median},
            {"seconds_least", t.least},
            {"gbs", gbs},
            {"memcpy_gbs", copy_gbs},
            {"verified", true}};
}

// What is measured: codings whose "source/coding" begins with `only`; one chunk, as many as make 64 Mi
// values, and with all_sizes the powers of two between.
struct Choice {
    std::string only;
    bool all_sizes = false;
    unsigned repetitions = 20;

    bool takes(const Source& source, const Coding& coding) const {
        return (source.name + "/" + coding.name).starts_with(only);
    }
    std::vector<std::size_t> sizes(std::size_t values) const {
        const std::size_t most = std::max<std::size_t>(kMostValues / values, 1);
        std::vector<std::size_t> out = {1};
        for (std::size_t n = 2; all_sizes && n < most; n *= 2) out.push_back(n);
        if (most > 1) out.push_back(most);
        return out;
    }
};

void measure(const Source& source, const Coding& coding, const device::KltOnDevice& klt, const Choice& choice,
             const Stream& stream, nlohmann::json& rows) {
    if (!choice.takes(source, coding)) return;
    const auto object = encode(source, coding.options);
    const auto expected = decode_on_cpu(object, coding.options.calibration);
    const std::size_t values = expected.size() / 2;
    for (const std::size_t chunks : choice.sizes(values)) {
        const Batch batch(object, chunks, klt);
        batch.decode(stream);
        stream.wait();
        batch.verify(expected);
        const Times t = time(stream, Graph(stream, [&] { batch.decode(stream); }), choice.repetitions);
        batch.verify(expected);
        rows.push_back(report({source, coding, "decode", chunks, chunks * values, chunks * object.size(),
                               batch.workspace_bytes()},
                              t, time_memcpy(stream, 2 * chunks * values, choice.repetitions)));
    }
    for (const std::size_t chunks : choice.sizes(values)) {
        const EncodeBatch batch(source, coding.options, chunks, klt);
        batch.encode(stream);
        stream.wait();
        batch.verify(object);
        const Times t = time(stream, Graph(stream, [&] { batch.encode(stream); }), choice.repetitions);
        batch.verify(object);
        rows.push_back(report({source, coding, "encode", chunks, chunks * values, chunks * object.size(),
                               batch.workspace_bytes()},
                              t, time_memcpy(stream, 2 * chunks * values, choice.repetitions)));
    }
}

// ---- the device

cudaDeviceProp require_device() {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess || count == 0)
        throw Error(fmt::format("no GPU here ({}): nothing is measured", cudaGetErrorString(error)));
    cudaDeviceProp properties = {};
    check(cudaGetDeviceProperties(&properties, 0));
    return properties;
}

void measure_klt(const Source& source, const std::shared_ptr<const Calibration>& calibration,
                 const std::string& name, const Choice& choice, const Stream& stream, nlohmann::json& rows) {
    const auto codings = calibrated_by(calibration, name);
    if (std::none_of(codings.begin(), codings.end(),
                     [&](const Coding& c) { return choice.takes(source, c); }))
        return;
    const Calibrated on_device(calibration);
    for (const Coding& c : codings) measure(source, c, on_device.on_device(), choice, stream, rows);
}

void measure_all(const std::string& path, const std::string& calibration_path, const Choice& choice,
                 const std::string& output) {
    const cudaDeviceProp gpu = require_device();
    int driver = 0, runtime = 0;
    check(cudaDriverGetVersion(&driver));
    check(cudaRuntimeGetVersion(&runtime));
    nlohmann::json out = {{"gpu", gpu.name},
                          {"compute_capability", fmt::format("{}.{}", gpu.major, gpu.minor)},
                          {"multiprocessors", gpu.multiProcessorCount},
                          {"cuda_driver", driver},
                          {"cuda_runtime", runtime},
                          {"repetitions", choice.repetitions},
                          {"rows", nlohmann::json::array()}};
    const Stream stream;
    const KvInput kv(std::make_unique<SafetensorsReader>(path));
    const auto calibration = load_calibration(calibration_path);
    const Source real = first_chunk(kv, "sample"), wide = synthetic("synthetic-8b", 32);
    const Source shallow = synthetic("synthetic-wide", 4);
    auto& rows = out["rows"];
    for (const Coding& c : uncalibrated()) measure(real, c, {}, choice, stream, rows);
    for (const Coding& c : uncalibrated()) measure(wide, c, {}, choice, stream, rows);
    if (calibration != nullptr) {
        measure_klt(real, calibration, "klt", choice, stream, rows);
        measure_klt(real, bench::first_stage(*calibration), "klt first-stage", choice, stream, rows);
    }
    measure_klt(shallow, bench::dense_first_stage(shallow.layout, shallow.model, 384), "klt first-stage",
                choice, stream, rows);
    if (output.empty()) return;
    std::ofstream file(output);
    file << out.dump(1) << '\n';
    if (!file.good()) throw Error(fmt::format("{} cannot be written", output));
}

}  // namespace

int main(int argc, char** argv) {
    CLI::App app(
        "Decode and encode speed on a GPU, per profile, level and batch size; every row is verified.",
        "bench_device");
    std::string path, calibration, output;
    Choice choice;
    bool name = false;
    app.add_flag("--gpu", name, "print the GPU's name and end");
    app.add_option("FILE", path, "KV cache (safetensors)");
    app.add_option("--calibration", calibration, "measure klt too, with this calibration (.kvcal)");
    app.add_option("--only", choice.only, "only rows whose SOURCE/CODING begins so");
    app.add_flag("--all-sizes", choice.all_sizes, "powers of two of chunks, too");
    app.add_option("--repetitions", choice.repetitions, "timed repetitions (default 20)")
        ->check(CLI::Range(1, 1000));
    app.add_option("-o,--output", output, "results (JSON)");
    return run_tool(app, argc, argv, [&] {
        if (name) {
            fmt::print("{}\n", require_device().name);
            return;
        }
        if (path.empty()) throw Error("no FILE given");
        measure_all(path, calibration, choice, output);
    });
}
