// kvenc: a KV cache in a safetensors file becomes a file of chunk objects.
#include <fmt/format.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <optional>
#include <thread>

#include "codec/device/coder.h"
#include "codec/encoder.h"
#include "tools/common/calibration_file.h"
#include "tools/common/cli.h"
#include "tools/common/file.h"
#include "tools/common/kv_file.h"
#include "tools/common/layer_steps.h"
#include "tools/common/progress.h"

namespace {

using namespace kvcast;
using namespace kvcast::tools;

struct Arguments {
    std::string input;
    std::string output;
    std::string profile = "delta";
    unsigned level = 5;
    std::size_t chunk_tokens = 256;
    std::size_t jobs = std::max(1u, std::thread::hardware_concurrency());
    std::string device = "cpu";
    std::string predict = "mean";
    bool as_stored = false;
    std::string layer_steps = "flat";
    std::string calibration;
    std::optional<std::size_t> sinks;
    std::size_t tail_tokens = 0;
    unsigned tail_level = 0;
    std::size_t block_heads = 0;
    std::size_t run_layers = EncodeOptions{}.run_layers;
    std::string salt;
    bool quiet = false;
};

void declare(CLI::App& app, Arguments& a) {
    app.add_option("IN", a.input, "KV cache (safetensors: k, v, token_ids); - reads standard input")
        ->required();
    app.add_option("-o,--output", a.output, "file to write; - writes standard output")->required();
    app.add_option("-p,--profile", a.profile, "delta, lossless, or klt with --calibration")
        ->check(CLI::IsMember({"delta", "lossless", "klt"}))
        ->capture_default_str();
    app.add_option("-l,--level", a.level,
                   "0: lossless; from 1 (finest) to 7 (coarsest); klt: to the calibration's last")
        ->check(CLI::Range(0u, 255u))
        ->capture_default_str();
    app.add_option("-c,--chunk", a.chunk_tokens, "tokens per chunk; the last one takes up to 31 more")
        ->check(CLI::Range(std::size_t{1}, ChunkLimits::kTokens))
        ->capture_default_str();
    app.add_option("-j,--jobs", a.jobs, "threads")->check(CLI::Range(1, 1024))->capture_default_str();
    declare_device(app, a.device);
    app.add_option("--predict", a.predict, "mean: from the chunk's mean; anchor: from every tenth token")
        ->check(CLI::IsMember({"mean", "anchor"}))
        ->capture_default_str();
    app.add_flag("--as-stored", a.as_stored, "code K as stored instead of un-rotating it first");
    declare_coding(app, a.layer_steps, a.block_heads, a.run_layers);
    app.add_option("--calibration", a.calibration, "calibration of the klt profile (.kvcal)");
    app.add_option("--sinks", a.sinks,
                   "first tokens of the context that are stored exactly; default: 4, klt: 1");
    app.add_option("--tail-tokens", a.tail_tokens, "klt: last tokens of the context that are coded finer");
    app.add_option("--tail-level", a.tail_level, "klt: their level")->check(CLI::Range(1u, 255u));
    app.add_option("--salt", a.salt, "secret that keeps the chunks' identities apart from other tenants'");
    app.add_flag("-q,--quiet", a.quiet, "print nothing on success");
}

EncodeOptions options_of(const Arguments& a, const Layout& layout) {
    EncodeOptions o;
    const bool klt = a.profile == "klt";
    o.profile = a.profile == "lossless" || a.level == 0 ? Profile::kLossless
                : klt                                   ? Profile::kKlt
                                                        : Profile::kDelta;
    if (klt && a.calibration.empty()) throw Error("--profile klt needs --calibration");
    if (!klt && !a.calibration.empty()) throw Error("--calibration needs --profile klt");
    if ((a.tail_tokens != 0) != (a.tail_level != 0))
        throw Error("--tail-tokens and --tail-level need each other");
    o.calibration = load_calibration(a.calibration);
    o.tail_level = a.tail_level;
    o.level = a.level;
    o.predictor = a.predict == "anchor" ? Predictor::kAnchor : Predictor::kMean;
    o.unrotate = !a.as_stored;
    o.sinks = a.sinks.value_or(klt ? kKltSinks : o.sinks);
    o.block_heads = a.block_heads;
    o.run_layers = a.run_layers;
    o.layer_steps = choose_layer_steps(a.layer_steps, layout);
    return o;
}

// Means, spreads, states and a half-empty strip cost few tokens more than their values do: fewer than a
// strip's go with the chunk before.
std::size_t next_chunk(std::size_t left, std::size_t chunk_tokens) {
    constexpr std::size_t kStrip = 32;
    const bool joins = chunk_tokens >= kStrip && left < chunk_tokens + kStrip && left <= ChunkLimits::kTokens;
    return joins ? left : std::min(left, chunk_tokens);
}

// How many of a chunk's last tokens are among the context's last ones.
std::size_t tail_of(const Arguments& a, std::size_t tokens, std::size_t first, std::size_t count) {
    const std::size_t begin = tokens - std::min(tokens, a.tail_tokens);
    return first + count - std::clamp(begin, first, first + count);
}

using EncodeChunk = std::function<Status(const ChunkInput&, std::vector<std::uint8_t>& object, Hash& chain)>;

// Where the user wants it. Throws Error where there is no such device.
EncodeChunk encoder_on(const std::string& device, EncodeOptions options, std::size_t jobs) {
    if (device == "cuda") {
        auto opened = device::DeviceEncoder::open(std::move(options));
        if (!opened.ok()) throw Error(fmt::format("--device cuda: {}", opened.status().message()));
        auto encoder = std::make_shared<device::DeviceEncoder>(std::move(opened.value()));
        return [encoder](const ChunkInput& input, std::vector<std::uint8_t>& object, Hash& chain) {
            return encoder->encode(input, object, chain);
        };
    }
    auto encoder = std::make_shared<ChunkEncoder>(std::move(options));
    auto pool = std::make_shared<ThreadPool>(jobs);
    return [encoder, pool](const ChunkInput& input, std::vector<std::uint8_t>& object, Hash& chain) {
        return encoder->encode(input, *pool, object, chain);
    };
}

void encode(const Arguments& a) {
    refuse_same_file(a.output, {a.input, a.calibration, layer_steps_file(a.layer_steps)});
    const KvInput kv(std::make_unique<SafetensorsReader>(a.input));
    const Layout& layout = kv.layout();
    const EncodeChunk encode_chunk = encoder_on(a.device, options_of(a, layout), a.jobs);
    OutputFile output(a.output);
    const std::size_t tokens = kv.token_ids().size();
    const std::uint64_t token_bytes = layout.token_bytes();
    Progress progress("kvenc", tokens * token_bytes, "B");
    std::vector<std::uint8_t> object;
    Hash chain = {};
    std::uint64_t written = 0;
    for (std::size_t first = 0, count = 0; first < tokens; first += count) {
        count = next_chunk(tokens - first, a.chunk_tokens);
        const std::vector<PlaneRows> rows = kv.rows(first);
        const ChunkInput input = {&layout,
                                  kv.model(),
                                  a.salt,
                                  std::span(kv.token_ids()).subspan(first, count),
                                  first,
                                  kv.base_position(),
                                  chain,
                                  rows,
                                  tail_of(a, tokens, first, count)};
        if (Status s = encode_chunk(input, object, chain); !s.ok())
            throw Error(fmt::format("{}: {}", a.input, s.message()));
        output.append(std::as_bytes(std::span(object)));
        written += object.size();
        progress.advance(count * token_bytes);
    }
    output.commit();
    if (a.quiet || a.output == "-") return;
    const auto values = static_cast<double>(tokens * layout.values_per_token());
    fmt::print("{}: {} tokens, {} -> {} bytes, {:.2f}x, {:.3f} bits/value\n", a.output, tokens,
               tokens * token_bytes, written,
               static_cast<double>(tokens * token_bytes) / static_cast<double>(written),
               8.0 * static_cast<double>(written) / values);
}

}  // namespace

int main(int argc, char** argv) {
    CLI::App app("Encodes a KV cache (safetensors) into kvcast chunks.", "kvenc");
    Arguments a;
    declare(app, a);
    return run_tool(app, argc, argv, [&] { encode(a); });
}
