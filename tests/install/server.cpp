// A stand-in for an inference server, built against an installed kvcast: it stores the KV cache of a context,
// and loads it again.
//     server store FOLDER     prints the manifest's name
//     server load URL         of the manifest; fails unless every element is as it was stored
#include <chrono>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <string>

#include "streamer/http/client.h"
#include "streamer/session.h"
#include "tools/client/codec_adapter.h"
#include "tools/client/publication.h"

namespace {

using namespace kvcast;

constexpr char kModel[] = "a model of two layers";
constexpr std::size_t kLayers = 2, kPlanes = 2, kTokens = 600;
constexpr PlaneShape kShape = {2, 64};
constexpr std::size_t kRowBytes = 2 * kShape.heads * kShape.head_dim;

Layout layout() {
    const Rope rope = {RopePairing::kHalf, 0, kShape.head_dim, geometric_frequencies(10000, kShape.head_dim)};
    return {kLayers, {kShape, kShape}, Dtype::kBf16, rope};
}

std::vector<std::int32_t> prompt() {
    std::vector<std::int32_t> ids(kTokens);
    std::iota(ids.begin(), ids.end(), 1000);
    return ids;
}

// The engine's memory: rows of [layer][plane], one plane after another.
class EngineMemory {
  public:
    EngineMemory() : planes_(kLayers * kPlanes, std::vector<std::uint8_t>(kTokens * kRowBytes)) {}

    std::uint8_t* rows(std::size_t layer, std::size_t plane, std::size_t token) {
        return planes_[layer * kPlanes + plane].data() + token * kRowBytes;
    }

    // As if it had been computed: small numbers of both signs.
    void prefill() {
        std::uint32_t random = 1;
        for (auto& plane : planes_) {
            for (std::size_t i = 0; i < plane.size(); i += 2) {
                random = random * 1664525 + 1013904223;
                plane[i] = static_cast<std::uint8_t>(random >> 24);
                plane[i + 1] = static_cast<std::uint8_t>((random >> 8 & 0x80) | 0x3e | (random >> 23 & 1));
            }
        }
    }

    bool operator==(const EngineMemory&) const = default;

  private:
    std::vector<std::vector<std::uint8_t>> planes_;
};

[[noreturn]] void fail(const std::string& why) {
    std::fprintf(stderr, "server: %s\n", why.c_str());
    std::exit(1);
}

template <typename T>
T require(Result<T> result) {
    if (!result.ok()) fail(result.status().message());
    return std::move(result.value());
}

std::string store(const std::string& folder) {
    EngineMemory memory;
    memory.prefill();
    const Layout shape = layout();
    const std::vector<std::int32_t> ids = prompt();
    std::vector<PlaneRows> rows;
    for (std::size_t i = 0; i < kLayers * kPlanes; ++i)
        rows.push_back({memory.rows(i / kPlanes, i % kPlanes, 0), kRowBytes});
    const auto destination = require(streamer::folder_destination(folder));
    client::PublishOptions options;
    options.levels = {0, 5};
    options.now = streamer::system_seconds();
    ThreadPool pool(2);
    return require(client::publish(*destination, {&shape, kModel, "", ids, 0, rows}, options, pool)).name;
}

class EngineSink final : public streamer::Sink {
  public:
    explicit EngineSink(EngineMemory& memory) : memory_(memory) {}

    void on_layer(std::size_t, streamer::TokenRange tokens, std::size_t layer,
                  std::span<const streamer::DecodedPlane> planes) override {
        for (std::size_t p = 0; p < planes.size(); ++p) {
            const auto* rows = static_cast<const std::uint8_t*>(planes[p].rows);
            for (std::size_t t = tokens.first; t < tokens.end; ++t, rows += planes[p].row_bytes)
                std::memcpy(memory_.rows(layer, p, t), rows, kRowBytes);
        }
    }

    void on_recompute(streamer::TokenRange, std::span<const std::int32_t>) override {
        fail("asked to recompute, although nothing was said of how fast that is");
    }

  private:
    EngineMemory& memory_;
};

void load(const std::string& url) {
    EngineMemory memory;
    EngineSink sink(memory);
    client::CodecAdapter codec(2, "");  // two threads, no folder for calibrations
    streamer::Client client({});
    streamer::Wanted wanted;
    wanted.manifest_url = url;
    wanted.token_ids = prompt();
    wanted.model = kModel;
    wanted.layout = layout();
    streamer::Session session(client.loop(), client.transport(), wanted, {}, codec, sink);
    const streamer::Summary summary = session.wait();
    if (!summary.status.ok()) fail(summary.status.message());
    EngineMemory computed;
    computed.prefill();
    if (memory != computed) fail("what was loaded is not what was stored");
    std::printf("%zu tokens of %zu chunks in %.0f ms\n", summary.tokens, summary.chunks.size(),
                summary.time * 1e3);
}

}  // namespace

int main(int argc, char** argv) {
    const std::string verb = argc == 3 ? argv[1] : "";
    if (verb == "store") {
        std::printf("%s\n", store(argv[2]).c_str());
    } else if (verb == "load") {
        load(argv[2]);
    } else {
        std::fprintf(stderr, "usage: server store FOLDER | load URL\n");
        return 2;
    }
    return 0;
}
