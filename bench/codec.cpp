// bench_codec: rate, error and speed of every level on real KV, in process, with one thread and with all.
// Each row is verified in the run that times it: lossless rows bit for bit, lossy rows against a decoding on
// another executor. memcpy of the same planes, and zstd and lz4 on their bytes, stand beside. Everything is
// decoded to memory that is not in a cache, as a request's KV is not: one copy after another of as many as
// make kColdBytes.
#include <fmt/format.h>
#include <lz4.h>
#include <zstd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <functional>
#include <nlohmann/json.hpp>
#include <thread>

#include "bench/calibrations.h"
#include "codec/aligned_vector.h"
#include "codec/decoder.h"
#include "codec/encoder.h"
#include "tools/common/calibration_file.h"
#include "tools/common/cli.h"
#include "tools/common/kv_file.h"

namespace {

using namespace kvcast;
using namespace kvcast::tools;

constexpr int kRepetitions = 15;
constexpr std::size_t kColdBytes = std::size_t{256} << 20;

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
    double encode_gbs = 0;  // one thread
    double decode_gbs = 0;
    double encode_all_gbs = 0;  // all threads
    double decode_all_gbs = 0;
};

// The whole cache as planes of contiguous rows, and back.
class Cache {
  public:
    explicit Cache(const KvInput& kv) : kv_(kv), layout_(kv.layout()) {
        for (std::size_t i = 0; i < layout_.layers * layout_.planes.size(); ++i) {
            planes_.emplace_back(layout_.row_bytes(i) * kv.token_ids().size());
        }
    }

    std::vector<PlaneBuffer> buffers(std::size_t token) {
        std::vector<PlaneBuffer> out;
        for (std::size_t i = 0; i < planes_.size(); ++i)
            out.push_back({planes_[i].data() + token * layout_.row_bytes(i), layout_.row_bytes(i)});
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

    std::vector<AlignedVector<std::uint8_t>>& planes() { return planes_; }

    std::size_t bytes() const {
        std::size_t sum = 0;
        for (const auto& plane : planes_) sum += plane.size();
        return sum;
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
    std::vector<AlignedVector<std::uint8_t>> planes_;
};

// Caches that are written in turns.
class ColdCaches {
  public:
    explicit ColdCaches(const KvInput& kv) {
        for (std::size_t bytes = 0; bytes < kColdBytes; bytes += caches_.back().bytes())
            caches_.emplace_back(kv);
    }

    Cache& next() { return caches_[last_ = (last_ + 1) % caches_.size()]; }
    const Cache& last() const { return caches_[last_]; }

  private:
    std::vector<Cache> caches_;
    std::size_t last_ = 0;
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

void account(const std::vector<EncodeReport>& reports, double raw_bytes, std::size_t values, Row& row) {
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
    row.ratio = raw_bytes / static_cast<double>(row.bytes);
    row.bits_per_value = bits / static_cast<double>(values);
    row.overhead = (bits - payload) / bits;
    row.coder_loss = (blocks - ideal) / ideal;
}

std::string name_of(const EncodeOptions& o) {
    return o.profile == Profile::kLossless ? "lossless"
                                           : fmt::format("{} {}", profile_name(o.profile), o.level);
}

Row measure(const KvInput& kv, const EncodeOptions& options, std::size_t chunk, std::size_t jobs,
            ColdCaches& decoded) {
    const unsigned level = options.profile == Profile::kLossless ? 0 : options.level;
    ChunkEncoder encoder(options);
    ThreadPool pool(jobs);
    SerialExecutor serial;
    std::vector<DecodeWorkspace> workspaces(jobs);
    const std::size_t values = kv.token_ids().size() * kv.layout().values_per_token();
    const auto raw_bytes = static_cast<double>(values * kernels::dtype_bytes(kv.layout().dtype));
    Row row;
    row.level = level;
    row.name = name_of(options);
    std::vector<EncodeReport> reports;
    std::vector<std::vector<std::uint8_t>> objects;
    encode_all(kv, encoder, chunk, objects, serial, &reports);
    account(reports, raw_bytes, values, row);

    Cache again(kv);
    std::vector<std::vector<std::uint8_t>> encoded;
    const auto encode_rate = [&](Executor& executor) {
        return raw_bytes / shortest([&] { encode_all(kv, encoder, chunk, encoded, executor, nullptr); });
    };
    const auto decode_rate = [&](Executor& executor) {
        return raw_bytes / shortest([&] {
                   decode_all(objects, decoded.next(), executor, workspaces, options.calibration);
               });
    };
    row.encode_gbs = encode_rate(serial) / 1e9;
    row.decode_gbs = decode_rate(serial) / 1e9;
    decode_all(objects, again, serial, workspaces, options.calibration);
    row.encode_all_gbs = encode_rate(pool) / 1e9;
    row.decode_all_gbs = decode_rate(pool) / 1e9;
    const Cache& cache = decoded.last();
    const bool sound = encoded == objects && cache.equals(again) && (level != 0 || cache.equals_source());
    if (!sound) throw Error(fmt::format("level {}: the decoded cache is wrong", level));
    row.error_k = cache.error(0);
    row.error_v = kv.layout().planes.size() > 1 ? cache.error(1) : 0;
    return row;
}

// A general compressor on the bytes of each plane.
struct Peer {
    std::string name;
    std::function<std::size_t(std::span<const std::uint8_t> from, std::span<std::uint8_t> to)> compress;
    std::function<std::size_t(std::span<const std::uint8_t> from, std::span<std::uint8_t> to)> decompress;
};

Peer zstd_peer(int level) {
    const std::shared_ptr<ZSTD_CCtx> c(ZSTD_createCCtx(), ZSTD_freeCCtx);
    const std::shared_ptr<ZSTD_DCtx> d(ZSTD_createDCtx(), ZSTD_freeDCtx);
    return {fmt::format("zstd -{}", level),
            [=](auto from, auto to) {
                return ZSTD_compressCCtx(c.get(), to.data(), to.size(), from.data(), from.size(), level);
            },
            [=](auto from, auto to) {
                return ZSTD_decompressDCtx(d.get(), to.data(), to.size(), from.data(), from.size());
            }};
}

Peer lz4_peer() {
    const auto chars = [](auto span) { return reinterpret_cast<const char*>(span.data()); };
    const auto room = [](auto span) { return reinterpret_cast<char*>(span.data()); };
    return {"lz4",
            [=](auto from, auto to) {
                return static_cast<std::size_t>(LZ4_compress_default(
                    chars(from), room(to), static_cast<int>(from.size()), static_cast<int>(to.size())));
            },
            [=](auto from, auto to) {
                return static_cast<std::size_t>(LZ4_decompress_safe(
                    chars(from), room(to), static_cast<int>(from.size()), static_cast<int>(to.size())));
            }};
}

Row measure(const KvInput& kv, const Peer& peer, ColdCaches& decoded) {
    Cache source(kv);
    source.copy_source();
    std::vector<std::vector<std::uint8_t>> compressed;
    std::vector<std::size_t> sizes;
    double raw_bytes = 0;
    for (const auto& plane : source.planes()) {
        compressed.emplace_back(ZSTD_compressBound(plane.size()) + 64);
        sizes.push_back(0);
        raw_bytes += static_cast<double>(plane.size());
    }
    Row row;
    row.name = peer.name;
    row.encode_gbs = raw_bytes / 1e9 / shortest([&] {
                         for (std::size_t i = 0; i < sizes.size(); ++i)
                             sizes[i] = peer.compress(source.planes()[i], compressed[i]);
                     });
    row.decode_gbs = raw_bytes / 1e9 / shortest([&] {
                         auto& planes = decoded.next().planes();
                         for (std::size_t i = 0; i < sizes.size(); ++i)
                             peer.decompress(std::span(compressed[i]).first(sizes[i]), planes[i]);
                     });
    if (!decoded.last().equals_source()) throw Error(peer.name + " is wrong");
    for (const std::size_t bytes : sizes) row.bytes += bytes;
    row.ratio = raw_bytes / static_cast<double>(row.bytes);
    row.bits_per_value = 8.0 * static_cast<double>(row.bytes) /
                         static_cast<double>(kv.token_ids().size() * kv.layout().values_per_token());
    return row;
}

std::string rate(double gbs) {
    return gbs == 0 ? "" : fmt::format("{:.2f}", gbs);
}

std::string percent(double share) {
    return share == 0 ? "" : fmt::format("{:.2f}%", 100 * share);
}

void print(const Row& r) {
    fmt::print("{:<9} {:>9} {:>7.2f}x {:>8.3f} {:>8} {:>7} {:>7} {:>7} {:>7} {:>7} {:>7} {:>7}\n", r.name,
               r.bytes, r.ratio, r.bits_per_value, percent(r.overhead), percent(r.coder_loss),
               percent(r.error_k), percent(r.error_v), rate(r.encode_gbs), rate(r.decode_gbs),
               rate(r.encode_all_gbs), rate(r.decode_all_gbs));
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
            {"decode_gbs", r.decode_gbs},
            {"encode_all_gbs", r.encode_all_gbs},
            {"decode_all_gbs", r.decode_all_gbs}};
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

void bench_file(const std::string& path, const std::string& calibration, std::size_t chunk, std::size_t jobs,
                bool json, const std::string& only, bool few_terms) {
    const KvInput kv(std::make_unique<SafetensorsReader>(path));
    ColdCaches cold(kv);
    const std::size_t raw_bytes = kv.token_ids().size() * kv.layout().token_bytes();
    Row memory;
    memory.name = "memcpy";
    memory.bytes = raw_bytes;
    memory.ratio = 1;
    memory.bits_per_value = 8.0 * static_cast<double>(kernels::dtype_bytes(kv.layout().dtype));
    memory.encode_gbs = memory.decode_gbs =
        static_cast<double>(raw_bytes) / 1e9 / shortest([&] { cold.next().copy_source(); });
    if (!cold.last().equals_source()) throw Error("memcpy is wrong");
    nlohmann::json out = {{"file", path},
                          {"bytes", raw_bytes},
                          {"jobs", jobs},
                          {"kernels", kernels::best_ops().name},
                          {"memcpy_gbs", memory.decode_gbs}};
    bool any = false;
    const auto report = [&](const Row& row) {
        any = true;
        json ? out["levels"].push_back(as_json(row)) : print(row);
    };
    if (!json) {
        fmt::print("{:<9} {:>9} {:>8} {:>8} {:>8} {:>7} {:>7} {:>7} {:>15} {:>15}\n", "", "", "", "", "", "",
                   "", "", "GB/s, 1 thread", fmt::format("{} threads", jobs));
        fmt::print("{:<9} {:>9} {:>8} {:>8} {:>8} {:>7} {:>7} {:>7} {:>7} {:>7} {:>7} {:>7}\n", "level",
                   "bytes", "ratio", "bits/val", "overhead", "coder", "err K", "err V", "encode", "decode",
                   "encode", "decode");
        print(memory);
    }
    for (const Peer& peer : {zstd_peer(1), lz4_peer()}) {
        if (peer.name.starts_with(only)) report(measure(kv, peer, cold));
    }
    auto terms = load_calibration(calibration);
    if (few_terms && terms != nullptr) terms = bench::first_stage(*terms);
    for (const EncodeOptions& options : all_levels(terms)) {
        if (name_of(options).starts_with(only)) report(measure(kv, options, chunk, jobs, cold));
    }
    if (!any) throw Error(fmt::format("no level's name begins with '{}'", only));
    if (json) {
        fmt::print("{}\n", out.dump(2));
        return;
    }
    fmt::print(
        "overhead: all bytes but the values' own ideal code length; coder: blocks beyond the model's ideal "
        "code "
        "length;\n"
        "err: relative root mean square; speed: bf16 bytes, best of {}; kernels: {}\n",
        kRepetitions, kernels::best_ops().name);
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
    bool few_terms = false;
    app.add_option("FILE", path, "KV cache (safetensors)")->required();
    app.add_option("-c,--chunk", chunk, "tokens per chunk")
        ->check(CLI::Range(1, 65535))
        ->capture_default_str();
    app.add_option("-j,--jobs", jobs, "threads")->check(CLI::Range(1, 1024))->capture_default_str();
    app.add_option("--calibration", calibration, "measure klt too, with this calibration (.kvcal)");
    app.add_option("--only", only, "levels whose name begins so, e.g. 'delta' or 'klt 6'");
    app.add_flag(
        "--first-stage", few_terms,
        "klt without what predicts from token ids and from two layers back: for its speed, not its rate");
    app.add_flag("--json", json, "machine-readable output");
    return run_tool(app, argc, argv,
                    [&] { bench_file(path, calibration, chunk, jobs, json, only, few_terms); });
}
