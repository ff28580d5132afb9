// bench_device: decode and encode speed on a GPU, per profile, level and batch size, beside the device's own
// memcpy. Every row's output is compared with the CPU decoder's before it is timed. Speed counts bytes of
// output, as bf16; what is timed is a captured CUDA graph of decode_batch or encode_batch, so that launches
// cost what they cost a server that captures its steps.
#include <fmt/format.h>

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>

#include "bench/calibrations.h"
#include "bench/gpu/batch.h"
#include "tools/common/calibration_file.h"
#include "tools/common/cli.h"

namespace {

using namespace kvcast;
using namespace kvcast::bench;
using namespace kvcast::tools;

struct Coding {
    EncodeOptions options;
    std::string name;
    bool everywhere = false;  // measured with every kind of output
};

constexpr Output kOutputs[] = {{"bf16"}, {"bf16 pages", Dtype::kBf16, true}, {"fp16", Dtype::kF16}};

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
        const unsigned level = c.options.profile == Profile::kLossless ? 0 : c.options.level;
        small.everywhere = level == 0 || level == 3 || level == 6;
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
    const char* memory;  // of decoded planes
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
        "{:<14} {:<18} {} {:<10} {:>5} chunks {:>12} bytes {:>10.1f} us {:>9.1f} GB/s, memcpy {:>9.1f} "
        "GB/s\n",
        row.source.name, row.coding.name, row.operation, row.memory, row.chunks, bytes, t.median * 1e6, gbs,
        copy_gbs);
    std::fflush(stdout);
    return {{"source", row.source.name},
            {"coding", row.coding.name},
            {"operation", row.operation},
            {"memory", row.memory},
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

// What is measured: codings whose "source/coding" begins with `only`; one chunk, as many as make the most
// values of a batch, and with all_sizes the powers of two between.
struct Choice {
    std::string only;
    std::string memory;  // of this kind only; empty: any
    std::size_t most_values = std::size_t{64} << 20;
    bool all_sizes = false;
    unsigned repetitions = 20;

    bool takes_any_of(const std::string& source) const {
        return (source + "/").starts_with(only) || only.starts_with(source + "/");
    }
    bool takes(const Source& source, const Coding& coding) const {
        return (source.name + "/" + coding.name).starts_with(only);
    }
    std::vector<std::size_t> sizes(std::size_t values) const {
        const std::size_t most = std::max<std::size_t>(most_values / values, 1);
        std::vector<std::size_t> out = {1};
        for (std::size_t n = 2; all_sizes && n < most; n *= 2) out.push_back(n);
        if (most > 1) out.push_back(most);
        return out;
    }
};

// Of work whose output is what the CPU makes, before it is timed and after.
template <typename Work, typename Expected>
Times verified_times(const Work& work, const Expected& expected, const Stream& stream, unsigned repetitions) {
    work.forget(stream);
    work.run(stream);
    stream.wait();
    work.verify(expected);
    work.forget(stream);
    const Times t = time(stream, Graph(stream, [&] { work.run(stream); }), repetitions);
    work.verify(expected);
    return t;
}

void measure(const Source& source, const Coding& coding, const device::KltOnDevice& klt, const Choice& choice,
             const Stream& stream, nlohmann::json& rows) {
    if (!choice.takes(source, coding)) return;
    const auto object = encode(source, coding.options);
    const std::size_t values = source.ids.size() * source.layout.values_per_token();
    const auto add = [&](const auto& work, const auto& expected, const char* operation, const char* memory,
                         std::size_t chunks) {
        const Row row = {source,
                         coding,
                         operation,
                         memory,
                         chunks,
                         chunks * values,
                         chunks * object.size(),
                         work.workspace_bytes()};
        const Times t = verified_times(work, expected, stream, choice.repetitions);
        rows.push_back(report(row, t, time_memcpy(stream, 2 * row.values, choice.repetitions)));
    };
    for (const Output& output : std::span(kOutputs).first(coding.everywhere ? std::size(kOutputs) : 1)) {
        if (!choice.memory.empty() && choice.memory != output.name) continue;
        const auto expected = decode_on_cpu(object, output.dtype, coding.options.calibration);
        for (const std::size_t chunks : choice.sizes(values))
            add(DecodeBatch(object, chunks, klt, output), expected, "decode", output.name, chunks);
    }
    for (const std::size_t chunks : choice.sizes(values))
        add(EncodeBatch(source, coding.options, chunks, klt), object, "encode", "bf16", chunks);
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
    const Source real = first_chunk(kv, "sample");
    auto& rows = out["rows"];
    for (const Coding& c : uncalibrated()) measure(real, c, {}, choice, stream, rows);
    if (choice.takes_any_of("synthetic-8b")) {
        const Source wide = synthetic("synthetic-8b", 32);
        for (const Coding& c : uncalibrated()) measure(wide, c, {}, choice, stream, rows);
    }
    if (calibration != nullptr) {
        measure_klt(real, calibration, "klt", choice, stream, rows);
        measure_klt(real, bench::first_stage(*calibration), "klt first-stage", choice, stream, rows);
    }
    if (choice.takes_any_of("synthetic-wide")) {
        const Source shallow = synthetic("synthetic-wide", 4);
        measure_klt(shallow, bench::dense_first_stage(shallow.layout, shallow.model, 384), "klt first-stage",
                    choice, stream, rows);
    }
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
    app.add_option("--memory", choice.memory, "decode to this kind of memory only")
        ->check(CLI::IsMember({"bf16", "bf16 pages", "fp16"}));
    app.add_option("--values", choice.most_values, "values of a batch, at most (default 64 Mi)")
        ->check(CLI::PositiveNumber);
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
