// kvpublish: a KV cache becomes a publication in a store, at several levels; and stores are cleaned up.
#include <fmt/format.h>

#include <algorithm>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <thread>

#include "streamer/http/http_destination.h"
#include "streamer/publisher.h"
#include "streamer/store.h"
#include "tools/client/publication.h"
#include "tools/common/calibration_file.h"
#include "tools/common/cli.h"
#include "tools/common/file.h"
#include "tools/common/kv_file.h"
#include "tools/common/layer_steps.h"
#include "tools/common/progress.h"
#include "tools/stream/options.h"

namespace {

using namespace kvcast;
using namespace kvcast::tools;
using namespace kvcast::streamer;

struct Arguments {
    std::string input;
    std::string target;
    std::string levels = "all";
    std::string calibration;
    std::string quality;
    std::string layer_steps = "flat";
    std::size_t block_heads = EncodeOptions{}.block_heads;
    std::size_t run_layers = EncodeOptions{}.run_layers;
    std::size_t chunk_tokens = 256;
    std::string ttl;
    std::string session;
    std::string salt;
    std::string key;
    bool without_tokens = false;
    bool extend = false;
    bool gc = false;
    bool dry_run = false;
    std::string grace;
    HttpOptions http;
    std::size_t jobs = std::max(1u, std::thread::hardware_concurrency());
    bool quiet = false;
};

void declare(CLI::App& app, Arguments& a) {
    app.add_option("IN", a.input, "KV cache (safetensors: k, v, token_ids); with --gc: a folder or s3://");
    app.add_option("DEST", a.target,
                   "folder to be served, or http://, https:// or s3://BUCKET/PREFIX, written with PUT");
    app.add_option("--levels", a.levels,
                   "all, or a list such as 0,2-5: 0 is lossless, then from finest to coarsest")
        ->check(level_list())
        ->capture_default_str();
    app.add_option("--calibration", a.calibration,
                   "publish the klt profile with this .kvcal; default: delta");
    app.add_option("--quality", a.quality, "what delta's levels cost this model: JSON as in data/quality");
    declare_coding(app, a.layer_steps, a.block_heads, a.run_layers);
    app.add_option("-c,--chunk", a.chunk_tokens, "tokens per chunk")
        ->check(CLI::Range(std::size_t{1}, ChunkLimits::kTokens))
        ->capture_default_str();
    app.add_option("--ttl", a.ttl, "life of the publication: 90s, 15m, 12h, 7d; default: no end");
    app.add_option("--session", a.session, "tag by which --gc can remove the publication");
    app.add_option("--salt", a.salt, "secret that keeps the chunks' identities apart from other tenants'");
    app.add_option("--sign", a.key, "Ed25519 private key (PEM) that signs the manifest");
    app.add_flag("--without-tokens", a.without_tokens, "keep the token ids out of the manifest");
    app.add_flag(
        "--extend", a.extend,
        "take over leading chunks that DEST has at these levels; with --sign: where that key signed");
    app.add_flag("--gc", a.gc, "remove what is expired, or of --session, and objects that no manifest names");
    app.add_flag("--dry-run", a.dry_run, "with --gc: only say what would be removed");
    app.add_option("--grace", a.grace,
                   "with --gc: leave unnamed objects that are younger: 0s, 90s, 15m; default: 1h");
    app.add_option("--ca-file", a.http.ca_file, "certificates to trust (PEM) instead of the system's");
    app.add_option("-j,--jobs", a.jobs, "threads")->check(CLI::Range(1, 1024))->capture_default_str();
    app.add_flag("-q,--quiet", a.quiet, "print nothing on success");
}

// "0,2-5" as levels in ascending order.
std::vector<unsigned> parse_levels(const std::string& text, unsigned last) {
    std::vector<unsigned> out;
    if (text == "all") {
        for (unsigned l = 0; l <= last; ++l) out.push_back(l);
        return out;
    }
    std::size_t at = 0;
    while (at <= text.size()) {
        const std::size_t end = std::min(text.find(',', at), text.size());
        const Range r = parse_range(text.substr(at, end - at), last + 1, "levels");
        for (std::size_t l = r.first; l < r.end; ++l) out.push_back(static_cast<unsigned>(l));
        at = end + 1;
    }
    std::ranges::sort(out);
    out.erase(std::unique(out.begin(), out.end()), out.end());
    return out;
}

// KL by level of the delta profile with such steps, measured on `model`, from a file as bench/rd writes it.
std::map<unsigned, double> read_quality(const std::string& path, const std::string& model,
                                        const std::string& layer_steps) {
    std::map<unsigned, double> out;
    if (path.empty()) return out;
    const MappedFile file(path);
    const auto* text = reinterpret_cast<const char*>(file.bytes().data());
    const auto json = nlohmann::json::parse(text, text + file.bytes().size(), nullptr, false);
    std::string of = model;
    try {
        of = json.value("model", model);
        const char* const profile =
            layer_steps == "flat" ? "kvcast delta, flat steps" : "kvcast delta, measured steps";
        for (const auto& row : json.at("profiles").at(profile))
            out[row.at("level").get<unsigned>()] = std::max(row.at("kl").get<double>(), 0.0);
    } catch (const nlohmann::json::exception&) {
        throw DamagedInput(
            fmt::format("{}: expected the levels of delta and their KL, as in data/quality", path));
    }
    if (of != model)
        throw Error(fmt::format("{}: measured on model '{}', the KV cache is of '{}'", path, of, model));
    return out;
}

void report(const client::Published& published, bool extended, const std::string& url) {
    const Manifest& m = published.manifest;
    const double plain = static_cast<double>(m.tokens() * m.layout.token_bytes());
    fmt::print("{:>5} {:>9} {:>12} {:>8} {:>9}\n", "level", "profile", "bytes", "ratio", "KL");
    for (const ManifestLevel& l : m.levels) {
        std::uint64_t bytes = 0;
        for (const ManifestChunk& c : m.chunks)
            bytes += std::ranges::find(c.objects, l.level, &ManifestObject::level)->bytes;
        fmt::print("{:>5} {:>9} {:>12} {:>7.2f}x {:>9}\n", l.level, profile_name(l.profile), bytes,
                   plain / static_cast<double>(bytes), l.kl ? fmt::format("{:.4f}", *l.kl) : "unknown");
    }
    if (extended)
        fmt::print("{} tokens in {} chunks were taken over\n", published.tokens_taken_over,
                   published.chunks_taken_over);
    const PublishedBytes& b = published.bytes;
    fmt::print("{} tokens in {} chunks: {} objects written ({} bytes), {} were there ({} bytes)\n{}\n",
               m.tokens(), m.chunks.size(), b.objects_written, b.written, b.objects_reused, b.reused, url);
}

void publish(const Arguments& a) {
    const KvInput kv(std::make_unique<SafetensorsReader>(a.input));
    const std::vector<PlaneRows> planes = kv.rows(0);
    const client::Context context = {&kv.layout(),   kv.model(),         a.salt,
                                     kv.token_ids(), kv.base_position(), planes};
    client::PublishOptions options;
    std::optional<MappedFile> calibration;
    if (!a.calibration.empty()) {
        calibration.emplace(a.calibration);
        options.calibration_file = calibration->octets();
        options.calibration = read_calibration(*calibration, a.calibration);
    }
    options.levels = parse_levels(a.levels, client::last_level(options.calibration.get()));
    options.delta_kl = read_quality(a.quality, kv.model(), a.layer_steps);
    options.layer_steps = choose_layer_steps(a.layer_steps, kv.layout());
    options.block_heads = a.block_heads;
    options.run_layers = a.run_layers;
    options.chunk_tokens = a.chunk_tokens;
    options.now = system_seconds();
    if (!a.ttl.empty()) options.ttl = parse_duration("--ttl", a.ttl);
    options.session = a.session;
    options.with_tokens = !a.without_tokens;
    options.extend = a.extend;
    std::optional<PrivateKey> key;
    if (!a.key.empty()) options.key = &key.emplace(load_private_key(a.key));
    Progress progress("kvpublish", kv.token_ids().size(), "tokens");
    options.on_chunk = [&](std::size_t tokens) {
        progress.advance(tokens);
        return true;
    };
    const auto destination = require(open_destination(a.target, a.http, process_variables));
    ThreadPool pool(a.jobs);
    const auto published = client::publish(*destination, context, options, pool);
    if (!published.ok()) throw Error(fmt::format("{}: {}", a.input, published.status().message()));
    if (!a.quiet) report(published.value(), a.extend, join_url(destination->root(), published.value().name));
}

void collect_garbage(const Arguments& a) {
    CollectOptions options;
    options.now = system_seconds();
    if (!a.session.empty()) options.session = a.session;
    if (!a.grace.empty()) options.grace_seconds = parse_duration("--grace", a.grace);
    options.dry_run = a.dry_run;
    const auto destination = require(open_destination(a.input, a.http, process_variables));
    const Collection c = require(collect(*destination, options));
    if (a.quiet) return;
    fmt::print(
        "{}: {} {} publications and {} objects ({} bytes); kept {} publications, {} objects, {} young ones\n",
        a.input, a.dry_run ? "would remove" : "removed", c.manifests_removed, c.objects_removed,
        c.bytes_removed, c.manifests_kept, c.objects_kept, c.objects_young);
}

void run(const Arguments& a) {
    if (a.gc) {
        if (a.input.empty() || !a.target.empty()) throw Error("kvpublish --gc takes one argument, the store");
        if (!is_url(a.input) && !std::filesystem::is_directory(a.input))
            throw Error(fmt::format("{}: not a folder", a.input));
        return collect_garbage(a);
    }
    if (a.input.empty() || a.target.empty())
        throw Error("kvpublish takes two arguments, a KV cache and a store");
    if (a.dry_run || !a.grace.empty()) throw Error("--dry-run and --grace need --gc");
    if (!a.quality.empty() && !a.calibration.empty())
        throw Error("--quality is for delta; a calibration knows its own");
    if (!a.quality.empty() && a.layer_steps == "thirds")
        throw Error("--quality knows flat steps and measured ones, not thirds");
    if (a.layer_steps != "flat" && !a.calibration.empty())
        throw Error("--layer-steps is for delta; a calibration has its own metric");
    if (!a.ttl.empty() && parse_duration("--ttl", a.ttl) == 0)
        throw Error("--ttl is 0: the publication would never be valid");
    require(check_destination(a.target));
    publish(a);
}

}  // namespace

int main(int argc, char** argv) {
    CLI::App app("Publishes a KV cache at several levels to a store, and cleans stores up (--gc).",
                 "kvpublish");
    Arguments a;
    declare(app, a);
    return run_tool(app, argc, argv, [&] { run(a); });
}
