// Sessions that decode on a device, over the emulated runtime: straight into an engine's memory, and kvfetch
// with --device cuda.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>

#include <cstdlib>

#include "streamer/http/client.h"
#include "streamer/rules/rules.h"
#include "streamer/store.h"
#include "tests/simt/runtime.h"
#include "tests/streamer/fault_server.h"
#include "tests/streamer/publication.h"
#include "tools/client/codec_adapter.h"
#include "tools/client/device_codec.h"
#include "tools/client/kvcast.h"

namespace kvcast::test {
namespace {

using namespace streamer;
using testing::HasSubstr;

// The KV of a whole context on the device, as an engine keeps it: planes [layer][plane] of all tokens.
class EngineMemory {
  public:
    EngineMemory(const Layout& layout, std::size_t tokens) : layout_(layout) {
        for (std::size_t i = 0; i < layout.layers * layout.planes.size(); ++i)
            planes_.push_back(static_cast<std::byte*>(simt::allocate(tokens * row_bytes(i))));
    }
    ~EngineMemory() {
        for (std::byte* plane : planes_) simt::release(plane);
    }
    EngineMemory(const EngineMemory&) = delete;
    EngineMemory& operator=(const EngineMemory&) = delete;

    std::vector<device::DevicePlane> place(const ChunkHeader& header) const {
        std::vector<device::DevicePlane> out;
        for (std::size_t i = 0; i < planes_.size(); ++i)
            out.push_back({.rows = row(i, header.first_token), .row_bytes = row_bytes(i)});
        return out;
    }
    std::size_t row_bytes(std::size_t plane) const { return layout_.row_bytes(plane); }
    std::byte* row(std::size_t plane, std::size_t token) const {
        return planes_[plane] + token * row_bytes(plane);
    }

  private:
    Layout layout_;
    std::vector<std::byte*> planes_;
};

class DeviceSession : public testing::Test {
  protected:
    DeviceSession() : store_(std::move(folder_destination(folder_.path()).value())) {
        options_.wall_clock = [] { return 1'800'000'100; };
    }

    void serve(bool klt) {
        PublicationOptions publication;
        publication.klt = klt;
        if (klt) publication.levels = {0, 1, 3};
        published_.emplace(publish(*store_, publication));
        server_.emplace(folder_.path());
        wanted_.manifest_url = server_->url(published_->name);
        wanted_.token_ids = published_->token_ids;
    }

    // The sink checks every layer's bytes at the addresses that it is given.
    Summary fetch(ChunkCodec& codec) {
        CheckingSink sink(*published_);
        Client client({});
        Session session(client.loop(), client.transport(), wanted_, options_, codec, sink);
        const Summary summary = session.wait();
        sink.expect_complete(summary, published_->token_ids.size());
        return summary;
    }

    // What lies in the engine's memory is what was published of these levels.
    void expect_planes(const EngineMemory& memory, const Summary& summary) const {
        for (std::size_t i = 0; i < summary.chunks.size(); ++i) {
            const ChunkReport& c = summary.chunks[i];
            const Planes& expected = published_->expected.at({i, c.level});
            for (std::size_t p = 0; p < expected.size(); ++p) {
                EXPECT_EQ(0,
                          std::memcmp(memory.row(p, c.tokens.first), expected[p].data(), expected[p].size()))
                    << "chunk " << i << ", plane " << p;
            }
        }
    }

    tools::ScratchDirectory folder_;
    std::unique_ptr<Destination> store_;
    std::optional<Published> published_;
    std::optional<FaultServer> server_;
    Wanted wanted_;
    SessionOptions options_;
};

client::DeviceCodec codec_into(const EngineMemory& memory) {
    auto decoder = device::DeviceDecoder::open({});
    EXPECT_TRUE(decoder.ok()) << decoder.status().message();
    return {std::move(decoder.value()), [&](const ChunkHeader& h) { return memory.place(h); }, ""};
}

TEST_F(DeviceSession, BringsKvStraightIntoTheEnginesMemory) {
    for (const bool klt : {false, true}) {
        serve(klt);
        const EngineMemory memory(published_->manifest.layout, published_->token_ids.size());
        client::DeviceCodec codec = codec_into(memory);
        for (const unsigned level : klt ? std::vector<unsigned>{1, 3, 0} : std::vector<unsigned>{0, 2, 6}) {
            options_.rule = fixed_level_rule(level);
            const Summary summary = fetch(codec);
            EXPECT_EQ(summary.text_tokens, 0u);
            expect_planes(memory, summary);
        }
    }
}

// The publisher's own mistake: the manifest promises a damaged object, hash and all.
TEST_F(DeviceSession, ReplacesAnObjectThatDoesNotDecode) {
    serve(false);
    Manifest m = published_->manifest;
    ManifestObject& promise = m.chunks[1].objects[1];
    auto object = store_->get(object_name(m.chunks[1].chain, promise)).value();
    object.back() ^= 0x55;
    auto publisher = Publisher::open(*store_, m.created);
    promise = publisher.value().put_object(m.chunks[1].chain, 2, object).value();
    ASSERT_TRUE(publisher.value().finish(m, nullptr).ok());
    published_->manifest = m;
    options_.rule = fixed_level_rule(2);
    const EngineMemory memory(m.layout, published_->token_ids.size());
    client::DeviceCodec codec = codec_into(memory);
    const Summary summary = fetch(codec);
    EXPECT_EQ(summary.text_tokens, 0u);
    EXPECT_NE(summary.chunks[1].level, 2u);
    expect_planes(memory, summary);
}

TEST_F(DeviceSession, DecodesToHostMemoryOnADevice) {
    serve(true);
    options_.rule = fixed_level_rule(1);
    auto decoder = device::DeviceDecoder::open({});
    ASSERT_TRUE(decoder.ok());
    client::CodecAdapter codec(std::move(decoder.value()), "");
    EXPECT_EQ(fetch(codec).text_tokens, 0u);
    EXPECT_GT(codec.decoded_bytes(), 0u);
}

// ---- the C interface ----

// An engine in C whose memory is the device's, and which may have no room for one chunk.
struct CEngine {
    const EngineMemory* memory;
    const Layout* layout;
    std::size_t refused = std::size_t(-1);  // the first token of a chunk
    std::size_t placed = 0, layers = 0, computed = 0;

    kvcast_sink sink() {
        kvcast_sink s = {};
        s.struct_bytes = sizeof s;
        s.user = this;
        s.on_place = [](void* user, std::size_t first, std::size_t end, kvcast_place* places) {
            auto& e = *static_cast<CEngine*>(user);
            if (first == e.refused) return 1;
            EXPECT_LT(first, end);
            for (std::size_t i = 0; i < e.layout->layers * e.layout->planes.size(); ++i) {
                places[i].rows = e.memory->row(i, first);
                places[i].row_bytes = e.memory->row_bytes(i);
            }
            ++e.placed;
            return 0;
        };
        s.on_layer = [](void* user, std::size_t first, std::size_t, std::uint32_t layer,
                        const kvcast_rows* rows) {
            auto& e = *static_cast<CEngine*>(user);
            for (std::size_t p = 0; p < e.layout->planes.size(); ++p)
                EXPECT_EQ(rows[p].rows, e.memory->row(layer * e.layout->planes.size() + p, first));
            ++e.layers;
        };
        s.on_recompute = [](void* user, std::size_t first, std::size_t end, const std::int32_t*) {
            static_cast<CEngine*>(user)->computed += end - first;
        };
        return s;
    }
};

class CDeviceSession : public DeviceSession {
  protected:
    void SetUp() override {
        serve(true);
        const Layout& l = published_->manifest.layout;
        layout_ = {static_cast<std::uint32_t>(l.layers),
                   2,
                   {},
                   {},
                   KVCAST_BF16,
                   KVCAST_HALF,
                   0,
                   static_cast<std::uint32_t>(l.rope.dim),
                   geometric_theta(l.rope.frequencies),
                   nullptr};
        for (std::size_t p = 0; p < 2; ++p) {
            layout_.heads[p] = static_cast<std::uint32_t>(l.planes[p].heads);
            layout_.head_dim[p] = static_cast<std::uint32_t>(l.planes[p].head_dim);
        }
        kvcast_client_options options = {};
        options.struct_bytes = sizeof options;
        options.device = "cuda";
        ASSERT_EQ(kvcast_client_open(&options, &client_), KVCAST_OK) << kvcast_message();
    }
    void TearDown() override { kvcast_client_close(client_); }

    kvcast_summary fetch_by(const kvcast_sink& sink, const char* rule) {
        kvcast_request r = {};
        r.struct_bytes = sizeof r;
        r.manifest_url = wanted_.manifest_url.c_str();
        r.layout = &layout_;
        r.model = "synthetic";
        r.token_ids = published_->token_ids.data();
        r.tokens = published_->token_ids.size();
        r.rule = rule;
        kvcast_session* session = nullptr;
        kvcast_summary summary = {};
        summary.struct_bytes = sizeof summary;
        EXPECT_EQ(kvcast_fetch(client_, &r, &sink, &session), KVCAST_OK) << kvcast_message();
        EXPECT_EQ(kvcast_session_wait(session, -1, &summary), KVCAST_OK) << kvcast_message();
        kvcast_session_close(session);
        return summary;
    }

    kvcast_layout layout_ = {};
    kvcast_client* client_ = nullptr;
};

TEST_F(CDeviceSession, PutsKvWhereTheEngineSays) {
    const Layout& layout = published_->manifest.layout;
    // The second session takes the first one's codec, and has memory of its own.
    for (const unsigned level : {1u, 0u}) {
        const EngineMemory memory(layout, published_->token_ids.size());
        CEngine engine = {&memory, &layout};
        const kvcast_summary summary = fetch_by(engine.sink(), level == 1 ? "fixed:1" : "fixed:0");
        EXPECT_EQ(summary.text_tokens, 0u);
        EXPECT_EQ(engine.placed, published_->manifest.chunks.size());
        EXPECT_EQ(engine.layers, published_->manifest.chunks.size() * layout.layers);
        Summary as_loaded;
        for (std::size_t i = 0; i < published_->manifest.chunks.size(); ++i) {
            ChunkReport c;
            c.tokens.first = i * published_->manifest.chunks[0].tokens;
            c.level = level;
            as_loaded.chunks.push_back(c);
        }
        expect_planes(memory, as_loaded);
    }
}

TEST_F(CDeviceSession, AChunkThatHasNoPlaceIsRecomputed) {
    const Layout& layout = published_->manifest.layout;
    const EngineMemory memory(layout, published_->token_ids.size());
    CEngine engine = {&memory, &layout};
    const std::size_t tokens = engine.refused = published_->manifest.chunks[0].tokens;
    EXPECT_EQ(fetch_by(engine.sink(), "two-pointer").text_tokens, tokens);
    EXPECT_EQ(engine.computed, tokens);
}

TEST_F(CDeviceSession, WithoutAPlaceKvComesInHostMemory) {
    kvcast_sink sink = {};
    sink.struct_bytes = sizeof sink;
    std::size_t layers = 0;
    sink.user = &layers;
    sink.on_layer = [](void* user, std::size_t, std::size_t, std::uint32_t, const kvcast_rows* rows) {
        EXPECT_NE(rows[1].rows, nullptr);
        ++*static_cast<std::size_t*>(user);
    };
    sink.on_recompute = [](void*, std::size_t, std::size_t, const std::int32_t*) { ADD_FAILURE(); };
    fetch_by(sink, "two-pointer");
    EXPECT_EQ(layers, published_->manifest.chunks.size() * published_->manifest.layout.layers);
}

int run(const std::string& command, const std::string& log) {
    return WEXITSTATUS(std::system((command + " >" + log + " 2>&1").c_str()));
}

TEST_F(DeviceSession, KvfetchWritesTheFileThatItWritesOnACpu) {
    serve(true);
    const std::string log = folder_ / "log", cpu = folder_ / "cpu", device = folder_ / "device";
    const std::string arguments = " '" + wanted_.manifest_url + "' --cache '' -q --policy fixed:1 -o ";
    EXPECT_EQ(run(KVCAST_TOOLS "/kvfetch" + arguments + cpu, log), 0) << tools::contents(log);
    EXPECT_EQ(run(KVCAST_EMULATED "/kvfetch_on_simt --device cuda" + arguments + device, log), 0)
        << tools::contents(log);
    EXPECT_EQ(tools::contents(device), tools::contents(cpu));
    EXPECT_EQ(
        run("SIMT_DEVICES=0 " KVCAST_EMULATED "/kvfetch_on_simt --device cuda" + arguments + device, log), 1);
    EXPECT_THAT(tools::contents(log), HasSubstr("--device cuda: no GPU"));
}

}  // namespace
}  // namespace kvcast::test
