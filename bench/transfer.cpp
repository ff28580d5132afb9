// bench_transfer: how fast a session's network side is, and what it costs the CPU. Objects are fetched and
// checked (hash, header), not decoded. Prints one JSON object; fails if anything was not loaded.
#include <fmt/format.h>
#include <sys/resource.h>

#include <CLI/CLI.hpp>

#include "streamer/http/client.h"
#include "streamer/rules/rules.h"
#include "streamer/session.h"
#include "tools/common/cli.h"
#include "tools/common/file.h"
#include "tools/stream/options.h"

namespace {

using namespace kvcast;
using namespace kvcast::streamer;

// Takes everything and decodes nothing.
class NoCodec final : public ChunkCodec {
  public:
    bool has_calibration(const Hash&) override { return true; }
    Status add_calibration(std::span<const std::uint8_t>) override { return {}; }
    Status decode(std::span<const std::uint8_t>, const LayerCallback&) override { return {}; }
};

class NoSink final : public Sink {
  public:
    void on_layer(std::size_t, TokenRange, std::size_t, std::span<const DecodedPlane>) override {}
    void on_recompute(TokenRange, std::span<const std::int32_t>) override {}
};

double cpu_seconds() {
    rusage usage = {};
    ::getrusage(RUSAGE_SELF, &usage);
    const auto seconds = [](const timeval& t) {
        return static_cast<double>(t.tv_sec) + 1e-6 * static_cast<double>(t.tv_usec);
    };
    return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

struct Arguments {
    std::string url;
    std::string policy = "fixed:0";
    std::size_t transfers = 2;
    std::size_t sessions = 1;
};

void run(const Arguments& a) {
    Client client({});
    NoCodec codec;
    std::uint64_t bytes = 0;
    double received = 0;
    const double cpu = cpu_seconds();
    for (std::size_t i = 0; i < a.sessions; ++i) {
        NoSink sink;
        Wanted wanted;
        wanted.manifest_url = a.url;
        SessionOptions options;
        options.rule = tools::require(rule_by_name(a.policy));
        options.transfers = a.transfers;
        options.memory = client.memory();
        Session session(client.loop(), client.transport(), wanted, options, codec, sink);
        const Summary s = session.wait();
        tools::require(s.status);
        if (s.text_tokens != 0) throw tools::Error(fmt::format("{} tokens were not loaded", s.text_tokens));
        double last = 0;
        for (const ChunkReport& c : s.chunks) {
            bytes += c.bytes;
            last = std::max(last, c.received);
        }
        received += last - s.manifest_time;
    }
    fmt::print("{{\"bytes\": {}, \"seconds\": {:.6f}, \"cpu_seconds\": {:.6f}}}\n", bytes, received,
               cpu_seconds() - cpu);
}

}  // namespace

int main(int argc, char** argv) {
    CLI::App app("Measures the network side of a session: fetches and checks, decodes nothing.",
                 "bench_transfer");
    Arguments a;
    app.add_option("URL", a.url, "a publication's manifest")->required();
    app.add_option("--policy", a.policy)->capture_default_str();
    app.add_option("--transfers", a.transfers)->capture_default_str();
    app.add_option("--sessions", a.sessions, "sessions one after another, over the same connections")
        ->capture_default_str();
    return tools::run_tool(app, argc, argv, [&] { run(a); });
}
