// Whatever servers and networks do: the sink gets verified data only, what is missing is asked for as text,
// the deadline holds, and nothing leaks.
#include <arpa/inet.h>
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <cstdlib>
#include <filesystem>
#include <future>

#include "codec/format/chain.h"
#include "streamer/http/client.h"
#include "streamer/lookup.h"
#include "streamer/rules/rules.h"
#include "streamer/session.h"
#include "streamer/store.h"
#include "tests/streamer/fault_server.h"
#include "tests/streamer/keys.h"
#include "tests/streamer/poll_loop.h"
#include "tests/streamer/publication.h"
#include "tools/client/codec_adapter.h"

namespace kvcast::test {
namespace {

using namespace streamer;
using std::chrono::milliseconds;
using testing::HasSubstr;

constexpr std::size_t kTokens = 256;

// Certificates for 127.0.0.1 and localhost, one that has expired, and one of another host; all of one
// authority.
class Certificates {
  public:
    Certificates() {
        const std::string script = R"(set -e; cd ")" + folder.path() + R"("
openssl req -x509 -newkey ed25519 -nodes -keyout ca.key -out ca.pem -subj /CN=test-authority -days 2
make() {
    openssl req -new -newkey ed25519 -nodes -keyout $1.key -out $1.csr -subj /CN=$1
    printf 'subjectAltName=%s\n' "$2" > $1.ext
    openssl x509 -req -in $1.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out $1.pem -days $3 -extfile $1.ext
}
make good 'DNS:localhost,IP:127.0.0.1' 2
make expired 'DNS:localhost,IP:127.0.0.1' -1
make elsewhere 'DNS:example.com' 2
)";
        const std::string command = "exec >/dev/null 2>&1\n" + script;
        if (std::system(("bash -c '" + escaped(command) + "'").c_str()) != 0)
            throw std::runtime_error("openssl failed");
    }
    std::vector<std::string> of(const std::string& name) const {
        return {"--tls", folder / (name + ".pem"), folder / (name + ".key")};
    }
    std::string authority() const { return folder / "ca.pem"; }

  private:
    static std::string escaped(const std::string& text) {
        std::string out;
        for (const char c : text) out += c == '\'' ? std::string("'\\''") : std::string(1, c);
        return out;
    }
    tools::ScratchDirectory folder;
};

const Certificates& certificates() {
    static const Certificates made;
    return made;
}

std::span<const std::uint8_t> as_bytes(const std::string& text) {
    return {reinterpret_cast<const std::uint8_t*>(text.data()), text.size()};
}

// One that takes its time to say which calibrations it has.
class SlowCodec final : public ChunkCodec {
  public:
    bool has_calibration(const Hash& id) override {
        std::this_thread::sleep_for(milliseconds(1500));
        return quick_.has_calibration(id);
    }
    Status add_calibration(std::span<const std::uint8_t> file) override {
        return quick_.add_calibration(file);
    }
    Status decode(std::span<const std::uint8_t> object, const LayerCallback& deliver) override {
        return quick_.decode(object, deliver);
    }

  private:
    client::CodecAdapter quick_{1, ""};
};

class SlowEngine final : public CheckingSink {
  public:
    using CheckingSink::CheckingSink;
    void on_recompute(TokenRange tokens, std::span<const std::int32_t> token_ids) override {
        std::this_thread::sleep_for(milliseconds(500));
        CheckingSink::on_recompute(tokens, token_ids);
    }
};

class FaultTest : public testing::Test {
  protected:
    FaultTest() : store(std::move(folder_destination(folder.path()).value())) {
        options.deadline = 4;
        options.rule = fixed_level_rule(2);
        options.compute.prefill = {{0, 1000.0}};  // 0.26 s for everything
        options.download.retry.first_delay = milliseconds(10);
        options.download.retry.attempts = 3;
        options.download.first_byte_timeout = milliseconds(500);
        options.download.stall_timeout = milliseconds(500);
        options.wall_clock = [] { return 1'800'000'100; };
    }

    // How a session ends that is cancelled while it runs.
    Status cancelled() {
        sink.emplace(*published);
        Client client(http);
        client::CodecAdapter codec(1, "");
        Session session(client.loop(), client.transport(), wanted, options, codec, *sink);
        EXPECT_FALSE(session.wait_for(milliseconds(50)));
        session.cancel();
        return session.wait().status;
    }

    // For faults that take the server time, on a busy machine, but are not about waiting.
    void be_patient() {
        options.deadline = 20;
        options.download.first_byte_timeout = options.download.stall_timeout = std::chrono::seconds(5);
    }

    // Publishes, and starts the server.
    void serve(const PublicationOptions& publication = {}, std::vector<std::string> arguments = {}) {
        published.emplace(publish(*store, publication));
        server.emplace(folder.path(), std::move(arguments));
        wanted.manifest_url = server->url(published->name);
        wanted.token_ids = published->token_ids;
    }

    void serve_klt(std::vector<unsigned> levels = {0, 2, 3}) {
        PublicationOptions klt;
        klt.klt = true;
        klt.levels = std::move(levels);
        serve(klt);
    }

    // The longest prefix of so many tokens in the store, instead of a manifest.
    void want_prefix(std::size_t tokens) {
        wanted.store_url = server->url("");
        wanted.manifest_url.clear();
        wanted.layout = published->manifest.layout;
        wanted.model = published->manifest.model;
        wanted.chunk_tokens = 64;
        wanted.token_ids.resize(tokens, 5);
    }

    Summary fetch() {
        client::CodecAdapter codec(1, "");
        return fetch(codec);
    }
    Summary fetch(ChunkCodec& codec) {
        sink.emplace(*published);
        sink->in_layer = in_layer;
        sink->present = wanted.present_tokens;
        Client client(http);
        Session session(client.loop(), client.transport(), wanted, options, codec, *sink);
        return session.wait();
    }
    // The usual outcome: everything is there, in time.
    Summary fetch_completely() {
        const Summary s = fetch();
        sink->expect_complete(s, published->token_ids.size());
        EXPECT_LE(s.time, options.deadline);
        return s;
    }
    std::string object(std::size_t chunk, unsigned level) const {
        const ManifestChunk& c = published->manifest.chunks[chunk];
        const auto o = std::ranges::find(c.objects, level, &ManifestObject::level);
        return object_name(c.chain, *o);
    }
    void fault(const std::string& match, const std::string& rest) {
        server->fault(R"({"match": ")" + match + R"(", )" + rest + "}");
    }

    tools::ScratchDirectory folder;
    std::unique_ptr<Destination> store;
    std::optional<Published> published;
    std::optional<FaultServer> server;
    HttpOptions http;
    Wanted wanted;
    SessionOptions options;
    std::optional<CheckingSink> sink;
    std::function<void(std::size_t, std::size_t)> in_layer;
};

// ---- nothing wrong ----

TEST_F(FaultTest, WithoutAFaultEverythingIsLoadedAtTheLevelAskedFor) {
    serve();
    const Summary s = fetch_completely();
    EXPECT_EQ(s.text_tokens, 0u);
    for (const ChunkReport& c : s.chunks) {
        EXPECT_EQ(c.level, 2u);
        EXPECT_EQ(c.requests, 1u);
        EXPECT_LE(c.decided, c.received);
        EXPECT_LE(c.received, c.ready);
    }
    EXPECT_DOUBLE_EQ(s.kl, 0.02);
    EXPECT_GT(s.network.bytes_per_second, 0);
}

TEST_F(FaultTest, AnUnknownDivergenceIsNotCalledNone) {
    serve();
    published->manifest.levels[1].kl.reset();
    ASSERT_TRUE(store->put(published->name, as_bytes(write_manifest(published->manifest))).ok());
    EXPECT_LT(fetch_completely().kl, 0);
    options.rule = fixed_level_rule(6);
    EXPECT_DOUBLE_EQ(fetch_completely().kl, 0.06);
}

TEST_F(FaultTest, TheDefaultRuleTakesTheFinestLevelOnAFastLink) {
    serve();
    options.rule = nullptr;
    options.deadline = 10;
    for (const ChunkReport& c : fetch_completely().chunks) EXPECT_EQ(c.level, 0u);
}

TEST_F(FaultTest, TokensBeyondThePublicationAreText) {
    serve();
    wanted.token_ids.resize(300, 5);
    published->token_ids = wanted.token_ids;
    EXPECT_EQ(fetch_completely().text_tokens, 44u);
}

TEST_F(FaultTest, OnlyTheCommonPrefixIsLoaded) {
    serve();
    wanted.token_ids[130] ^= 1;
    published->token_ids = wanted.token_ids;
    EXPECT_EQ(fetch_completely().text_tokens, 128u);
}

TEST_F(FaultTest, TheLongestStoredPrefixIsFoundByTokens) {
    serve();
    want_prefix(1000);
    published->token_ids = wanted.token_ids;
    EXPECT_EQ(fetch_completely().text_tokens, 1000u - 256);
    wanted.token_ids[0] ^= 1;
    published->token_ids = wanted.token_ids;
    const Summary none = fetch_completely();
    EXPECT_EQ(none.text_tokens, 1000u);
    EXPECT_EQ(none.publication.code(), ErrorCode::kNotStored);
    EXPECT_FALSE(none.network_measured);
}

// Nothing is stored, and at that moment recomputing is due: one of the two is the answer.
TEST_F(FaultTest, ASessionIsToldOnceWhatThereIs) {
    serve();
    want_prefix(10);
    published->token_ids = wanted.token_ids;
    options.deadline = 1.1 * options.compute.prefill_time(0, wanted.token_ids.size()) + 1e-9;
    const Summary s = fetch();
    EXPECT_TRUE(s.status.ok()) << s.status.message();
    EXPECT_EQ(s.tokens, 10u);
    EXPECT_EQ(s.chunks.size(), 1u);
}

TEST_F(FaultTest, AStoreIsAskedHowMuchItHas) {
    serve();
    want_prefix(1000);
    Client client(http);
    LookupOptions lookup;
    lookup.wall_clock = options.wall_clock;
    lookup.download = options.download;
    const auto ask = [&] { return look_up(client.loop(), client.transport(), wanted, lookup); };

    const Result<Located> found = ask();
    ASSERT_TRUE(found.ok()) << found.status().message();
    EXPECT_EQ(found.value().tokens, 256u);
    EXPECT_EQ(found.value().chunks, 4u);
    EXPECT_EQ(found.value().manifest_url, server->url(published->name));
    EXPECT_EQ(server->count("kvc$"), 0u);

    fault("manifest", R"("fault": "stall-before-headers")");
    lookup.download.first_byte_timeout = std::chrono::seconds(60);
    lookup.patience = milliseconds(200);
    EXPECT_EQ(ask().status().code(), ErrorCode::kTimeout);
    lookup = {.download = options.download, .wall_clock = options.wall_clock};
    server->fault(R"({"clear": true})");
    fault("manifest", R"("fault": "status", "status": 500)");
    EXPECT_EQ(ask().status().code(), ErrorCode::kHttpStatus);
    server->fault(R"({"clear": true})");
    lookup.trusted.push_back(public_key(1));
    EXPECT_EQ(ask().status().code(), ErrorCode::kUnsigned);
    wanted.token_ids[0] ^= 1;
    EXPECT_EQ(ask().status().code(), ErrorCode::kNotStored);
    wanted.token_ids.resize(63);
    EXPECT_EQ(ask().status().code(), ErrorCode::kNotStored);
    // Nobody has patience, and there is nothing to wait for: whichever comes first is the answer, once.
    lookup.patience = Duration(1);
    for (int i = 0; i < 300; ++i) {
        const ErrorCode code = ask().status().code();
        EXPECT_TRUE(code == ErrorCode::kTimeout || code == ErrorCode::kNotStored) << error_name(code);
    }
    for (const auto& change : std::initializer_list<std::function<void(Wanted&)>>{
             [](Wanted& w) { w.token_ids.clear(); }, [](Wanted& w) { w.layout.reset(); },
             [](Wanted& w) { w.chunk_tokens = 0; }, [](Wanted& w) { w.store_url.clear(); }}) {
        Wanted wrong = wanted;
        change(wrong);
        EXPECT_EQ(look_up(client.loop(), client.transport(), wrong, lookup).status().code(),
                  ErrorCode::kBadArgument);
    }
}

TEST_F(FaultTest, CalibratedChunksWaitForTheirCalibration) {
    serve_klt();
    fault("kvcal", R"("fault": "slow-start", "seconds": 0.3)");
    const Summary s = fetch_completely();
    EXPECT_EQ(s.text_tokens, 0u);
    for (const ChunkReport& c : s.chunks) {
        EXPECT_EQ(c.level, 2u);
        EXPECT_GE(c.ready, 0.3);
    }
}

// Who asked for a level of another profile does not wait for 20 MB beside it.
TEST_F(FaultTest, ACalibrationThatNoChunkWillNeedStaysWhereItIs) {
    serve_klt();
    options.rule = fixed_level_rule(0);
    for (const ChunkReport& c : fetch_completely().chunks) EXPECT_EQ(c.level, 0u);
    EXPECT_EQ(server->count("kvcal"), 0u);
}

TEST_F(FaultTest, WithoutADeadlineTheFinestLevelNeedsNoCalibration) {
    serve_klt();
    options.deadline = std::numeric_limits<Seconds>::infinity();
    for (const char* rule : {"two-pointer", "mpc", "deadline", "prefix-only"}) {
        options.rule = std::move(rule_by_name(rule).value());
        for (const ChunkReport& c : fetch_completely().chunks) EXPECT_EQ(c.level, 0u) << rule;
    }
    EXPECT_EQ(server->count("kvcal"), 0u);
}

// A codec that has to read the calibration first does not hold up requests, or other sessions.
TEST_F(FaultTest, ChunksComeWhileTheCodecLooksForTheCalibration) {
    serve_klt();
    be_patient();
    sink.emplace(*published);
    Client client(http);
    SlowCodec codec;
    Session session(client.loop(), client.transport(), wanted, options, codec, *sink);
    const Summary s = session.wait();
    sink->expect_complete(s, published->token_ids.size());
    for (const ChunkReport& c : s.chunks) {
        EXPECT_LT(c.received, 1.5);
        EXPECT_GE(c.ready, 1.5);
    }
}

TEST_F(FaultTest, LevelsThatNeedNoCalibrationDoNotWaitForOne) {
    serve_klt();
    be_patient();
    options.rule = two_pointer_rule();
    options.compute.prefill = {};
    SlowCodec codec;
    for (const ChunkReport& c : fetch(codec).chunks) {
        EXPECT_EQ(c.level, 0u);
        EXPECT_LT(c.ready, 1.5);
    }
}

// A link that brings everything exactly in 2.5 s of 6, and the calibration in no less than 7.
TEST_F(FaultTest, ALevelWithoutACalibrationIsTakenWhereThatWouldBeLate) {
    PublicationOptions klt;
    klt.klt = true;
    klt.levels = {0, 2, 3};
    klt.tokens = kTokens / 2;
    serve(klt);
    std::uint64_t exact = 0;
    for (const ManifestChunk& c : published->manifest.chunks) exact += c.objects[0].bytes;
    ASSERT_GT(published->manifest.calibration->bytes, 2.8 * static_cast<double>(exact));
    be_patient();
    options.rule = two_pointer_rule();
    options.compute.prefill = {};
    options.deadline = 6;
    options.transfers = 1;
    const std::uint64_t rate = exact * 2 / 5;
    options.network = {static_cast<double>(rate), 0.01, 0};
    fault("kvc", R"("fault": "pace", "rate": )" + std::to_string(rate));
    const Summary s = fetch_completely();
    EXPECT_EQ(s.text_tokens, 0u);
    for (const ChunkReport& c : s.chunks) EXPECT_EQ(c.level, 0u);
}

TEST_F(FaultTest, ACalibrationIsFetchedWhereALevelThatNeedsItTakesAnothersPlace) {
    serve_klt();
    options.rule = fixed_level_rule(0);
    fault("/0-[0-9a-f]*.kvc", R"("fault": "status", "status": 404)");
    for (const ChunkReport& c : fetch_completely().chunks) EXPECT_EQ(c.level, 2u);
    EXPECT_EQ(server->count("kvcal"), 1u);
}

// All chunks are there and nothing can be decoded: text, as long as there is time for it.
TEST_F(FaultTest, ChunksThatWaitForALateCalibrationBecomeText) {
    options.deadline = 2.5;
    options.compute.prefill = {{0, 200.0}};  // 1.3 s, which the sink does not take
    options.download.first_byte_timeout = options.download.stall_timeout = std::chrono::seconds(30);
    for (const char* rule : {"two-pointer", "mpc", "deadline", "prefix-only", "cachegen"}) {
        SCOPED_TRACE(rule);
        serve_klt({2, 3});
        options.rule = std::move(rule_by_name(rule).value());
        fault("kvcal", R"("fault": "stall-mid-body")");
        EXPECT_EQ(fetch_completely().text_tokens, 256u);
    }
}

// Over a slow link it takes longer than a session.
TEST_F(FaultTest, ACalibrationGoesOnWhereTheLastSessionHadToLeaveIt) {
    const tools::ScratchDirectory cache;
    options.rule = two_pointer_rule();
    options.download.first_byte_timeout = options.download.stall_timeout = std::chrono::seconds(30);
    for (const std::string& kept_in : {std::string(), cache / "calibrations"}) {
        SCOPED_TRACE(kept_in);
        options.compute.prefill = {{0, 200.0}};  // 1.3 s, which the sink does not take
        serve_klt({2, 3});
        fault("kvcal", R"("fault": "stall-mid-body", "times": 1)");
        client::CodecAdapter codec(1, kept_in);
        options.deadline = 2.5;
        const Summary text = fetch(codec);
        EXPECT_EQ(text.text_tokens, kTokens);
        options.deadline = 20;
        options.compute.prefill = {};
        const Summary loaded = fetch(codec);
        sink->expect_complete(loaded, kTokens);
        EXPECT_EQ(loaded.text_tokens, 0u);
        std::uint64_t objects = 0;
        for (const ChunkReport& c : loaded.chunks) objects += c.bytes;
        const std::uint64_t calibration = published->manifest.calibration->bytes;
        EXPECT_EQ(loaded.network_bytes, objects + calibration - calibration / 2);
    }
}

// Where everything is text, the link has nothing better to do.
TEST_F(FaultTest, ACalibrationComesWhileTheEngineRecomputes) {
    class AllText final : public Rule {
      public:
        const char* name() const override { return "all-text"; }
        Decision decide(const RuleState& state) const override {
            const auto c = std::ranges::find(state.chunks, ChunkStatus::kPending, &ChunkView::status);
            if (c == state.chunks.end()) return {};
            return {Decision::Kind::kText, static_cast<std::size_t>(c - state.chunks.begin()), 0, "always"};
        }
    };
    serve_klt({2, 3});
    options.rule = std::make_shared<AllText>();
    SlowEngine engine(*published);
    Client client(http);
    client::CodecAdapter codec(1, "");
    Session session(client.loop(), client.transport(), wanted, options, codec, engine);
    EXPECT_EQ(session.wait().text_tokens, kTokens);
    EXPECT_TRUE(codec.has_calibration(published->manifest.calibration->id));
}

TEST_F(FaultTest, AKeptFrontThatIsNotTheCalibrationsIsFetchedAnew) {
    serve_klt();
    const ManifestCalibration& calibration = *published->manifest.calibration;
    for (const std::size_t bytes : {std::size_t{1}, std::size_t{1000}, std::size_t{calibration.bytes}}) {
        client::CodecAdapter codec(1, "");
        codec.keep_begun(calibration.id, std::vector<std::uint8_t>(bytes, 0x55));
        const Summary s = fetch(codec);
        sink->expect_complete(s, kTokens);
        for (const ChunkReport& c : s.chunks) EXPECT_EQ(c.level, 2u);
    }
}

TEST_F(FaultTest, WithoutItsCalibrationAnotherProfileIsTaken) {
    be_patient();
    options.download.first_byte_timeout = options.download.stall_timeout = milliseconds(400);
    for (const char* kind : {R"("fault": "status", "status": 404)", R"("fault": "flip", "at": 100)",
                             R"("fault": "close")", R"("fault": "stall-after-headers")"}) {
        serve_klt();
        fault("kvcal", kind);
        const Summary s = fetch_completely();
        EXPECT_EQ(s.text_tokens, 0u);
        for (const ChunkReport& c : s.chunks) EXPECT_EQ(c.level, 0u) << kind;
    }
}

// Eight connections to a host, or one: who has to wait for it is not told that the server is silent.
TEST_F(FaultTest, RequestsThatWaitForAConnectionDoNotTimeOut) {
    serve();
    http.connections_per_host = 1;
    options.deadline = 30;
    options.compute.prefill.clear();
    options.download.first_byte_timeout = options.download.stall_timeout = milliseconds(1500);
    const std::uint64_t bytes = published->manifest.chunks[0].objects[1].bytes;
    fault("kvc$", fmt::format(R"("fault": "pace", "rate": {})", static_cast<double>(bytes) / 1.2));
    const Summary s = fetch_completely();
    EXPECT_GT(s.time, to_seconds(options.download.first_byte_timeout));
    for (const ChunkReport& c : s.chunks) EXPECT_EQ(c.requests, 1u) << c.trouble;
}

// More than a clock can count.
TEST_F(FaultTest, AServerThatAsksForCenturiesIsGivenUp) {
    serve();
    be_patient();
    fault("kvc$", R"("fault": "status", "status": 503, "retry_after": "18446744074")");
    const Summary s = fetch_completely();
    EXPECT_EQ(s.text_tokens, kTokens);
    for (const ChunkReport& c : s.chunks) EXPECT_LE(c.requests, 1u);
}

TEST_F(FaultTest, ManySessionsShareAClient) {
    serve();
    Client client(http);
    std::vector<std::future<void>> running;
    for (int i = 0; i < 4; ++i) {
        running.push_back(std::async(std::launch::async, [&] {
            client::CodecAdapter codec(1, "");
            for (int n = 0; n < 3; ++n) {
                CheckingSink mine(*published);
                Session session(client.loop(), client.transport(), wanted, options, codec, mine);
                mine.expect_complete(session.wait(), kTokens);
            }
        }));
    }
    for (auto& r : running) r.get();
}

TEST_F(FaultTest, TheCallersEventLoopWillDo) {
    serve();
    PollLoop loop;
    CurlTransport transport(loop, http);
    client::CodecAdapter codec(1, "");
    sink.emplace(*published);
    {
        Session session(loop, transport, wanted, options, codec, *sink);
        loop.run_until([&] { return sink->finished(); });
        sink->expect_complete(session.wait(), kTokens);
        Session dropped(loop, transport, wanted, options, codec, *sink);
    }
    for (int i = 0; i < 10; ++i) loop.turn();  // the dropped session's last task
}

TEST_F(FaultTest, MemoryBoundsWhatIsInFlight) {
    serve();
    options.memory_bytes = 1;
    options.transfers = 8;
    EXPECT_EQ(fetch_completely().text_tokens, 0u);
    const auto decisions = sink->decisions();
    EXPECT_EQ(decisions.size(), 4u);
}

// ---- no connection ----

TEST_F(FaultTest, ARefusedConnectionMeansText) {
    serve();
    server.reset();
    const Summary s = fetch_completely();
    EXPECT_EQ(s.text_tokens, kTokens);
    EXPECT_EQ(s.publication.code(), ErrorCode::kNetwork);
}

TEST_F(FaultTest, AServerThatDiesMidwayMeansTextForTheRest) {
    serve();
    in_layer = [&](std::size_t chunk, std::size_t) {
        if (chunk == 0 && server) server.reset();
    };
    for (const std::size_t i : {2, 3}) fault(object(i, 2), R"("fault": "slow-start", "seconds": 30)");
    const Summary s = fetch_completely();
    EXPECT_FALSE(s.chunks[0].text);
    EXPECT_TRUE(s.chunks[3].text);
}

// A socket whose queue is full: connecting to it hangs.
class BlackHole {
  public:
    BlackHole() {
        sockaddr_in address = {};
        address.sin_family = AF_INET;
        address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        socklen_t length = sizeof address;
        listener_ = ::socket(AF_INET, SOCK_STREAM, 0);
        EXPECT_EQ(::bind(listener_, reinterpret_cast<sockaddr*>(&address), length), 0);
        EXPECT_EQ(::listen(listener_, 0), 0);
        EXPECT_EQ(::getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &length), 0);
        port_ = ntohs(address.sin_port);
        for (int& filler : fillers_) {
            filler = ::socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
            (void)::connect(filler, reinterpret_cast<sockaddr*>(&address), length);
        }
    }
    ~BlackHole() {
        for (const int filler : fillers_) ::close(filler);
        ::close(listener_);
    }
    BlackHole(const BlackHole&) = delete;
    BlackHole& operator=(const BlackHole&) = delete;
    int port() const { return port_; }

  private:
    int listener_ = -1;
    int port_ = 0;
    std::array<int, 4> fillers_ = {};
};

TEST_F(FaultTest, ABlackHoleMeansTextBeforeTheDeadline) {
    serve();
    const BlackHole hole;
    wanted.manifest_url = "http://127.0.0.1:" + std::to_string(hole.port()) + "/" + published->name;
    options.deadline = 1.5;
    const Summary s = fetch_completely();
    EXPECT_EQ(s.text_tokens, kTokens);
    EXPECT_GT(s.time, 0.5);
}

TEST_F(FaultTest, AnUnknownHostMeansText) {
    serve();
    wanted.manifest_url = "http://no-such-host.invalid/" + published->name;
    const Summary s = fetch_completely();
    EXPECT_EQ(s.publication.code() == ErrorCode::kNetwork || s.publication.code() == ErrorCode::kTimeout,
              true)
        << s.publication.message();
}

TEST_F(FaultTest, WithoutTokensAFailureIsSaid) {
    serve();
    server.reset();
    wanted.token_ids.clear();
    const Summary s = fetch();
    EXPECT_EQ(s.status.code(), ErrorCode::kNetwork);
    EXPECT_THAT(s.status.message(), HasSubstr("manifest"));
    EXPECT_TRUE(sink->finished());
}

TEST_F(FaultTest, AWantedThatMakesNoSenseIsRefused) {
    serve();
    wanted = {};
    EXPECT_EQ(fetch().status.code(), ErrorCode::kBadArgument);
}

// ---- tokens that the engine has already ----

TEST_F(FaultTest, ChunksThatArePresentAreNotFetched) {
    serve();
    be_patient();
    for (const std::size_t present : {0u, 1u, 63u, 64u, 65u, 100u, 192u, 255u}) {
        SCOPED_TRACE(present);
        server->fault(R"({"clear": true})");
        wanted.present_tokens = present;
        const Summary s = fetch_completely();
        EXPECT_EQ(s.text_tokens, 0u);
        EXPECT_DOUBLE_EQ(s.kl, 0.02);
        EXPECT_EQ(sink->chunks_loaded(), 4 - present / 64);
        EXPECT_EQ(server->count("kvc$"), 4 - present / 64);
        ASSERT_EQ(s.chunks.size(), 4u);
        for (std::size_t i = 0; i < present / 64; ++i) {
            EXPECT_EQ(s.chunks[i].requests, 0u);
            EXPECT_EQ(s.chunks[i].bytes, 0u);
            EXPECT_EQ(s.chunks[i].reason, "present");
        }
    }
}

TEST_F(FaultTest, NothingIsAskedForWhereAllTokensArePresent) {
    serve();
    wanted.present_tokens = kTokens;
    const Summary s = fetch_completely();
    EXPECT_EQ(s.text_tokens, 0u);
    EXPECT_EQ(s.kl, 0);
    EXPECT_TRUE(s.publication.ok());
    EXPECT_EQ(server->count("."), 0u);
    server.reset();
    fetch_completely();
}

TEST_F(FaultTest, TokensBehindThePublicationArePresentToo) {
    serve();
    wanted.token_ids.resize(300, 5);
    published->token_ids = wanted.token_ids;
    for (const std::size_t present : {256u, 280u, 300u}) {
        wanted.present_tokens = present;
        EXPECT_EQ(fetch_completely().text_tokens, 300 - present);
    }
    EXPECT_EQ(server->count("kvc"), 0u);
}

TEST_F(FaultTest, PresentChunksNeedNoCalibration) {
    serve_klt({2, 3});
    wanted.token_ids.resize(300, 5);
    published->token_ids = wanted.token_ids;
    wanted.present_tokens = kTokens;
    SlowEngine engine(*published);
    engine.present = kTokens;
    Client client(http);
    client::CodecAdapter codec(1, "");
    Session session(client.loop(), client.transport(), wanted, options, codec, engine);
    engine.expect_complete(session.wait(), 300);
    EXPECT_EQ(server->count("kvc"), 0u);
}

TEST_F(FaultTest, WithoutTokensTheManifestSaysHowManyMayBePresent) {
    serve();
    wanted.token_ids.clear();
    wanted.present_tokens = kTokens;
    EXPECT_EQ(fetch_completely().kl, 0);
    wanted.present_tokens = kTokens + 1;
    const Summary s = fetch();
    EXPECT_EQ(s.status.code(), ErrorCode::kBadArgument);
    EXPECT_THAT(s.status.message(), HasSubstr("257 tokens are present, the publication has 256"));
    EXPECT_EQ(server->count("kvc$"), 0u);
}

TEST_F(FaultTest, MoreTokensThanThereAreCannotBePresent) {
    serve();
    wanted.present_tokens = kTokens + 1;
    const Summary s = fetch();
    EXPECT_EQ(s.status.code(), ErrorCode::kBadArgument);
    EXPECT_TRUE(s.chunks.empty());
    EXPECT_EQ(server->count("."), 0u);
}

TEST_F(FaultTest, WithoutAManifestOnlyWhatIsNotPresentIsRecomputed) {
    serve();
    server.reset();
    wanted.present_tokens = 100;
    const Summary s = fetch_completely();
    EXPECT_EQ(s.publication.code(), ErrorCode::kNetwork);
    EXPECT_EQ(s.text_tokens, kTokens - 100);
    ASSERT_EQ(sink->recomputed().size(), 1u);
    EXPECT_EQ(sink->recomputed()[0].first, 100u);
}

// Where all had to be recomputed, that would be due before the manifest comes.
TEST_F(FaultTest, TheManifestIsAwaitedUntilWhatIsNotPresentIsDue) {
    serve();
    options.deadline = 1.5;
    options.compute.prefill = {{0, 200.0}};
    options.download.first_byte_timeout = std::chrono::seconds(30);
    wanted.present_tokens = 224;  // 0.16 s of 1.28, with margin 0.18 of 1.41
    fault("manifests", R"("fault": "slow-start", "seconds": 0.4)");
    const Summary s = fetch_completely();
    EXPECT_TRUE(s.publication.ok()) << s.publication.message();
    EXPECT_EQ(s.text_tokens, 0u);
}

TEST_F(FaultTest, TextBeginsBehindWhatIsPresent) {
    options.download.first_byte_timeout = options.download.stall_timeout = std::chrono::seconds(30);
    for (const char* rule : {"two-pointer", "mpc", "deadline", "prefix-only", "cachegen"}) {
        SCOPED_TRACE(rule);
        serve();
        options.deadline = 1.5;
        options.rule = std::move(rule_by_name(rule).value());
        fault("kvc$", R"("fault": "stall-before-headers")");
        wanted.present_tokens = 100;
        EXPECT_EQ(fetch_completely().text_tokens, kTokens - 100);
        EXPECT_EQ(sink->recomputed().front().first, 100u);
    }
}

TEST_F(FaultTest, ACancelledSessionHasNothingToSayOfPresentChunks) {
    serve();
    fault("kvc$", R"("fault": "stall-before-headers")");
    wanted.present_tokens = 128;
    EXPECT_EQ(cancelled().code(), ErrorCode::kCancelled);
    EXPECT_EQ(sink->chunks_loaded(), 0u);
    EXPECT_TRUE(sink->recomputed().empty());
}

// ---- TLS and HTTP/2 ----

TEST_F(FaultTest, TlsWithATrustedCertificateWorks) {
    serve({}, certificates().of("good"));
    http.ca_file = certificates().authority();
    EXPECT_EQ(fetch_completely().text_tokens, 0u);
}

TEST_F(FaultTest, CertificatesAreVerified) {
    for (const char* name : {"expired", "elsewhere"}) {
        serve({}, certificates().of(name));
        http.ca_file = certificates().authority();
        const Summary s = fetch_completely();
        EXPECT_EQ(s.text_tokens, kTokens);
        EXPECT_EQ(s.publication.code(), ErrorCode::kTls) << name << ": " << s.publication.message();
    }
    serve({}, certificates().of("good"));
    http.ca_file.clear();
    EXPECT_EQ(fetch_completely().publication.code(), ErrorCode::kTls) << "an unknown authority";
}

class Http2Test : public FaultTest {
  protected:
    void serve_h2() {
        std::vector<std::string> arguments = certificates().of("good");
        arguments.push_back("--h2");
        serve({}, arguments);
        http.ca_file = certificates().authority();
    }
};

TEST_F(Http2Test, Works) {
    serve_h2();
    EXPECT_EQ(fetch_completely().text_tokens, 0u);
}

TEST_F(Http2Test, ABrokenStreamOrConnectionIsResumed) {
    for (const char* kind : {"rst-stream", "goaway"}) {
        serve_h2();
        fault(object(1, 2), std::string(R"("times": 1, "fault": ")") + kind + '"');
        const Summary s = fetch_completely();
        EXPECT_EQ(s.text_tokens, 0u);
        EXPECT_GE(s.chunks[1].requests, 1u);
        EXPECT_EQ(server->count(object(1, 2)), 2u) << kind;
    }
}

// ---- one object in trouble ----

// A fault of one request for chunk 1, and what is expected of it.
struct Trouble {
    const char* name;
    const char* fault;
    std::size_t times;         // requests that are hit; 0: all
    bool same_level;           // whether the level that was asked for comes in the end
    const char* message = "";  // in the chunk's report
};

class TroubleTest : public FaultTest, public testing::WithParamInterface<Trouble> {};

TEST_P(TroubleTest, IsOvercome) {
    const Trouble& t = GetParam();
    if (!std::string_view(t.name).starts_with("Stall")) be_patient();
    serve();
    std::string fault_text = t.fault;
    if (const auto at = fault_text.find("FOREIGN"); at != std::string::npos) {
        PublicationOptions other;
        other.model = "another";
        other.session = "other";
        const Published foreign = publish(*store, other);
        const ManifestChunk& c = foreign.manifest.chunks[1];
        fault_text.replace(at, 7, object_name(c.chain, c.objects[1]));
    }
    if (t.times != 0) fault_text += ", \"times\": " + std::to_string(t.times);
    fault(object(1, 2), fault_text);
    const Summary s = fetch_completely();
    EXPECT_EQ(s.text_tokens, 0u);
    EXPECT_EQ(s.chunks[1].level == 2, t.same_level) << s.chunks[1].level;
    EXPECT_THAT(s.chunks[1].trouble, HasSubstr(t.message));
    for (const std::size_t i : {0, 2, 3}) EXPECT_EQ(s.chunks[i].level, 2u);
}

INSTANTIATE_TEST_SUITE_P(
    OneObject, TroubleTest,
    testing::Values(Trouble{"CloseBeforeHeaders", R"("fault": "close")", 1, true},
                    Trouble{"StallBeforeHeaders", R"("fault": "stall-before-headers")", 1, true},
                    Trouble{"StallAfterHeaders", R"("fault": "stall-after-headers")", 1, true},
                    Trouble{"StallMidBody", R"("fault": "stall-mid-body")", 1, true},
                    Trouble{"Reset", R"("fault": "reset")", 1, true},
                    Trouble{"EarlyClose", R"("fault": "early-close")", 1, true},
                    Trouble{"EarlyCloseTwice", R"("fault": "early-close", "after": 0.3)", 2, true},
                    Trouble{"LengthTooLong", R"("fault": "lie", "lie": 1000)", 0, false, "promised"},
                    Trouble{"LengthTooShort", R"("fault": "lie", "lie": -1000)", 0, false, "promised"},
                    Trouble{"NoLength", R"("fault": "no-length")", 1, true},
                    Trouble{"BrokenChunkedCoding", R"("fault": "broken-chunked")", 1, true},
                    Trouble{"FlipInHeader", R"("fault": "flip", "at": 20)", 1, true, "hash"},
                    Trouble{"FlipInIndex", R"("fault": "flip", "at": 420)", 1, true, "hash"},
                    Trouble{"FlipInBody", R"("fault": "flip", "at": -100)", 1, true, "hash"},
                    Trouble{"FlipAlways", R"("fault": "flip", "at": -100)", 0, false, "hash"},
                    Trouble{"Oversize", R"("fault": "oversize", "extra": 100000000)", 0, false, "promised"},
                    Trouble{"DecompressionBomb", R"("fault": "gzip-bomb", "bytes": 100000000)", 0, false,
                            "promised"},
                    Trouble{"AnotherModelsChunk", R"("fault": "substitute", "with": "FOREIGN")", 0, false},
                    Trouble{"Status403", R"("fault": "status", "status": 403)", 0, false, "403"},
                    Trouble{"Status404", R"("fault": "status", "status": 404)", 0, false, "404"},
                    Trouble{"Status429", R"("fault": "status", "status": 429, "retry_after": "1")", 1, true},
                    Trouble{"Status503", R"("fault": "status", "status": 503, "retry_after": "1")", 1, true},
                    Trouble{"RedirectLoop", R"("fault": "redirect-loop")", 0, false, "redirect"}),
    [](const auto& tested) { return tested.param.name; });

// Faults that show when a broken transfer is resumed.
class ResumeTest : public FaultTest, public testing::WithParamInterface<Trouble> {};

TEST_P(ResumeTest, IsOvercome) {
    const Trouble& t = GetParam();
    serve();
    fault(object(1, 2), R"("fault": "early-close", "times": 1)");
    fault(object(1, 2), std::string(t.fault) + ", \"times\": 1");
    const Summary s = fetch_completely();
    EXPECT_EQ(s.text_tokens, 0u);
    EXPECT_EQ(s.chunks[1].level, 2u);
    EXPECT_EQ(server->count(object(1, 2)), t.times);
}

INSTANTIATE_TEST_SUITE_P(
    BrokenTransfer, ResumeTest,
    testing::Values(Trouble{"WholeAnswerToARange", R"("fault": "ignore-range")", 2, true},
                    Trouble{"WrongContentRange", R"("fault": "wrong-content-range")", 3, true},
                    Trouble{"NoSuchRange", R"("fault": "416")", 3, true},
                    Trouble{"ChangedObject", R"("fault": "none", "etag": "2")", 2, true}),
    [](const auto& tested) { return tested.param.name; });

// The publisher's own mistake: the manifest promises a damaged object, hash and all.
TEST_F(FaultTest, AnObjectThatDoesNotDecodeIsReplacedByAnotherLevel) {
    serve();
    Manifest m = published->manifest;
    ManifestObject& promise = m.chunks[1].objects[1];
    std::vector<std::uint8_t> object = store->get(object_name(m.chunks[1].chain, promise)).value();
    object.back() ^= 0x55;
    auto publisher = Publisher::open(*store, m.created);
    promise = publisher.value().put_object(m.chunks[1].chain, 2, object).value();
    ASSERT_TRUE(publisher.value().finish(m, nullptr).ok());
    published->manifest = m;
    const Summary s = fetch_completely();
    EXPECT_EQ(s.text_tokens, 0u);
    EXPECT_EQ(s.chunks[1].level, 6u);
    EXPECT_THAT(s.chunks[1].trouble, HasSubstr("level 2"));
}

TEST_F(FaultTest, AChunkThatNoLevelBringsIsText) {
    serve();
    const std::string folder_of_chunk = to_hex(published->manifest.chunks[2].chain) + "/";
    fault(folder_of_chunk, R"("fault": "status", "status": 404)");
    const Summary s = fetch_completely();
    EXPECT_EQ(s.text_tokens, 64u);
    EXPECT_TRUE(s.chunks[2].text);
    EXPECT_EQ(sink->recomputed().size(), 1u);
}

TEST_F(FaultTest, EverythingDownAfterTheManifestIsText) {
    serve();
    fault("kvc$", R"("fault": "status", "status": 503)");
    EXPECT_EQ(fetch_completely().text_tokens, kTokens);
}

// What rules do about networks that fail slowly.
class RuleFaultTest : public FaultTest, public testing::WithParamInterface<const char*> {
  protected:
    RuleFaultTest() { options.rule = std::move(rule_by_name(GetParam()).value()); }
};

INSTANTIATE_TEST_SUITE_P(Rules, RuleFaultTest, testing::Values("deadline", "two-pointer"),
                         [](const auto& tested) {
                             return std::string(tested.param) == "deadline" ? "deadline" : "two_pointer";
                         });

TEST_P(RuleFaultTest, ADripIsAbandonedForText) {
    serve();
    options.deadline = 2;
    fault("kvc$", R"("fault": "pace", "rate": 2000)");
    const Summary s = fetch_completely();
    EXPECT_GT(s.text_tokens, 0u);
}

TEST_P(RuleFaultTest, ABandwidthCliffOnTheLastChunkIsOvercome) {
    serve();
    options.deadline = 1.5;
    fault(to_hex(published->manifest.chunks[3].chain) + "/", R"("fault": "pace", "rate": 1000)");
    const Summary s = fetch_completely();
    EXPECT_TRUE(s.chunks[3].text);
    EXPECT_FALSE(s.chunks[2].text);
}

TEST_P(RuleFaultTest, StallsEverywhereAreTextInTime) {
    for (const char* kind : {"stall-before-headers", "stall-after-headers", "stall-mid-body"}) {
        serve();
        options.deadline = 1.5;
        options.download.first_byte_timeout = std::chrono::seconds(30);
        options.download.stall_timeout = std::chrono::seconds(30);
        fault("kvc$", std::string(R"("fault": ")") + kind + '"');
        EXPECT_EQ(fetch_completely().text_tokens, kTokens) << kind;
    }
}

TEST_F(FaultTest, AHedgeOvertakesASlowRequest) {
    serve();
    options.download.hedge_after = milliseconds(60);
    options.download.first_byte_timeout = std::chrono::seconds(30);
    fault(object(1, 2), R"("fault": "stall-before-headers", "times": 1)");
    const Summary s = fetch_completely();
    EXPECT_EQ(s.chunks[1].requests, 2u);
    EXPECT_EQ(s.chunks[1].level, 2u);
}

TEST_F(FaultTest, BothHedgesMayFinish) {
    serve();
    options.download.hedge_after = milliseconds(60);
    fault("kvc$", R"("fault": "slow-start", "seconds": 0.15)");
    const Summary s = fetch_completely();
    EXPECT_EQ(s.text_tokens, 0u);
    for (const ChunkReport& c : s.chunks) EXPECT_EQ(c.requests, 2u);
}

// ---- manifests ----

TEST_F(FaultTest, OnlyATrustedKeysManifestIsBelieved) {
    const PrivateKey key = private_key(1);
    PublicationOptions p;
    p.key = &key;
    serve(p);
    options.trusted = {public_key(1)};
    EXPECT_EQ(fetch_completely().text_tokens, 0u);
    options.trusted = {public_key(2)};
    EXPECT_EQ(fetch_completely().publication.code(), ErrorCode::kBadSignature);
    serve();
    EXPECT_EQ(fetch_completely().publication.code(), ErrorCode::kUnsigned);
}

TEST_F(FaultTest, AnAlteredManifestIsRefused) {
    const PrivateKey key = private_key(1);
    PublicationOptions p;
    p.key = &key;
    serve(p);
    options.trusted = {public_key(1)};
    fault("manifests", R"("fault": "flip", "at": 300)");
    const Summary s = fetch_completely();
    EXPECT_EQ(s.text_tokens, kTokens);
    EXPECT_FALSE(s.publication.ok());
}

TEST_F(FaultTest, AnExpiredManifestIsRefused) {
    PublicationOptions p;
    p.ttl = 50;
    serve(p);
    EXPECT_EQ(fetch_completely().publication.code(), ErrorCode::kExpired);
}

TEST_F(FaultTest, AnotherModelsOrLayoutsPublicationIsRefused) {
    serve();
    wanted.model = "expected";
    EXPECT_EQ(fetch_completely().publication.code(), ErrorCode::kForeign);
    wanted.model.clear();
    wanted.layout = published->manifest.layout;
    wanted.layout->layers = 5;
    EXPECT_EQ(fetch_completely().publication.code(), ErrorCode::kForeign);
    wanted.layout.reset();
    wanted.salt = "pepper";
    EXPECT_EQ(fetch_completely().publication.code(), ErrorCode::kForeign);
}

TEST_F(FaultTest, ChunksBeyondTheMemoryAllowedAreRefused) {
    serve();
    options.chunk_bytes = 1000;
    EXPECT_EQ(fetch_completely().publication.code(), ErrorCode::kLimitExceeded);
}

// Whatever a manifest promises, memory is bounded.
TEST_F(FaultTest, ObjectsAndCalibrationsBeyondTheMemoryAllowedAreNotAskedFor) {
    serve_klt();
    Manifest& manifest = published->manifest;
    const std::uint64_t honest = manifest.chunks[1].objects[1].bytes;
    manifest.chunks[1].objects[1].bytes = std::uint64_t{1} << 35;
    ASSERT_TRUE(store->put(published->name, as_bytes(write_manifest(manifest))).ok());
    Summary s = fetch_completely();
    EXPECT_EQ(s.chunks[0].level, 2u);
    EXPECT_EQ(s.chunks[1].level, 3u);
    EXPECT_THAT(s.chunks[1].trouble, HasSubstr("level 2: 34359738368 bytes, at most 1073741824"));
    manifest.chunks[1].objects[1].bytes = honest;
    manifest.calibration->bytes = std::uint64_t{1} << 35;
    ASSERT_TRUE(store->put(published->name, as_bytes(write_manifest(manifest))).ok());
    s = fetch_completely();
    for (const ChunkReport& c : s.chunks) EXPECT_EQ(c.level, 0u);
    EXPECT_THAT(s.chunks[1].trouble, HasSubstr("a calibration of 34359738368 bytes"));
    EXPECT_EQ(server->count("kvcal"), 1u);
}

TEST_F(FaultTest, KvBeyondTheMemoryAllowedIsRefused) {
    serve();
    const Layout& layout = published->manifest.layout;
    const std::uint64_t all = kTokens * layout.token_bytes();
    options.kv_bytes = all;
    EXPECT_EQ(fetch_completely().text_tokens, 0u);
    options.kv_bytes = all - 1;
    EXPECT_EQ(fetch_completely().publication.code(), ErrorCode::kLimitExceeded);
}

TEST_F(FaultTest, AnEndlessManifestIsCutOff) {
    be_patient();
    serve();
    fault("manifests", R"("fault": "oversize", "extra": 140000000)");
    EXPECT_EQ(fetch_completely().publication.code(), ErrorCode::kObjectMismatch);
}

// ---- cancellation ----

TEST_F(FaultTest, CancelMidDecodeEndsTheSession) {
    serve();
    sink.emplace(*published);
    Client client(http);
    client::CodecAdapter codec(1, "");
    Session* running = nullptr;
    std::promise<void> begun;
    sink->in_layer = [&](std::size_t chunk, std::size_t layer) {
        if (chunk != 1 || layer != 1) return;
        running->cancel();
        begun.set_value();
    };
    // The session must be known before its first callback.
    std::promise<void> known;
    client.loop().post([&] { known.get_future().wait(); });
    Session session(client.loop(), client.transport(), wanted, options, codec, *sink);
    running = &session;
    known.set_value();
    begun.get_future().wait();
    EXPECT_EQ(session.wait().status.code(), ErrorCode::kCancelled);
    EXPECT_TRUE(sink->finished());
    EXPECT_LT(sink->chunks_loaded(), 4u);
}

TEST_F(FaultTest, ASessionCanBeDroppedAtAnyTime) {
    serve();
    Client client(http);
    for (int i = 0; i < 40; ++i) {
        CheckingSink mine(*published);
        client::CodecAdapter codec(1, "");
        Session session(client.loop(), client.transport(), wanted, options, codec, mine);
        std::this_thread::sleep_for(std::chrono::microseconds(500 * i));
    }
}

TEST_F(FaultTest, CancelWhileNothingAnswers) {
    serve();
    fault(".", R"("fault": "stall-before-headers")");
    EXPECT_EQ(cancelled().code(), ErrorCode::kCancelled);
}

}  // namespace
}  // namespace kvcast::test
