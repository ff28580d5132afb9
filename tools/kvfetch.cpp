// kvfetch: a publication becomes a KV cache again, before a deadline.
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>
#include <thread>

#include "streamer/http/client.h"
#include "streamer/http/location.h"
#include "streamer/rules/rules.h"
#include "streamer/session.h"
#include "tools/client/calibration_cache.h"
#include "tools/client/codec_adapter.h"
#include "tools/client/link_memory.h"
#include "tools/common/cli.h"
#include "tools/common/file.h"
#include "tools/common/progress.h"
#include "tools/report/session_page.h"
#include "tools/stream/cache_sink.h"
#include "tools/stream/engine.h"
#include "tools/stream/options.h"

namespace {

using namespace kvcast;
using namespace kvcast::client;
using namespace kvcast::tools;
using namespace kvcast::streamer;

constexpr int kExitIncomplete = 4;
constexpr double kDoubtOfTheUser = 0.5;                      // of --bandwidth
constexpr double kLongestSilence = 5, kShortestSilence = 1;  // seconds, unless --timeout says otherwise

struct Arguments {
    std::string url;
    std::string output;
    std::string report;
    std::optional<double> deadline_ms;
    std::string policy = "two-pointer";
    std::optional<unsigned> finest;
    std::string model;
    double prefill_speed = 0;
    std::size_t greedy = 0;
    std::vector<std::string> trusted;
    std::string tokens;
    std::string salt;
    std::optional<double> bandwidth_mbit;
    double hedge_ms = 0;
    std::optional<double> timeout_s;
    std::size_t transfers = kMostTransfers;
    std::string cache = default_cache_folder();
    HttpOptions http;
    std::size_t jobs = std::max(1u, std::thread::hardware_concurrency());
    std::string device = "cpu";
    bool json = false;
    bool quiet = false;
};

void declare(CLI::App& app, Arguments& a) {
    app.add_option("URL", a.url,
                   "a publication's manifest: http://, https:// or s3://BUCKET/.../manifests/NAME.json")
        ->required();
    app.add_option("-o,--output", a.output, "safetensors file to write");
    app.add_option("--report", a.report, "HTML page to write: what was decided, when and why");
    app.add_option("--deadline", a.deadline_ms,
                   "milliseconds until the KV has to be there; default: none, finest level")
        ->check(positive_number());
    app.add_option("--policy", a.policy, kRuleNames)->capture_default_str();
    app.add_option("--finest", a.finest, "load no level finer than this one")->check(CLI::Range(0u, 255u));
    app.add_option("--model", a.model, "Hugging Face directory: recompute with it what is not loaded");
    app.add_option(
           "--prefill-speed", a.prefill_speed,
           "tokens per second that recomputing is planned with; default: measured with --model, else never")
        ->check(positive_number());
    app.add_option("--greedy", a.greedy,
                   "with --model: continue by this many tokens, and say when the first one was there");
    app.add_option("--trust", a.trusted,
                   "Ed25519 public key (PEM): accept only manifests that it has signed; may be repeated")
        ->allow_extra_args(false);
    app.add_option("--tokens", a.tokens,
                   "the context's token ids (JSON array): for a publication without them, and what it lacks");
    app.add_option("--salt", a.salt, "the salt that the publication was made with");
    app.add_option("--bandwidth", a.bandwidth_mbit,
                   "Mbit/s to assume before anything is measured; default: what the last run saw, else 100")
        ->check(positive_number());
    app.add_option("--hedge", a.hedge_ms, "send a second request after this many milliseconds of silence")
        ->check(positive_number());
    app.add_option("--timeout", a.timeout_s,
                   "seconds of silence after which a request is given up; default: 5, or the deadline where "
                   "that is shorter, but at least 1")
        ->check(positive_number())
        ->check(CLI::Range(0.001, 86400.0));
    app.add_option("--transfers", a.transfers, "objects fetched at once, at most")
        ->check(CLI::Range(1, 64))
        ->capture_default_str();
    app.add_option("--cache", a.cache,
                   "folder that keeps calibrations, and what is known of links; empty: none")
        ->capture_default_str();
    app.add_option("--ca-file", a.http.ca_file, "certificates to trust (PEM) instead of the system's");
    app.add_option("-j,--jobs", a.jobs, "threads that decode")
        ->check(CLI::Range(1, 1024))
        ->capture_default_str();
    declare_device(app, a.device);
    app.add_flag("--json", a.json, "print everything as JSON");
    app.add_flag("-q,--quiet", a.quiet, "print nothing on success");
}

// The place of a manifest, with credentials where it is in S3.
std::string resolve(const Arguments& a, HttpOptions& http) {
    Location location = require(locate(a.url, process_variables));
    http.s3 = std::move(location.s3);
    return location.url;
}

// Told by the user, seen by the last run with this server, or a guess.
NetworkPrior network_of(const Arguments& a, const std::string& url) {
    NetworkPrior link = remembered_link(a.cache, url).value_or(NetworkPrior{});
    if (a.bandwidth_mbit) {
        link.bytes_per_second = *a.bandwidth_mbit * 1e6 / 8;
        link.doubt = kDoubtOfTheUser;
    }
    return link;
}

// Of this machine: no KV that is put together in it is larger.
std::uint64_t physical_memory() {
    return static_cast<std::uint64_t>(::sysconf(_SC_PHYS_PAGES)) *
           static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
}

// Of silence.
Duration timeout_of(const Arguments& a) {
    const double patience = a.deadline_ms ? *a.deadline_ms / 1e3 : kLongestSilence;
    return from_seconds(a.timeout_s.value_or(std::clamp(patience, kShortestSilence, kLongestSilence)));
}

SessionOptions options_of(const Arguments& a, const std::string& url, Engine* engine) {
    SessionOptions o;
    if (a.deadline_ms) o.deadline = *a.deadline_ms / 1e3;
    o.rule = require(rule_by_name(a.policy));
    o.finest_level = a.finest;
    o.transfers = a.transfers;
    o.record = !a.report.empty();
    o.network = network_of(a, url);
    o.compute.decode_bytes_per_second =
        a.device == "cpu" ? expected_decode_speed(a.jobs) : kExpectedDeviceSpeed;
    if (a.prefill_speed > 0) {
        o.compute.prefill = {{0, a.prefill_speed}};
    } else if (engine != nullptr) {
        o.compute.prefill = engine->measure_prefill();
    }
    o.kv_bytes = physical_memory();
    o.download.first_byte_timeout = o.download.stall_timeout = timeout_of(a);
    if (a.hedge_ms > 0) o.download.hedge_after = from_seconds(a.hedge_ms / 1e3);
    for (const std::string& path : a.trusted) o.trusted.push_back(load_public_key(path));
    return o;
}

struct Outcome {
    Summary summary;
    std::vector<std::int32_t> continuation;
    double first_token = 0;  // seconds since the session began
};

Outcome fetch(const Arguments& a, const Wanted& wanted, Client& client, CodecAdapter& codec, CacheSink& sink,
              Engine* engine) {
    const std::string& url = wanted.manifest_url;
    SessionOptions options = options_of(a, url, engine);
    options.memory = client.memory();
    // Where the manifest cannot be had, all of it is text.
    if (!wanted.token_ids.empty())
        sink.expect(engine != nullptr ? engine->blank(wanted.token_ids)
                                      : KvCache{{}, "", 0, wanted.token_ids, {}});
    Outcome out;
    const Time start = Clock::now();
    {
        Session session(client.loop(), client.transport(), wanted, options, codec, sink);
        Progress progress("kvfetch", 0, "tokens");
        std::size_t shown = 0;
        while (!session.wait_for(std::chrono::milliseconds(100))) {
            const std::size_t there = sink.tokens_there();
            progress.advance(there - shown);
            shown = there;
        }
        out.summary = session.wait();
    }
    const Status& status = out.summary.status;
    if (!status.ok()) raise(fmt::format("{}: {}", a.url, status.message()), status.code());
    if (out.summary.network_measured) remember_link(a.cache, url, out.summary.network);
    if (engine != nullptr && a.greedy > 0 && sink.complete_tokens() == out.summary.tokens) {
        engine->greedy(sink.cache(), 1);
        out.first_token = to_seconds(Clock::now() - start);
        out.continuation = engine->greedy(sink.cache(), a.greedy);
    }
    return out;
}

// Seconds between the deadline and the end; negative: there was time left.
std::optional<double> lateness(const Arguments& a, const Summary& s) {
    if (!a.deadline_ms) return std::nullopt;
    return s.time - *a.deadline_ms / 1e3;
}

// What the summary says of the deadline.
std::string verdict(const Arguments& a, const Outcome& o, const CacheSink& sink) {
    const std::optional<double> late = lateness(a, o.summary);
    if (!late) return "";
    const char* const rest = sink.left_out().empty() ? "" : ", but for what is left out";
    if (*late <= 0) return fmt::format("; in time for the deadline of {:g} ms{}", *a.deadline_ms, rest);
    return fmt::format("; deadline of {:g} ms missed by {:.0f} ms", *a.deadline_ms, std::ceil(*late * 1e3));
}

void print_table(const Arguments& a, const Outcome& o, const CacheSink& sink, const CodecAdapter& codec) {
    const Summary& s = o.summary;
    fmt::print("{:>5} {:>13} {:>6} {:>10} {:>4} {:>8} {:>8} {:>8}  {}\n", "chunk", "tokens", "level", "bytes",
               "reqs", "chosen", "here", "ready", "why");
    for (std::size_t i = 0; i < s.chunks.size(); ++i) {
        const ChunkReport& c = s.chunks[i];
        fmt::print("{:>5} {:>13} {:>6} {:>10} {:>4} {:>5.0f} ms {:>8} {:>5.0f} ms  {}\n", i,
                   fmt::format("{}-{}", c.tokens.first, c.tokens.end - 1),
                   c.text ? "text" : fmt::format("{}", c.level), c.text ? 0 : c.bytes, c.requests,
                   c.decided * 1e3, c.text ? "-" : fmt::format("{:.0f} ms", c.received * 1e3), c.ready * 1e3,
                   c.reason);
        if (!c.trouble.empty()) fmt::print("      {}\n", c.trouble);
    }
    fmt::print("{} tokens, {} of them text, in {:.0f} ms (manifest {:.0f} ms); {} bytes; expected KL {}{}\n",
               s.tokens, s.text_tokens, s.time * 1e3, s.manifest_time * 1e3, s.network_bytes,
               s.kl < 0 ? "unknown" : fmt::format("{:.4f}", s.kl), verdict(a, o, sink));
    if (codec.decode_seconds() > 0) {
        fmt::print("decoding took {:.0f} ms at {:.0f} MB/s{}\n", codec.decode_seconds() * 1e3,
                   static_cast<double>(codec.decoded_bytes()) / codec.decode_seconds() / 1e6,
                   sink.recompute_seconds() > 0
                       ? fmt::format(", recomputing {:.0f} ms", sink.recompute_seconds() * 1e3)
                       : "");
    }
    if (!o.continuation.empty())
        fmt::print("first token after {:.0f} ms; continuation: {}\n", o.first_token * 1e3,
                   fmt::join(o.continuation, " "));
}

nlohmann::json to_json(const Arguments& a, const Outcome& o, const CacheSink& sink) {
    const Summary& s = o.summary;
    nlohmann::json out = {{"seconds", s.time},
                          {"manifest_seconds", s.manifest_time},
                          {"network_bytes", s.network_bytes},
                          {"tokens", s.tokens},
                          {"text_tokens", s.text_tokens},
                          {"kl", s.kl < 0 ? nlohmann::json() : nlohmann::json(s.kl)},
                          {"chunks", nlohmann::json::array()},
                          {"decisions", nlohmann::json::array()}};
    if (const std::optional<double> late = lateness(a, s))
        out.update({{"deadline_seconds", *a.deadline_ms / 1e3}, {"missed", *late > 0}});
    for (const ChunkReport& c : s.chunks) {
        nlohmann::json chunk = {{"first", c.tokens.first}, {"end", c.tokens.end},  {"text", c.text},
                                {"requests", c.requests},  {"decided", c.decided}, {"received", c.received},
                                {"ready", c.ready},        {"reason", c.reason},   {"trouble", c.trouble}};
        if (!c.text) chunk.update({{"level", c.level}, {"bytes", c.bytes}});
        if (!c.text && c.kl >= 0) chunk["kl"] = c.kl;
        out["chunks"].push_back(std::move(chunk));
    }
    for (const DecisionRecord& d : sink.decisions()) {
        nlohmann::json record = {{"time", d.time},
                                 {"chunk", d.decision.chunk},
                                 {"text", d.decision.kind == Decision::Kind::kText},
                                 {"reason", d.decision.reason},
                                 {"bytes_per_second", d.network.robust},
                                 {"first_byte", d.network.first_byte}};
        if (d.decision.kind == Decision::Kind::kLoad) record.update({{"level", d.level}, {"bytes", d.bytes}});
        out["decisions"].push_back(std::move(record));
    }
    if (!o.continuation.empty())
        out.update({{"first_token_seconds", o.first_token}, {"continuation", o.continuation}});
    return out;
}

// Where results go, opened before anything is fetched.
struct Outputs {
    std::optional<OutputFile> kv;
    std::optional<OutputFile> report;
};

Outputs open_outputs(const Arguments& a) {
    if (a.output == "-") throw Error("kvfetch writes a file, not standard output: safetensors needs seeking");
    std::vector<std::string> read = a.trusted;
    read.insert(read.end(), {a.tokens, a.http.ca_file});
    refuse_same_file(a.report, read);
    read.push_back(a.report);
    refuse_same_file(a.output, read);
    Outputs out;
    if (!a.output.empty()) out.kv.emplace(a.output);
    if (!a.report.empty()) out.report.emplace(a.report);
    return out;
}

void write_report(const Arguments& a, const Summary& s, OutputFile& file) {
    const std::string page = render({.title = a.url, .rule = a.policy, .recording = &*s.recording});
    file.append(std::as_bytes(std::span(page)));
    file.commit();
}

std::unique_ptr<CodecAdapter> open_codec(const Arguments& a) {
    if (a.device != "cuda") return std::make_unique<CodecAdapter>(a.jobs, a.cache);
    auto decoder = device::DeviceDecoder::open({});
    if (!decoder.ok()) throw Error(fmt::format("--device cuda: {}", decoder.status().message()));
    return std::make_unique<CodecAdapter>(std::move(decoder.value()), a.cache);
}

void print_left_out(const Arguments& a, const Summary& s, const CacheSink& sink) {
    if (!s.publication.ok()) fmt::print(stderr, "kvfetch: {}: {}\n", a.url, s.publication.message());
    for (const TokenRange r : sink.left_out())
        fmt::print(stderr, "kvfetch: tokens {}-{} are left to be recomputed from text\n", r.first, r.end - 1);
    if (a.output.empty()) return;
    const std::size_t complete = sink.complete_tokens();
    fmt::print(stderr, "kvfetch: {}: {}\n", a.output,
               complete == 0 ? "not written" : fmt::format("the first {} tokens", complete));
}

// Returns the exit code: some tokens may be left for the caller to recompute.
int run(const Arguments& a) {
    if (a.greedy > 0 && a.model.empty()) throw Error("--greedy needs --model");
    HttpOptions http = a.http;
    http.connect_timeout = std::min(http.connect_timeout, timeout_of(a));
    Wanted wanted;
    wanted.manifest_url = resolve(a, http);
    wanted.salt = a.salt;
    if (!a.tokens.empty()) wanted.token_ids = read_token_ids(a.tokens);
    Outputs outputs = open_outputs(a);
    std::unique_ptr<Engine> engine;
    if (!a.model.empty()) engine = load_engine(a.model, static_cast<int>(a.jobs));
    Client client(http);
    const auto codec_owner = open_codec(a);
    CodecAdapter& codec = *codec_owner;
    CacheSink sink(engine ? Recompute([&](const KvCache& context, std::span<const std::int32_t> ids) {
        return engine->recompute(context, ids);
    })
                          : nullptr);
    const Outcome outcome = fetch(a, wanted, client, codec, sink, engine.get());
    if (!sink.error().empty()) throw Error("recomputing: " + sink.error());
    const std::size_t complete = sink.complete_tokens();
    if (outputs.kv && complete > 0) save_kv(std::move(*outputs.kv), first_tokens(sink.cache(), complete));
    if (outputs.report) write_report(a, outcome.summary, *outputs.report);
    if (a.json) {
        fmt::print("{}\n", to_json(a, outcome, sink).dump(2));
    } else if (!a.quiet) {
        print_table(a, outcome, sink, codec);
    }
    if (sink.left_out().empty()) return kExitOk;
    print_left_out(a, outcome.summary, sink);
    return kExitIncomplete;
}

}  // namespace

int main(int argc, char** argv) {
    CLI::App app("Fetches a published KV cache before a deadline, at the best quality the network allows.",
                 "kvfetch");
    Arguments a;
    declare(app, a);
    app.footer(fmt::format("{}, {} tokens are left to be recomputed.", kExitCodes, kExitIncomplete));
    int code = kExitOk;
    const int failed = run_tool(app, argc, argv, [&] {
        if (!a.model.empty()) prepare_for_engine(argv);
        code = run(a);
    });
    return failed != kExitOk ? failed : code;
}
