// kvcast.h, as a program has it that links libkvcast.so: what it encodes and brings is what the library does,
// every wrong argument is named, and nothing that a server does gets past it.
#include "tools/client/kvcast.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <mutex>
#include <thread>

#include "codec/klt/calibration.h"
#include "tests/codec/synthetic.h"
#include "tests/codec/synthetic_calibration.h"
#include "tests/streamer/fault_server.h"
#include "tests/tools/scratch.h"

namespace kvcast::test {
namespace {

using testing::HasSubstr;

constexpr std::size_t kTokens = 150, kChunk = 64;

// A cache as a C program describes it.
struct Given {
    Cache cache = make_cache(make_layout(4, {{4, 32}, {4, 32}}, Dtype::kBf16, RopePairing::kHalf), kTokens,
                             Content::kGaussian);
    std::vector<double> frequencies;
    kvcast_layout layout = {};
    std::vector<kvcast_rows> rows;

    Given() {
        const Layout& l = cache.layout;
        layout = {
            4,      2, {4, 4}, {32, 32}, KVCAST_BF16, KVCAST_HALF, 0, 32, geometric_theta(l.rope.frequencies),
            nullptr};
        for (std::size_t i = 0; i < cache.planes.size(); ++i)
            rows.push_back({cache.planes[i].data(), cache.row_bytes(i % 2)});
    }

    kvcast_chunk chunk(std::size_t tokens = kChunk) const {
        kvcast_chunk c = {};
        c.struct_bytes = sizeof c;
        c.layout = &layout;
        c.model = "a model";
        c.token_ids = cache.ids.data();
        c.tokens = tokens;
        c.planes = rows.data();
        return c;
    }
    kvcast_publication publication() const {
        kvcast_publication p = {};
        p.struct_bytes = sizeof p;
        p.layout = &layout;
        p.model = "a model";
        p.token_ids = cache.ids.data();
        p.tokens = cache.ids.size();
        p.planes = rows.data();
        p.chunk_tokens = kChunk;
        return p;
    }
    std::vector<std::uint8_t> calibration() const {
        return calibration_bytes(make_calibration_data(cache.layout, {{1, 1}}));
    }
};

struct Codec {
    explicit Codec(const std::vector<std::uint8_t>& calibration = {}) {
        EXPECT_EQ(kvcast_codec_open(2, calibration.empty() ? nullptr : calibration.data(), calibration.size(),
                                    &codec),
                  KVCAST_OK);
    }
    ~Codec() { kvcast_codec_close(codec); }
    kvcast_codec* codec = nullptr;
};

// Where a chunk is decoded to.
struct Room {
    std::vector<std::vector<std::uint8_t>> planes{8, std::vector<std::uint8_t>(kChunk * 256)};
    std::vector<kvcast_buffer> buffers;

    Room() {
        for (auto& plane : planes) buffers.push_back({plane.data(), 256});
    }
};

std::vector<std::uint8_t> encoded(kvcast_codec* codec, const kvcast_chunk& chunk, std::uint32_t level) {
    const void* object = nullptr;
    std::size_t bytes = 0;
    std::uint8_t chain[32];
    EXPECT_EQ(kvcast_encode(codec, &chunk, level, &object, &bytes, chain), KVCAST_OK) << kvcast_message();
    const auto* first = static_cast<const std::uint8_t*>(object);
    return {first, first + bytes};
}

// ---- the codec ----

TEST(CCodec, WritesTheLibrarysBytesAndReadsThem) {
    const Given given;
    const std::vector<std::uint8_t> calibration = given.calibration();
    for (const bool klt : {false, true}) {
        const Codec codec(klt ? calibration : std::vector<std::uint8_t>());
        for (const unsigned level : {0u, 1u, 3u}) {
            SCOPED_TRACE(level);
            Case c = {"", given.cache.layout, kTokens};
            c.options.level = level;
            c.options.profile = level == 0 ? Profile::kLossless : klt ? Profile::kKlt : Profile::kDelta;
            if (c.options.profile == Profile::kKlt) {
                c.options.calibration = Calibration::read(calibration).value();
                c.options.sinks = kKltSinks;
            }
            ChunkEncoder encoder(c.options);
            SerialExecutor serial;
            std::vector<std::uint8_t> expected;
            Hash chain = {};
            const auto planes = given.cache.rows(0);
            const ChunkInput input = {&given.cache.layout,
                                      "a model",
                                      "",
                                      std::span(given.cache.ids).first(kChunk),
                                      0,
                                      0,
                                      {},
                                      planes,
                                      0};
            ASSERT_TRUE(encoder.encode(input, serial, expected, chain).ok());
            const std::vector<std::uint8_t> object = encoded(codec.codec, given.chunk(), level);
            EXPECT_EQ(object, expected);

            kvcast_chunk_info info = {};
            info.struct_bytes = sizeof info;
            ASSERT_EQ(kvcast_inspect(object.data(), object.size(), &info), KVCAST_OK);
            EXPECT_EQ(info.object_bytes, object.size());
            EXPECT_EQ(info.tokens, kChunk);
            EXPECT_EQ(info.level, level);
            EXPECT_STREQ(info.model, "a model");
            EXPECT_TRUE(std::ranges::equal(info.chain, chain));
            EXPECT_EQ(info.layout.heads[1], 4u);
            EXPECT_EQ(info.layout.rope_theta, given.layout.rope_theta);

            Status status;
            const Cache back = decode(expected, {.calibration = c.options.calibration}, status);
            ASSERT_TRUE(status.ok());
            const Room room;
            ASSERT_EQ(
                kvcast_decode(codec.codec, object.data(), object.size(), kChunk, room.buffers.data(), 8),
                KVCAST_OK)
                << kvcast_message();
            EXPECT_EQ(room.planes, back.planes);
        }
    }
}

TEST(CCodec, TakesFrequenciesForABase) {
    Given given;
    const std::vector<std::uint8_t> by_base = encoded(Codec().codec, given.chunk(), 5);
    for (const std::uint64_t f : given.cache.layout.rope.frequencies)
        given.frequencies.push_back(radians_from_frequency(f));
    given.layout.rope_theta = 0;
    given.layout.rope_frequencies = given.frequencies.data();
    const std::vector<std::uint8_t> by_frequencies = encoded(Codec().codec, given.chunk(), 5);
    const ChunkHeader one = read_header(by_base).value(), other = read_header(by_frequencies).value();
    ASSERT_EQ(one.layout.rope.frequencies.size(), other.layout.rope.frequencies.size());
    for (std::size_t i = 0; i < one.layout.rope.frequencies.size(); ++i) {
        EXPECT_NEAR(radians_from_frequency(other.layout.rope.frequencies[i]),
                    radians_from_frequency(one.layout.rope.frequencies[i]), 1e-14);
    }
}

TEST(CCodec, NamesWhatIsWrongWithAnArgument) {
    const Given given;
    const Codec codec;
    const auto refused = [&](auto change, const char* why) {
        Given wrong = given;
        for (std::size_t i = 0; i < wrong.rows.size(); ++i) wrong.rows[i].rows = given.rows[i].rows;
        kvcast_chunk chunk = wrong.chunk();
        std::uint32_t level = 5;
        change(wrong, chunk, level);
        const void* object = nullptr;
        std::size_t bytes = 0;
        std::uint8_t chain[32];
        EXPECT_NE(kvcast_encode(codec.codec, &chunk, level, &object, &bytes, chain), KVCAST_OK) << why;
        EXPECT_THAT(kvcast_message(), HasSubstr(why));
    };
    using G = Given;
    using C = kvcast_chunk;
    using L = std::uint32_t;
    refused([](G&, C& c, L&) { c.struct_bytes -= 8; }, "another version");
    refused([](G&, C& c, L&) { c.layout = nullptr; }, "no layout");
    refused([](G& g, C&, L&) { g.layout.planes = 3; }, "3 planes");
    refused([](G& g, C&, L&) { g.layout.planes = 0; }, "0 planes");
    refused([](G& g, C&, L&) { g.layout.layers = 0; }, "layer");
    refused([](G& g, C&, L&) { g.layout.layers = 0xffffffff; }, "layer");
    refused([](G& g, C&, L&) { g.layout.dtype = 7; }, "dtype 7");
    refused([](G& g, C&, L&) { g.layout.rope_pairing = 9; }, "pairing 9");
    refused([](G& g, C&, L&) { g.layout.rope_dim = 31; }, "31 rotated");
    refused([](G& g, C&, L&) { g.layout.rope_dim = 0xfffffffe; }, "rotated");
    refused([](G& g, C&, L&) { g.layout.rope_theta = std::nan(""); }, "rope_theta");
    refused([](G& g, C&, L&) { g.layout.rope_theta = 0; }, "rope_frequencies");
    refused(
        [](G& g, C&, L&) {
            g.frequencies.assign(16, std::nan(""));
            g.layout.rope_frequencies = g.frequencies.data();
            g.layout.rope_theta = 0;
        },
        "a frequency of nan");
    refused([](G& g, C&, L&) { g.layout.rope_frequencies = &g.layout.rope_theta; }, "which one says all");
    refused([](G&, C& c, L&) { c.model = nullptr; }, "no model");
    refused([](G&, C& c, L&) { c.planes = nullptr; }, "no planes");
    refused([](G& g, C&, L&) { g.rows[3].rows = nullptr; }, "plane 3");
    refused([](G& g, C&, L&) { g.rows[7].row_bytes = 255; }, "plane 7");
    refused([](G&, C& c, L&) { c.token_ids = nullptr; }, "0 tokens");
    refused([](G&, C& c, L&) { c.tokens = 0; }, "0 tokens");
    refused([](G&, C& c, L&) { c.tokens = 70000; }, "70000 tokens");
    refused([](G&, C&, L& level) { level = 8; }, "level 8");
    EXPECT_EQ(kvcast_encode(nullptr, nullptr, 0, nullptr, nullptr, nullptr), KVCAST_BAD_ARGUMENT);
    EXPECT_EQ(kvcast_codec_open(1, nullptr, 0, nullptr), KVCAST_BAD_ARGUMENT);
    kvcast_codec* none = nullptr;
    EXPECT_EQ(kvcast_codec_open(~std::size_t{0}, nullptr, 0, &none), KVCAST_BAD_ARGUMENT);
    EXPECT_EQ(kvcast_codec_open(1, nullptr, 5, &none), KVCAST_BAD_ARGUMENT);
    EXPECT_EQ(kvcast_codec_open(1, "no calibration", 14, &none), KVCAST_BAD_MAGIC);
    EXPECT_EQ(none, nullptr);
    kvcast_codec_close(nullptr);
}

TEST(CCodec, NeverWritesBeyondTheRoomItWasGiven) {
    const Given given;
    const Codec codec;
    const std::vector<std::uint8_t> object = encoded(codec.codec, given.chunk(), 3);
    Room room;
    std::vector<kvcast_buffer>& buffers = room.buffers;
    const auto code = [&](std::size_t tokens, std::size_t count) {
        return kvcast_decode(codec.codec, object.data(), object.size(), tokens, buffers.data(), count);
    };
    EXPECT_EQ(code(kChunk, 8), KVCAST_OK);
    EXPECT_EQ(code(kChunk - 1, 8), KVCAST_BUFFER_TOO_SMALL);
    EXPECT_EQ(code(kChunk, 7), KVCAST_BUFFER_TOO_SMALL);
    EXPECT_EQ(code(kChunk, 0), KVCAST_BUFFER_TOO_SMALL);
    buffers[5].row_bytes = 255;
    EXPECT_EQ(code(kChunk, 8), KVCAST_BUFFER_TOO_SMALL);
    EXPECT_THAT(kvcast_message(), HasSubstr("buffer 5"));
    buffers[5] = {nullptr, 256};
    EXPECT_EQ(code(kChunk, 8), KVCAST_BUFFER_TOO_SMALL);
}

TEST(CCodec, NamesDamage) {
    const Given given;
    const Codec codec;
    std::vector<std::uint8_t> object = encoded(codec.codec, given.chunk(), 3);
    const Room room;
    const std::vector<kvcast_buffer>& buffers = room.buffers;
    const auto code = [&](std::size_t bytes) {
        return kvcast_decode(codec.codec, object.data(), bytes, kChunk, buffers.data(), 8);
    };
    EXPECT_EQ(code(object.size() - 1), KVCAST_TRUNCATED);
    EXPECT_EQ(code(0), KVCAST_TRUNCATED);
    object.back() ^= 1;
    EXPECT_EQ(code(object.size()), KVCAST_BLOCK_CHECKSUM);
    object[0] ^= 1;
    EXPECT_EQ(code(object.size()), KVCAST_BAD_MAGIC);
    kvcast_chunk_info info = {};
    EXPECT_EQ(kvcast_inspect(object.data(), object.size(), &info), KVCAST_BAD_ARGUMENT);
    info.struct_bytes = sizeof info;
    EXPECT_EQ(kvcast_inspect(object.data(), object.size(), &info), KVCAST_BAD_MAGIC);
    EXPECT_EQ(kvcast_inspect(nullptr, 100, &info), KVCAST_TRUNCATED);

    const std::vector<std::uint8_t> klt = encoded(Codec(given.calibration()).codec, given.chunk(), 2);
    EXPECT_EQ(kvcast_decode(codec.codec, klt.data(), klt.size(), kChunk, buffers.data(), 8),
              KVCAST_MISSING_CALIBRATION);
}

TEST(CCodec, EveryCodeHasTheLibrarysName) {
    const std::pair<int, const char*> codes[] = {
        {KVCAST_OK, "ok"},
        {KVCAST_OUT_OF_MEMORY, "out-of-memory"},
        {KVCAST_PENDING, "pending"},
        {KVCAST_SYSTEM, "system"},
        {KVCAST_BLOCK_CHECKSUM, "block-checksum"},
        {12345, "unknown"},
        {-1, "unknown"},
        {1 << 20, "unknown"},
    };
    for (const auto& [code, name] : codes) EXPECT_STREQ(kvcast_code_name(code), name) << code;
    const std::pair<int, ErrorCode> twins[] = {
        {KVCAST_TRUNCATED, ErrorCode::kTruncated},
        {KVCAST_BAD_MAGIC, ErrorCode::kBadMagic},
        {KVCAST_UNSUPPORTED_VERSION, ErrorCode::kUnsupportedVersion},
        {KVCAST_UNSUPPORTED_PROFILE, ErrorCode::kUnsupportedProfile},
        {KVCAST_HEADER_CHECKSUM, ErrorCode::kHeaderChecksum},
        {KVCAST_BAD_HEADER, ErrorCode::kBadHeader},
        {KVCAST_LIMIT_EXCEEDED, ErrorCode::kLimitExceeded},
        {KVCAST_BLOCK_CHECKSUM, ErrorCode::kBlockChecksum},
        {KVCAST_CORRUPT_BLOCK, ErrorCode::kCorruptBlock},
        {KVCAST_MISSING_CALIBRATION, ErrorCode::kMissingCalibration},
        {KVCAST_WRONG_CALIBRATION, ErrorCode::kWrongCalibration},
        {KVCAST_NOT_CONSECUTIVE, ErrorCode::kNotConsecutive},
        {KVCAST_BROKEN_CHAIN, ErrorCode::kBrokenChain},
        {KVCAST_BAD_ARGUMENT, ErrorCode::kBadArgument},
        {KVCAST_BUFFER_TOO_SMALL, ErrorCode::kBufferTooSmall},
        {KVCAST_NETWORK, ErrorCode::kNetwork},
        {KVCAST_TLS, ErrorCode::kTls},
        {KVCAST_HTTP_STATUS, ErrorCode::kHttpStatus},
        {KVCAST_PROTOCOL, ErrorCode::kProtocol},
        {KVCAST_TIMEOUT, ErrorCode::kTimeout},
        {KVCAST_OBJECT_MISMATCH, ErrorCode::kObjectMismatch},
        {KVCAST_BAD_MANIFEST, ErrorCode::kBadManifest},
        {KVCAST_UNSIGNED, ErrorCode::kUnsigned},
        {KVCAST_BAD_SIGNATURE, ErrorCode::kBadSignature},
        {KVCAST_EXPIRED, ErrorCode::kExpired},
        {KVCAST_FOREIGN, ErrorCode::kForeign},
        {KVCAST_NOT_STORED, ErrorCode::kNotStored},
        {KVCAST_CANCELLED, ErrorCode::kCancelled},
        {KVCAST_THROWN, ErrorCode::kThrown},
        {KVCAST_NO_DEVICE, ErrorCode::kNoDevice},
        {KVCAST_DEVICE, ErrorCode::kDevice},
    };
    EXPECT_EQ(KVCAST_OUT_OF_MEMORY, static_cast<int>(ErrorCode::kOutOfMemory));
    EXPECT_EQ(KVCAST_SYSTEM, static_cast<int>(ErrorCode::kSystem));
    std::size_t named = 0;
    for (int code = 4; code < 1000; ++code) named += std::strcmp(kvcast_code_name(code), "unknown") != 0;
    EXPECT_EQ(named, std::size(twins));
    for (const auto& [code, twin] : twins) EXPECT_EQ(code, static_cast<int>(twin)) << error_name(twin);
}

// ---- stores and sessions ----

// An engine's memory, filled by the calls of a sink.
class Engine {
  public:
    explicit Engine(const Given& given)
        : given_(given), planes_(8, std::vector<std::uint8_t>(kTokens * 256)) {}

    kvcast_sink sink() {
        kvcast_sink s = {};
        s.struct_bytes = sizeof s;
        s.user = this;
        s.on_layer = [](void* user, std::size_t first, std::size_t end, std::uint32_t layer,
                        const kvcast_rows* rows) {
            static_cast<Engine*>(user)->take(first, end, layer, rows);
        };
        s.on_recompute = [](void* user, std::size_t first, std::size_t end, const std::int32_t* ids) {
            static_cast<Engine*>(user)->compute(first, end, ids);
        };
        s.on_finish = [](void* user) { static_cast<Engine*>(user)->finished = true; };
        return s;
    }

    // So many tokens before the session begins.
    void have(std::size_t tokens) {
        for (std::size_t i = 0; i < 8; ++i)
            std::memcpy(planes_[i].data(), given_.cache.planes[i].data(), tokens * 256);
    }

    std::size_t computed() const { return computed_; }
    bool is_exact() const { return planes_ == given_.cache.planes; }
    std::atomic<bool> finished = false;

  private:
    void take(std::size_t first, std::size_t end, std::uint32_t layer, const kvcast_rows* rows) {
        ASSERT_LE(end, kTokens);
        ASSERT_LT(layer, 4u);
        const std::scoped_lock lock(mutex_);
        for (std::size_t p = 0; p < 2; ++p) {
            for (std::size_t t = first; t < end; ++t) {
                const auto* row =
                    static_cast<const std::uint8_t*>(rows[p].rows) + (t - first) * rows[p].row_bytes;
                std::memcpy(planes_[2 * layer + p].data() + t * 256, row, 256);
            }
        }
    }
    void compute(std::size_t first, std::size_t end, const std::int32_t* ids) {
        ASSERT_LE(end, kTokens);
        const std::scoped_lock lock(mutex_);
        if (ids != nullptr) {
            EXPECT_TRUE(std::equal(ids, ids + (end - first), given_.cache.ids.data() + first));
        }
        for (std::size_t i = 0; i < 8; ++i)
            std::memcpy(planes_[i].data() + first * 256, given_.cache.planes[i].data() + first * 256,
                        (end - first) * 256);
        computed_ += end - first;
    }

    const Given& given_;
    std::mutex mutex_;
    std::vector<std::vector<std::uint8_t>> planes_;
    std::size_t computed_ = 0;
};

class CSession : public testing::Test {
  protected:
    CSession() {
        kvcast_client_options options = {};
        options.struct_bytes = sizeof options;
        options.threads = 2;
        EXPECT_EQ(kvcast_client_open(&options, &client), KVCAST_OK) << kvcast_message();
        server.emplace(folder.path());
    }
    ~CSession() override { kvcast_client_close(client); }

    // Where the publication is served.
    std::string publish(const kvcast_publication& publication) {
        std::vector<char> at(4096);
        EXPECT_EQ(kvcast_publish(client, folder.path().c_str(), &publication, at.data(), at.size()),
                  KVCAST_OK)
            << kvcast_message();
        const std::string name(at.data());
        EXPECT_TRUE(name.starts_with(folder.path() + "/")) << name;
        return server->url(name.substr(folder.path().size() + 1));
    }

    kvcast_request request(const std::string& url) {
        kvcast_request r = {};
        r.struct_bytes = sizeof r;
        r.manifest_url = url.c_str();
        r.layout = &given.layout;
        r.model = "a model";
        r.token_ids = given.cache.ids.data();
        r.tokens = kTokens;
        return r;
    }

    // For the longest prefix in a store.
    kvcast_request request_of_prefix(const std::string& store) {
        kvcast_request r = request(store);
        r.manifest_url = nullptr;
        r.store_url = store.c_str();
        r.chunk_tokens = kChunk;
        return r;
    }

    int look_up(const kvcast_request& r, double seconds = 5) {
        stored = {};
        stored.struct_bytes = sizeof stored;
        return kvcast_look_up(client, &r, seconds, &stored);
    }

    // The server is S3 for who signs with this key.
    void become_s3(const char* key) {
        ::setenv("AWS_ACCESS_KEY_ID", key, 1);
        ::setenv("AWS_SECRET_ACCESS_KEY", "a secret", 1);
        ::setenv("AWS_ENDPOINT_URL", server->url("").c_str(), 1);
        server->fault(std::string(R"({"match": ".", "fault": "signed-only", "key": ")") + key + "\"}");
    }

    int fetch(const kvcast_request& r, Engine& engine) {
        const kvcast_sink sink = engine.sink();
        kvcast_session* session = nullptr;
        int code = kvcast_fetch(client, &r, &sink, &session);
        if (code != KVCAST_OK) return code;
        summary = {};
        summary.struct_bytes = sizeof summary;
        code = kvcast_session_wait(session, -1, &summary);
        troubles = kvcast_session_troubles(session);
        kvcast_session_close(session);
        EXPECT_TRUE(engine.finished);
        return code;
    }

    const Given given;
    tools::ScratchDirectory folder;
    std::optional<FaultServer> server;
    kvcast_client* client = nullptr;
    kvcast_summary summary = {};
    std::string troubles;
    kvcast_stored stored = {};
};

TEST_F(CSession, BringsBackWhatWasStored) {
    const std::string url = publish(given.publication());
    Engine engine(given);
    ASSERT_EQ(fetch(request(url), engine), KVCAST_OK) << kvcast_message();
    EXPECT_TRUE(engine.is_exact());
    EXPECT_EQ(summary.tokens, kTokens);
    EXPECT_EQ(summary.text_tokens, 0u);
    EXPECT_EQ(summary.kl, 0);
    EXPECT_EQ(summary.publication, KVCAST_OK);
    EXPECT_GT(summary.network_bytes, 10000u);
}

TEST_F(CSession, FindsTheLongestPrefixInAStore) {
    publish(given.publication());
    const std::string store = server->url("");
    const std::string root = store.substr(0, store.size() - 1);
    Engine engine(given);
    ASSERT_EQ(fetch(request_of_prefix(root), engine), KVCAST_OK) << kvcast_message();
    EXPECT_TRUE(engine.is_exact());
}

TEST_F(CSession, SaysHowMuchIsStoredBeforeItFetches) {
    publish(given.publication());
    const std::string store = server->url("");
    std::vector<std::int32_t> prompt = given.cache.ids;
    prompt.resize(kTokens + 100, 7);
    kvcast_request r = request_of_prefix(store);
    r.token_ids = prompt.data();
    r.tokens = prompt.size();
    EXPECT_EQ(kvcast_look_up(client, &r, 5, &stored), KVCAST_BAD_ARGUMENT);
    ASSERT_EQ(look_up(r), KVCAST_OK) << kvcast_message();
    EXPECT_EQ(stored.tokens, kTokens);
    EXPECT_GT(stored.finest_bytes, 2 * stored.coarsest_bytes);
    EXPECT_GT(stored.coarsest_bytes, 1000u);
    EXPECT_EQ(server->count("kvc$"), 0u);

    // Room for that, and no more; nothing is looked for again.
    const std::size_t pointers = server->count("/manifest$");
    const std::string found = stored.manifest_url;
    r = request(found);
    r.tokens = stored.tokens;
    Engine engine(given);
    ASSERT_EQ(fetch(r, engine), KVCAST_OK) << kvcast_message();
    EXPECT_TRUE(engine.is_exact());
    EXPECT_EQ(engine.computed(), 0u);
    EXPECT_EQ(server->count("/manifest$"), pointers);

    r = request_of_prefix(store);
    r.salt = "pepper";
    EXPECT_EQ(look_up(r), KVCAST_NOT_STORED);
    for (const double seconds : {0.0, -1.0, std::nan(""), 1e9})
        EXPECT_EQ(look_up(r, seconds), KVCAST_BAD_ARGUMENT);
    server->fault(R"({"match": "manifest", "fault": "stall-before-headers"})");
    EXPECT_EQ(look_up(r, 0.1), KVCAST_TIMEOUT);
    EXPECT_EQ(kvcast_look_up(client, nullptr, 1, &stored), KVCAST_BAD_ARGUMENT);
}

TEST_F(CSession, BringsOnlyWhatTheEngineDoesNotHave) {
    const std::string url = publish(given.publication());
    kvcast_request r = request(url);
    std::uint64_t bytes = 0;
    std::size_t chunks = 0;
    for (const std::size_t present : {2 * kChunk, 2 * kChunk - 1, kChunk, std::size_t{1}, std::size_t{0}}) {
        SCOPED_TRACE(present);
        const std::size_t before = server->count("kvc$"), missing = 3 - present / kChunk;
        r.present_tokens = present;
        ASSERT_EQ(look_up(r), KVCAST_OK) << kvcast_message();
        EXPECT_EQ(stored.tokens, kTokens);
        EXPECT_EQ(stored.finest_bytes > bytes, missing > chunks) << "chunks come whole";
        bytes = stored.finest_bytes;
        chunks = missing;
        Engine engine(given);
        engine.have(present);
        ASSERT_EQ(fetch(r, engine), KVCAST_OK) << kvcast_message();
        EXPECT_TRUE(engine.is_exact());
        EXPECT_EQ(engine.computed(), 0u);
        EXPECT_EQ(summary.tokens, kTokens);
        EXPECT_GE(summary.network_bytes, bytes);
        EXPECT_EQ(server->count("kvc$") - before, missing);
    }

    // Nothing is stored of the model, and nothing is asked for where nothing is missing.
    r.model = "another model";
    r.present_tokens = 100;
    Engine engine(given);
    engine.have(100);
    ASSERT_EQ(fetch(r, engine), KVCAST_OK) << kvcast_message();
    EXPECT_EQ(engine.computed(), kTokens - 100);
    EXPECT_EQ(summary.text_tokens, kTokens - 100);
    EXPECT_TRUE(engine.is_exact());
    const std::size_t requests = server->count(".");
    r.present_tokens = kTokens;
    Engine full(given);
    ASSERT_EQ(fetch(r, full), KVCAST_OK) << kvcast_message();
    EXPECT_EQ(full.computed(), 0u);
    EXPECT_EQ(summary.publication, KVCAST_OK);
    EXPECT_EQ(server->count("."), requests);
}

TEST_F(CSession, FetchesFromS3WithItsKeys) {
    const std::string folder_url = publish(given.publication()), endpoint = server->url("");
    const std::string url = "s3://" + folder_url.substr(endpoint.size());
    Engine engine(given);
    ::unsetenv("AWS_ACCESS_KEY_ID");
    EXPECT_EQ(fetch(request(url), engine), KVCAST_BAD_ARGUMENT);
    EXPECT_THAT(kvcast_message(), HasSubstr("AWS_ACCESS_KEY_ID"));
    become_s3("a-key");
    ASSERT_EQ(fetch(request(url), engine), KVCAST_OK) << kvcast_message();
    EXPECT_TRUE(engine.is_exact());
    EXPECT_EQ(engine.computed(), 0u);
    Engine unsigned_one(given);
    ASSERT_EQ(fetch(request(folder_url), unsigned_one), KVCAST_OK) << kvcast_message();
    EXPECT_EQ(unsigned_one.computed(), kTokens);

    // What is found there is found again by its s3:// URL.
    ASSERT_EQ(look_up(request(url)), KVCAST_OK) << kvcast_message();
    EXPECT_EQ(stored.manifest_url, url);

    // Keys are those of the moment.
    ::setenv("AWS_ACCESS_KEY_ID", "another-key", 1);
    EXPECT_EQ(look_up(request(url)), KVCAST_HTTP_STATUS);
    ::setenv("AWS_ACCESS_KEY_ID", "a-key", 1);
    EXPECT_EQ(look_up(request(url)), KVCAST_OK);
}

TEST_F(CSession, LooksForAPrefixInS3) {
    // Buckets are folders of the endpoint.
    kvcast_publication p = given.publication();
    char at[4096];
    ASSERT_EQ(kvcast_publish(client, (folder / "bucket/kv").c_str(), &p, at, sizeof at), KVCAST_OK)
        << kvcast_message();
    become_s3("a-key");
    const std::string name = std::string(at).substr((folder / "bucket/kv/").size());
    const std::string store = "s3://bucket/kv";
    for (const std::string& spelled : {store, store + "/"}) {
        ASSERT_EQ(look_up(request_of_prefix(spelled)), KVCAST_OK) << kvcast_message();
        EXPECT_EQ(stored.manifest_url, "s3://bucket/kv/" + name);
        const std::string found = stored.manifest_url;
        Engine engine(given);
        ASSERT_EQ(fetch(request(found), engine), KVCAST_OK) << kvcast_message();
        EXPECT_EQ(engine.computed(), 0u);
    }
    // A store that refuses everything says so as one that has nothing.
    ::setenv("AWS_ACCESS_KEY_ID", "another-key", 1);
    EXPECT_EQ(look_up(request_of_prefix(store)), KVCAST_NOT_STORED);
    EXPECT_THAT(kvcast_message(), HasSubstr("403"));
    // Keys come and go.
    for (int i = 0; i < 6; ++i) {
        ::setenv("AWS_ACCESS_KEY_ID", ("key-" + std::to_string(i)).c_str(), 1);
        EXPECT_EQ(look_up(request_of_prefix(store)), KVCAST_NOT_STORED);
    }
    ::setenv("AWS_ACCESS_KEY_ID", "a-key", 1);
    EXPECT_EQ(look_up(request_of_prefix(store)), KVCAST_OK);
}

TEST_F(CSession, NobodyWaitsInACallOfTheSink) {
    const std::string url = publish(given.publication());
    struct Asked {
        kvcast_client* client;
        kvcast_request request;
        std::atomic<kvcast_session*> session;
        std::atomic<int> found;
        std::atomic<int> waited;
    } asked = {client, request(url), nullptr, KVCAST_OK, KVCAST_OK};
    kvcast_sink sink = {};
    sink.struct_bytes = sizeof sink;
    sink.user = &asked;
    sink.on_layer = [](auto...) {};
    sink.on_recompute = [](auto...) {};
    sink.on_finish = [](void* user) {
        auto& a = *static_cast<Asked*>(user);
        kvcast_stored there = {};
        there.struct_bytes = sizeof there;
        a.found = kvcast_look_up(a.client, &a.request, 1, &there);
        while (a.session == nullptr) std::this_thread::yield();
        a.waited = kvcast_session_wait(a.session, 1, nullptr);
    };
    kvcast_session* session = nullptr;
    ASSERT_EQ(kvcast_fetch(client, &asked.request, &sink, &session), KVCAST_OK);
    asked.session = session;
    EXPECT_EQ(kvcast_session_wait(session, 60, nullptr), KVCAST_OK);
    EXPECT_EQ(asked.found, KVCAST_BAD_ARGUMENT);
    EXPECT_EQ(asked.waited, KVCAST_BAD_ARGUMENT);
    kvcast_session_close(session);
}

TEST_F(CSession, APublicationCanBeCancelled) {
    struct Told {
        std::vector<std::size_t> tokens;
        std::size_t most;
    } told = {{}, 2};
    kvcast_publication p = given.publication();
    p.user = &told;
    p.on_chunk = [](void* user, std::size_t tokens) {
        auto& t = *static_cast<Told*>(user);
        t.tokens.push_back(tokens);
        return static_cast<int>(t.tokens.size() == t.most);
    };
    char at[4096];
    EXPECT_EQ(kvcast_publish(client, folder.path().c_str(), &p, at, sizeof at), KVCAST_CANCELLED);
    EXPECT_EQ(told.tokens, std::vector<std::size_t>({64, 64}));
    EXPECT_FALSE(std::filesystem::exists(folder / "manifests"));
    told = {{}, 9};
    EXPECT_EQ(kvcast_publish(client, folder.path().c_str(), &p, at, sizeof at), KVCAST_OK);
    EXPECT_EQ(told.tokens, std::vector<std::size_t>({64, 64, 22}));
}

// The engine has loaded the prefix at a lossy level, so to speak.
TEST_F(CSession, AnExtensionBringsBackWhatWasStoredFirst) {
    kvcast_publication p = given.publication();
    p.tokens = kChunk + 1;
    publish(p);
    const Given worse = [this] {
        Given copy = given;
        for (std::size_t i = 0; i < copy.rows.size(); ++i) {
            auto& plane = copy.cache.planes[i];
            std::fill_n(plane.begin(), kChunk * copy.rows[i].row_bytes, std::uint8_t{0});
            copy.rows[i].rows = plane.data();
        }
        return copy;
    }();
    p = worse.publication();
    p.extend = 1;
    std::size_t told = 0;
    p.user = &told;
    p.on_chunk = [](void* user, std::size_t tokens) {
        *static_cast<std::size_t*>(user) += tokens;
        return 0;
    };
    const std::string url = publish(p);
    EXPECT_EQ(told, kTokens);
    Engine engine(given);
    ASSERT_EQ(fetch(request(url), engine), KVCAST_OK) << kvcast_message();
    EXPECT_TRUE(engine.is_exact());
    EXPECT_EQ(summary.text_tokens, 0u);
}

TEST_F(CSession, KeepsACalibrationForTheNextSession) {
    const std::vector<std::uint8_t> calibration = given.calibration();
    kvcast_publication p = given.publication();
    const std::uint32_t levels[] = {2, 3};
    p.levels = levels;
    p.level_count = 2;
    p.calibration = calibration.data();
    p.calibration_bytes = calibration.size();
    const std::string url = publish(p);
    for (int i = 0; i < 2; ++i) {
        Engine engine(given);
        ASSERT_EQ(fetch(request(url), engine), KVCAST_OK) << kvcast_message();
        EXPECT_EQ(summary.text_tokens, 0u);
        EXPECT_GT(summary.kl, 0);
    }
    EXPECT_EQ(server->count("kvcal"), 1u);
}

TEST_F(CSession, AsksTheEngineForWhatCannotBeHad) {
    const std::string url = publish(given.publication());
    server->fault(R"({"match": "kvc$", "fault": "status", "status": 404})");
    kvcast_request r = request(url);
    r.prefill_tokens_per_second = 1000;
    r.deadline = 20;
    Engine engine(given);
    ASSERT_EQ(fetch(r, engine), KVCAST_OK) << kvcast_message();
    EXPECT_EQ(engine.computed(), kTokens);
    EXPECT_EQ(summary.text_tokens, kTokens);
    EXPECT_TRUE(engine.is_exact());
    EXPECT_THAT(troubles, testing::HasSubstr("tokens 64 to 127: level "));
    EXPECT_THAT(troubles, testing::HasSubstr("HTTP status 404"));

    r.model = "another model";
    Engine other(given);
    ASSERT_EQ(fetch(r, other), KVCAST_OK);
    EXPECT_EQ(summary.publication, KVCAST_FOREIGN);
    EXPECT_EQ(other.computed(), kTokens);
    EXPECT_THAT(troubles, testing::HasSubstr("of model"));
}

TEST_F(CSession, HasNoTroublesWhereThereWereNone) {
    const std::string url = publish(given.publication());
    Engine engine(given);
    ASSERT_EQ(fetch(request(url), engine), KVCAST_OK) << kvcast_message();
    EXPECT_EQ(troubles, "");
    EXPECT_EQ(kvcast_session_troubles(nullptr), nullptr);
}

TEST_F(CSession, TakesNoMoreTokensThanThereIsRoomFor) {
    const std::string url = publish(given.publication());
    kvcast_request r = request(url);
    r.token_ids = nullptr;
    Engine engine(given);
    ASSERT_EQ(fetch(r, engine), KVCAST_OK) << kvcast_message();
    EXPECT_TRUE(engine.is_exact());
    r.tokens = kTokens - 1;
    Engine small(given);
    EXPECT_NE(fetch(r, small), KVCAST_OK);
    EXPECT_EQ(small.computed(), 0u);
}

TEST_F(CSession, EndsWhenItIsCancelledOrClosed) {
    const std::string url = publish(given.publication());
    server->fault(R"({"match": "kvc$", "fault": "stall-after-headers"})");
    const kvcast_request r = request(url);
    for (const bool cancelled : {true, false}) {
        Engine engine(given);
        const kvcast_sink sink = engine.sink();
        kvcast_session* session = nullptr;
        ASSERT_EQ(kvcast_fetch(client, &r, &sink, &session), KVCAST_OK);
        EXPECT_EQ(kvcast_session_wait(session, 0.05, nullptr), KVCAST_PENDING);
        if (cancelled) {
            kvcast_session_cancel(session);
            EXPECT_EQ(kvcast_session_wait(session, 60, nullptr), KVCAST_CANCELLED);
        }
        kvcast_session_close(session);
        EXPECT_EQ(engine.finished, cancelled);
    }
    kvcast_session_close(nullptr);
    kvcast_session_cancel(nullptr);
}

TEST_F(CSession, TrustsOnlyTheKeysItWasGiven) {
    const char* const key =
        "-----BEGIN PRIVATE KEY-----\n"
        "MC4CAQAwBQYDK2VwBCIEILwimTux0tOX4PPLp65dLSNgRgm21N3tSGGaFnqiz2bA\n"
        "-----END PRIVATE KEY-----\n";
    const char* const its_public =
        "-----BEGIN PUBLIC KEY-----\n"
        "MCowBQYDK2VwAyEAtX3GSrgzNbTNm4hbiRJSMWf4RGzCjXHdjfl1d0iA5rU=\n"
        "-----END PUBLIC KEY-----\n";
    const char* const another =
        "-----BEGIN PUBLIC KEY-----\n"
        "MCowBQYDK2VwAyEAHS2xC0FSBAY2FC/4LLP3GGVosJSyUnO4dxpoL5F2dvo=\n"
        "-----END PUBLIC KEY-----\n";
    kvcast_publication p = given.publication();
    p.key = key;
    const std::string url = publish(p);
    kvcast_request r = request(url);
    r.trusted_key_count = 1;
    r.trusted_keys = &its_public;
    Engine engine(given);
    ASSERT_EQ(fetch(r, engine), KVCAST_OK) << kvcast_message();
    EXPECT_EQ(summary.publication, KVCAST_OK);
    r.trusted_keys = &another;
    Engine wary(given);
    fetch(r, wary);
    EXPECT_EQ(summary.publication, KVCAST_BAD_SIGNATURE);
    const char* const nonsense = "no key";
    r.trusted_keys = &nonsense;
    EXPECT_EQ(fetch(r, wary), KVCAST_BAD_ARGUMENT);
}

TEST_F(CSession, NamesWhatIsWrongWithARequest) {
    const std::string url = server->url("manifests/none.json");
    const auto refused = [&](auto change, const char* why) {
        kvcast_request r = request(url);
        Engine engine(given);
        kvcast_sink sink = engine.sink();
        change(r, sink);
        kvcast_session* session = nullptr;
        EXPECT_EQ(kvcast_fetch(client, &r, &sink, &session), KVCAST_BAD_ARGUMENT) << why;
        EXPECT_EQ(session, nullptr);
        EXPECT_THAT(kvcast_message(), HasSubstr(why));
    };
    using R = kvcast_request;
    using S = kvcast_sink;
    refused([](R& r, S&) { r.struct_bytes = 0; }, "request of 0 bytes");
    refused([](R&, S& s) { s.struct_bytes = 1; }, "sink of 1 bytes");
    refused([](R&, S& s) { s.on_layer = nullptr; }, "on_layer");
    refused([](R&, S& s) { s.on_recompute = nullptr; }, "on_recompute");
    refused([](R&, S& s) { s.on_place = [](auto...) { return 0; }; }, "device cuda");
    refused([](R& r, S&) { r.manifest_url = nullptr; }, "manifest_url");
    refused([](R& r, S&) { r.store_url = "http://x"; }, "not both");
    refused([](R& r, S&) { r.manifest_url = "ftp://host/manifest"; }, "http://");
    refused([](R& r, S&) { r.manifest_url = "/a/folder"; }, "not a URL");
    refused([](R& r, S&) { r.manifest_url = "s3:///manifest"; }, "no bucket");
    refused([](R& r, S&) { r.model = nullptr; }, "no model");
    refused([](R& r, S&) { r.layout = nullptr; }, "no layout");
    refused([](R& r, S&) { r.tokens = 0; }, "room");
    refused([](R& r, S&) { r.present_tokens = kTokens + 1; }, "151 tokens are present, of 150");
    refused([](R& r, S&) { r.deadline = -1; }, "deadline");
    refused([](R& r, S&) { r.deadline = std::nan(""); }, "deadline");
    refused([](R& r, S&) { r.prefill_tokens_per_second = -1; }, "prefill");
    refused([](R& r, S&) { r.rule = "magic"; }, "two-pointer");
    // Nor is a manifest trusted because of a list that was left out, or a model because it has no name.
    const char* const key = "no key";
    refused([](R& r, S&) { r.trusted_key_count = 1; }, "none given");
    refused([&](R& r, S&) { r.trusted_keys = &key; }, "trusted_keys: 0 of them");
    refused([](R& r, S&) { r.model = ""; }, "no model");
    EXPECT_EQ(kvcast_session_wait(nullptr, 0, nullptr), KVCAST_BAD_ARGUMENT);
}

TEST_F(CSession, NamesADeviceThatIsNotThere) {
    kvcast_client_options options = {};
    kvcast_client* none = client;
    EXPECT_EQ(kvcast_client_open(&options, &none), KVCAST_BAD_ARGUMENT);
    options.struct_bytes = sizeof options;
    options.device = "tpu";
    EXPECT_EQ(kvcast_client_open(&options, &none), KVCAST_BAD_ARGUMENT);
    EXPECT_THAT(kvcast_message(), HasSubstr("'tpu'"));
    EXPECT_EQ(none, nullptr);
}

TEST_F(CSession, NamesWhatIsWrongWithAPublication) {
    const auto refused = [&](auto change, const char* why, int code = KVCAST_BAD_ARGUMENT) {
        kvcast_publication p = given.publication();
        change(p);
        char at[64] = "";
        EXPECT_EQ(kvcast_publish(client, folder.path().c_str(), &p, at, sizeof at), code) << why;
        EXPECT_THAT(kvcast_message(), HasSubstr(why));
    };
    using P = kvcast_publication;
    static const std::uint32_t descending[] = {3, 2}, twice[] = {2, 2}, beyond[] = {0, 8};
    refused([](P& p) { p.struct_bytes = 8; }, "another version");
    refused([](P& p) { p.model = nullptr; }, "no model");
    refused([](P& p) { p.layout = nullptr; }, "no layout");
    refused([](P& p) { p.planes = nullptr; }, "no planes");
    refused([](P& p) { p.tokens = 0; }, "no tokens");
    refused([](P& p) { p.levels = descending; }, "levels: 0 of them");
    refused([](P& p) { p.level_count = 2; }, "levels: 2 of them, and none given");
    refused([](P& p) { p.calibration_bytes = 2; }, "calibration: 2 of them");
    refused([](P& p) { p.ttl = INT64_MAX; }, "at most 100 years");
    refused([](P& p) { p.levels = descending, p.level_count = 2; }, "ascend");
    refused([](P& p) { p.levels = twice, p.level_count = 2; }, "ascend");
    refused([](P& p) { p.levels = beyond, p.level_count = 2; }, "0 to 7");
    refused([](P& p) { p.ttl = -5; }, "life");
    refused([](P& p) { p.calibration = "x", p.calibration_bytes = 1; }, "", KVCAST_BAD_MAGIC);
    refused([](P& p) { p.key = "x"; }, "");
    static const std::vector<std::int32_t> negative(kTokens, -1);
    refused([](P& p) { p.token_ids = negative.data(); }, "token id -1");
    refused([](P& p) { p.model = "\xff"; }, "UTF-8");
    refused([](P& p) { p.session = "\xff"; }, "UTF-8");
    EXPECT_EQ(folder.entries(), 0u);
    // What is stored is said even where the URL has no room.
    refused([](P&) {}, "stored at", KVCAST_BUFFER_TOO_SMALL);
    EXPECT_EQ(kvcast_publish(client, nullptr, nullptr, nullptr, 0), KVCAST_BAD_ARGUMENT);
}

}  // namespace
}  // namespace kvcast::test
