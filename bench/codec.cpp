// bench_codec: rate, error and speed of every level on real KV, in process. Each row is verified in the run
// that times it: lossless rows bit for bit, lossy rows against a decoding on another executor.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>
#include <thread>

#include "codec/decoder.h"
#include "codec/encoder.h"
#include "tools/common/calibration_file.h"
#include "tools/common/cli.h"
#include "tools/common/kv_file.h"

namespace {

using namespace kvcast;
using namespace kvcast::tools;

constexpr int kRepetitions = 15;

// Shortest of some runs, in seconds.
template <typename F>
double shortest(F&& run) {
    double best = 1e9;
    for (int i = 0; i < kRepetitions; ++i) {
        const auto begin = std::chrono::steady_clock::now();
        run();
        best =
            std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
    }
    return best;
}

struct Row {
    std::string name;
    unsigned level = 0;
    std::uint64_t bytes = 0;
    double ratio = 0;
    double bits_per_value = 0;
    double overhead = 0;    // share of all bytes that is not payload
    double coder_loss = 0;  // block bytes beyond the ideal code length of the symbol model
    double error_k = 0;
    double error_v = 0;
    double encode_gbs = 0;
    double decode_gbs = 0;
};

// The whole cache as planes of contiguous rows, and back.
class Cache {
  public:
    explicit Cache(const KvInput& kv) : kv_(kv), layout_(kv.layout()) {
        for (std::size_t i = 0; i < layout_.layers * layout_.planes.size(); ++i) {
            planes_.emplace_back(plane_row(i) * kv.token_ids().size());
        }
    }

    std::size_t plane_row(std::size_t i) const {
        return layout_.planes[i % layout_.planes.size()].width() * kernels::dtype_bytes(layout_.dtype);
    }

    std::vector<PlaneBuffer> buffers(std::size_t token) {
        std::vector<PlaneBuffer> out;
        for (std::size_t i = 0; i < planes_.size(); ++i)
            out.push_back({planes_[i].data() + token * plane_row(i), plane_row(i)});
        return out;
    }

    bool equals(const Cache& other) const { return planes_ == other.planes_; }

    bool equals_source() const {
        const auto source = kv_.rows(0);
        for (std::size_t i = 0; i < planes_.size(); ++i) {
            if (std::memcmp(source[i].rows, planes_[i].data(), planes_[i].size()) != 0) return false;
        }
        return true;
    }

    // Relative root mean square error of plane p over all layers.
    double error(std::size_t p) const {
        const auto source = kv_.rows(0);
        double difference = 0;
        double energy = 0;
        for (std::size_t i = p; i < planes_.size(); i += layout_.planes.size()) {
            const auto* x = static_cast<const std::uint8_t*>(source[i].rows);
            const std::size_t step = kernels::dtype_bytes(layout_.dtype);
            for (std::size_t at = 0; at < planes_[i].size(); at += step) {
                const double a = value(x + at);
                const double b = value(planes_[i].data() + at);
                difference += (a - b) * (a - b);
                energy += a * a;
            }
        }
        return energy == 0 ? 0 : std::sqrt(difference / energy);
    }

    void copy_source() {
        const auto source = kv_.rows(0);
        for (std::size_t i = 0; i < planes_.size(); ++i)
            std::memcpy(planes_[i].data(), source[i].rows, planes_[i].size());
    }

  private:
    double value(const std::uint8_t* p) const {
        std::uint32_t bits = 0;
        std::memcpy(&bits, p, kernels::dtype_bytes(layout_.dtype));
        return kernels::from_bits(layout_.dtype, bits);
    }

    const KvInput& kv_;
    const Layout& layout_;
    std::vector<std::vector<std::uint8_t>> planes_;
};

void encode_all(const KvInput& kv, ChunkEncoder& encoder, std::size_t chunk,
                std::vector<std::vector<std::uint8_t>>& objects, Executor& executor,
                std::vector<EncodeReport>* reports) {
    const std::size_t tokens = kv.token_ids().size();
    objects.resize((tokens + chunk - 1) / chunk);
    Hash chain = {};
    for (std::size_t first = 0; first < tokens; first += chunk) {
        const auto ids = std::span(kv.token_ids()).subspan(first, std::min(chunk, tokens - first));
        const auto rows = kv.rows(first);
        const ChunkInput input = {&kv.layout(), kv.model(), "", ids, first, kv.base_position(), chain, rows};
        EncodeReport report;
        const Status s = encoder.encode(input, executor, objects[first / chunk], chain,
                                        reports != nullptr ? &report : nullptr);
        if (!s.ok()) throw Error(s.message());
        if (reports != nullptr) reports->push_back(report);
    }
}

void decode_all(const std::vector<std::vector<std::uint8_t>>& objects, Cache& cache, Executor& executor,
                std::vector<DecodeWorkspace>& workspaces,
                const std::shared_ptr<const Calibration>& calibration) {
    std::size_t token = 0;
    for (const auto& object : objects) {
        auto decoder = ChunkDecoder::open(object, {.calibration = calibration});
        if (!decoder.ok()) throw Error(decoder.status().message());
        const Status s = decoder.value().decode(cache.buffers(token), executor, workspaces);
        if (!s.ok()) throw Error(s.message());
        token += decoder.value().header().tokens;
    }
}

void account(const std::vector<EncodeReport>& reports, std::size_t raw_bytes, std::size_t values, Row& row) {
    double payload = 0;
    double ideal = 0;
    double blocks = 0;
    for (const EncodeReport& r : reports) {
        row.bytes += r.header_bytes + r.block_bytes;
        payload += r.ideal.payload;
        ideal += r.ideal.payload + r.ideal.side;
        blocks += 8.0 * static_cast<double>(r.block_bytes);
    }
    const double bits = 8.0 * static_cast<double>(row.bytes);
    row.ratio = static_cast<double>(raw_bytes) / static_cast<double>(row.bytes);
    row.bits_per_value = bits / static_cast<double>(values);
    row.overhead = (bits - payload) / bits;
    row.coder_loss = (blocks - ideal) / ideal;
}

std::string name_of(const EncodeOptions& o) {
    return o.profile == Profile::kLossless ? "lossless"
                                           : fmt::format("{} {}", profile_name(o.profile), o.level);
}

Row measure(const KvInput& kv, const EncodeOptions& options, std::size_t chunk, std::size_t jobs) {
    const unsigned level = options.profile == Profile::kLossless ? 0 : options.level;
    ChunkEncoder encoder(options);
    ThreadPool pool(jobs);
    SerialExecutor serial;
    std::vector<DecodeWorkspace> workspaces(jobs);
    const std::size_t values = kv.token_ids().size() * kv.layout().values_per_token();
    const std::size_t raw_bytes = values * kernels::dtype_bytes(kv.layout().dtype);
    Row row;
    row.level = level;
    row.name = name_of(options);
    std::vector<EncodeReport> reports;
    std::vector<std::vector<std::uint8_t>> objects;
    encode_all(kv, encoder, chunk, objects, serial, &reports);
    account(reports, raw_bytes, values, row);

    Cache cache(kv);
    Cache again(kv);
    std::vector<std::vector<std::uint8_t>> encoded;
    row.encode_gbs = static_cast<double>(raw_bytes) / 1e9 /
                     shortest([&] { encode_all(kv, encoder, chunk, encoded, pool, nullptr); });
    row.decode_gbs = static_cast<double>(raw_bytes) / 1e9 /
                     shortest([&] { decode_all(objects, cache, pool, workspaces, options.calibration); });
    decode_all(objects, again, serial, workspaces, options.calibration);
    const bool sound = encoded == objects && cache.equals(again) && (level != 0 || cache.equals_source());
    if (!sound) throw Error(fmt::format("level {}: the decoded cache is wrong", level));
    row.error_k = cache.error(0);
    row.error_v = kv.layout().planes.size() > 1 ? cache.error(1) : 0;
    return row;
}

void print(const Row& r) {
    fmt::print("{:<9} {:>9} {:>7.2f}x {:>8.3f} {:>7.2f}% {:>7.2f}% {:>7.2f}% {:>7.2f}% {:>8.2f} {:>8.2f}\n",
               r.name, r.bytes, r.ratio, r.bits_per_value, 100 * r.overhead, 100 * r.coder_loss,
               100 * r.error_k, 100 * r.error_v, r.encode_gbs, r.decode_gbs);
}

nlohmann::json as_json(const Row& r) {
    return {{"name", r.name},
            {"level", r.level},
            {"bytes", r.bytes},
            {"ratio", r.ratio},
            {"bits_per_value", r.bits_per_value},
            {"overhead", r.overhead},
            {"coder_loss", r.coder_loss},
            {"error_k", r.error_k},
            {"error_v", r.error_v},
            {"encode_gbs", r.encode_gbs},
            {"decode_gbs", r.decode_gbs}};
}

// Lossless, delta, and klt where there is a calibration.
std::vector<EncodeOptions> all_levels(const std::shared_ptr<const Calibration>& calibration) {
    std::vector<EncodeOptions> out(1);
    out[0].profile = Profile::kLossless;
    for (unsigned level = 1; level <= kDeltaLevels; ++level) out.emplace_back().level = level;
    const std::size_t levels = calibration == nullptr ? 0 : calibration->data().levels.size();
    for (unsigned level = 1; level <= levels; ++level) {
        EncodeOptions& o = out.emplace_back();
        o.profile = Profile::kKlt;
        o.level = level;
        o.sinks = kKltSinks;
        o.calibration = calibration;
    }
    return out;
}

void bench(const std::string& path, const std::string& calibration, std::size_t chunk, std::size_t jobs,
           bool json, const std::string& only) {
    const KvInput kv(std::make_unique<SafetensorsReader>(path));
    Cache copy(kv);
    const std::size_t raw_bytes =
        kv.token_ids().size() * kv.layout().values_per_token() * kernels::dtype_bytes(kv.layout().dtype);
    const double memcpy_gbs = static_cast<double>(raw_bytes) / 1e9 / shortest([&] { copy.copy_source(); });
    if (!copy.equals_source()) throw Error("memcpy is wrong");
    nlohmann::json out = {{"file", path}, {"bytes", raw_bytes}, {"jobs", jobs}, {"memcpy_gbs", memcpy_gbs}};
    if (!json) {
        fmt::print("{:<9} {:>9} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8}\n", "level", "bytes", "ratio",
                   "bits/val", "overhead", "coder", "err K", "err V", "enc GB/s", "dec GB/s");
        fmt::print("{:<9} {:>9} {:>7.2f}x {:>8.3f} {:>8} {:>8} {:>8} {:>8} {:>8.2f} {:>8.2f}\n", "memcpy",
                   raw_bytes, 1.0, 16.0, "", "", "", "", memcpy_gbs, memcpy_gbs);
    }
    for (const EncodeOptions& options : all_levels(load_calibration(calibration))) {
        if (!name_of(options).starts_with(only)) continue;
        const Row row = measure(kv, options, chunk, jobs);
        json ? out["levels"].push_back(as_json(row)) : print(row);
    }
    if (json) {
        fmt::print("{}\n", out.dump(2));
        return;
    }
    fmt::print(
        "overhead: all bytes but the values' own ideal code length; coder: blocks beyond the model's ideal "
        "code length;\n"
        "err: relative root mean square; speed: bf16 bytes, {} threads, best of {}, memcpy with one\n",
        jobs, kRepetitions);
}

}  // namespace

int main(int argc, char** argv) {
    CLI::App app("Rate, error and speed of every level on a KV cache; every row is verified.", "bench_codec");
    std::string path;
    std::string calibration;
    std::size_t chunk = 256;
    std::size_t jobs = std::max(1u, std::thread::hardware_concurrency());
    bool json = false;
    std::string only;
    app.add_option("FILE", path, "KV cache (safetensors)")->required();
    app.add_option("-c,--chunk", chunk, "tokens per chunk")
        ->check(CLI::Range(1, 65535))
        ->capture_default_str();
    app.add_option("-j,--jobs", jobs, "threads")->check(CLI::Range(1, 1024))->capture_default_str();
    app.add_option("--calibration", calibration, "measure klt too, with this calibration (.kvcal)");
    app.add_option("--only", only, "levels whose name begins so, e.g. 'delta' or 'klt 6'");
    app.add_flag("--json", json, "machine-readable output");
    return run_tool(app, argc, argv, [&] { bench(path, calibration, chunk, jobs, json, only); });
}
