// What sinks and codecs throw ends their session and nothing else; so does memory that is used up.
#include <dlfcn.h>
#include <execinfo.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string_view>
#include <thread>

#include "streamer/http/client.h"
#include "streamer/lookup.h"
#include "streamer/rules/rules.h"
#include "streamer/session.h"
#include "tests/streamer/fault_server.h"
#include "tests/streamer/publication.h"
#include "tools/client/codec_adapter.h"

namespace {

// Whether nlohmann-json asks: it flattens a value by means of a vector before it destroys it, where an
// exception ends the process.
bool asked_by_json() {
    std::array<void*, 24> frames;
    const int count = ::backtrace(frames.data(), frames.size());
    return std::any_of(frames.begin(), frames.begin() + count, [](void* frame) {
        Dl_info info = {};
        return ::dladdr(frame, &info) != 0 && info.dli_sname != nullptr &&
               std::string_view(info.dli_sname).find("nlohmann") != std::string_view::npos;
    });
}

// Allocations of all threads but the one that arms them. The nth fails, or all that are large do.
struct Allocations {
    std::atomic<bool> armed = false;
    std::thread::id spared;
    std::atomic<std::size_t> seen = 0;
    std::size_t failing = 0;                           // 1: the first one; 0: none
    std::size_t large = static_cast<std::size_t>(-1);  // bytes

    bool fails(std::size_t bytes) {
        if (!armed || std::this_thread::get_id() == spared) return false;
        return (++seen == failing || bytes >= large) && !asked_by_json();
    }
};
Allocations allocations;

void* allocate(std::size_t bytes) {
    if (allocations.fails(bytes)) throw std::bad_alloc();
    void* memory = std::malloc(bytes);
    if (memory == nullptr) throw std::bad_alloc();
    return memory;
}

}  // namespace

void* operator new(std::size_t bytes) {
    return allocate(bytes);
}
void* operator new[](std::size_t bytes) {
    return allocate(bytes);
}
// Inlined beside a call of operator new, free() looks to the compiler like a mistake.
[[gnu::noinline]] void operator delete(void* memory) noexcept {
    std::free(memory);
}
[[gnu::noinline]] void operator delete[](void* memory) noexcept {
    std::free(memory);
}
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept {
    std::free(memory);
}
[[gnu::noinline]] void operator delete[](void* memory, std::size_t) noexcept {
    std::free(memory);
}

namespace kvcast::test {
namespace {

using namespace streamer;

enum class Place : std::uint8_t {
    kNowhere,
    kManifest,
    kDecision,
    kFirstLayer,
    kSecondLayer,
    kRecompute,
    kFinish,
    kHasCalibration,
    kBegunCalibration,
    kAddCalibration,
    kKeepBegun,
    kDecode,
};

class ThrowingSink final : public Sink {
  public:
    explicit ThrowingSink(Place place) : place_(place) {}

    void on_manifest(const Manifest&, std::size_t) override { reach(Place::kManifest); }
    void on_decision(const DecisionRecord&) override { reach(Place::kDecision); }
    void on_layer(std::size_t chunk, TokenRange, std::size_t layer, std::span<const DecodedPlane>) override {
        if (layer == 0) firsts[chunk] += 1;
        if (layer == 0) reach(Place::kFirstLayer);
        if (layer == 1) reach(Place::kSecondLayer);
    }
    void on_recompute(TokenRange, std::span<const std::int32_t>) override { reach(Place::kRecompute); }
    void on_finish(const Summary&) override { reach(Place::kFinish); }

    std::map<std::size_t, int> firsts;  // [chunk]: how often its first layer came

  private:
    void reach(Place place) const {
        if (place == place_) throw std::runtime_error("the sink's");
    }
    const Place place_;
};

class ThrowingCodec final : public ChunkCodec {
  public:
    explicit ThrowingCodec(Place place) : place_(place) {}

    bool has_calibration(const Hash& id) override {
        reach(Place::kHasCalibration);
        return sound_.has_calibration(id);
    }
    Status add_calibration(std::span<const std::uint8_t> file) override {
        reach(Place::kAddCalibration);
        return sound_.add_calibration(file);
    }
    void keep_begun(const Hash&, std::span<const std::uint8_t>) override { reach(Place::kKeepBegun); }
    std::vector<std::uint8_t> begun_calibration(const Hash&) override {
        reach(Place::kBegunCalibration);
        return {};
    }
    Status decode(std::span<const std::uint8_t> object, const LayerCallback& deliver) override {
        reach(Place::kDecode);
        return sound_.decode(object, deliver);
    }

  private:
    void reach(Place place) const {
        if (place == place_) throw std::bad_alloc();
    }
    const Place place_;
    client::CodecAdapter sound_{1, ""};
};

class ExceptionTest : public testing::Test {
  protected:
    ExceptionTest() {
        PublicationOptions klt;
        klt.klt = true;
        klt.levels = {0, 2};
        const auto store = std::move(folder_destination(folder_.path()).value());
        published_ = publish(*store, klt);
        server_.emplace(folder_.path());
        wanted_.manifest_url = server_->url(published_.name);
        wanted_.token_ids = published_.token_ids;
        options_.deadline = 10;
        options_.rule = fixed_level_rule(2);
        options_.compute.prefill = {{0, 1000.0}};
        options_.download.retry.first_delay = std::chrono::milliseconds(10);
        options_.download.queue_timeout = options_.download.first_byte_timeout =
            options_.download.stall_timeout = std::chrono::milliseconds(500);
        options_.wall_clock = [] { return 1'800'000'100; };
    }

    Summary fetch(ChunkCodec& codec, Sink& sink) {
        Client client(http_);
        Session session(client.loop(), client.transport(), wanted_, options_, codec, sink);
        return session.wait();
    }
    Summary fetch(Place place) {
        ThrowingCodec codec(place);
        ThrowingSink sink(place);
        Summary s = fetch(codec, sink);
        for (const auto& [chunk, times] : sink.firsts) EXPECT_EQ(times, 1) << "chunk " << chunk;
        return s;
    }

    tools::ScratchDirectory folder_;
    Published published_;
    std::optional<FaultServer> server_;
    HttpOptions http_;
    Wanted wanted_;
    SessionOptions options_;
};

TEST_F(ExceptionTest, ASinkThatThrowsEndsItsSession) {
    for (const Place place :
         {Place::kManifest, Place::kDecision, Place::kFirstLayer, Place::kSecondLayer, Place::kFinish}) {
        const Summary s = fetch(place);
        EXPECT_EQ(s.status.code(), ErrorCode::kThrown) << static_cast<int>(place);
        EXPECT_EQ(s.status.message(), "the sink's");
    }
}

TEST_F(ExceptionTest, AnEngineThatThrowsEndsItsSession) {
    server_->fault(R"({"match": "kvc$", "fault": "status", "status": 404})");
    EXPECT_EQ(fetch(Place::kRecompute).status.code(), ErrorCode::kThrown);
}

TEST_F(ExceptionTest, ACodecWithoutMemoryForACalibrationGetsLevelsThatNeedNone) {
    const Summary s = fetch(Place::kAddCalibration);
    EXPECT_TRUE(s.status.ok()) << s.status.message();
    for (const ChunkReport& c : s.chunks) {
        EXPECT_EQ(c.level, 0u);
        EXPECT_FALSE(c.text);
    }
}

TEST_F(ExceptionTest, ACodecWithoutMemoryForChunksGetsText) {
    const Summary s = fetch(Place::kDecode);
    EXPECT_TRUE(s.status.ok()) << s.status.message();
    EXPECT_EQ(s.text_tokens, published_.token_ids.size());
    EXPECT_NE(s.chunks.front().trouble.find("out of memory"), std::string::npos) << s.chunks.front().trouble;
}

TEST_F(ExceptionTest, ACodecThatThrowsElsewhereEndsItsSession) {
    for (const Place place : {Place::kHasCalibration, Place::kBegunCalibration})
        EXPECT_EQ(fetch(place).status.code(), ErrorCode::kOutOfMemory) << static_cast<int>(place);
}

TEST_F(ExceptionTest, ASessionAfterOneThatFailedIsWhole) {
    Client client(http_);
    for (const Place place : {Place::kSecondLayer, Place::kNowhere}) {
        ThrowingCodec codec(place);
        ThrowingSink sink(place);
        Session session(client.loop(), client.transport(), wanted_, options_, codec, sink);
        EXPECT_EQ(session.wait().status.ok(), place == Place::kNowhere);
    }
}

TEST(ThreadLoopTest, WhatATaskThrowsIsThrownWhereItIsAwaited) {
    ThreadLoop loop;
    EXPECT_THROW(loop.run([] { throw std::runtime_error("x"); }), std::runtime_error);
    bool ran = false;
    loop.run([&] { ran = true; });
    EXPECT_TRUE(ran);
}

TEST(ThreadLoopTest, WhatWasPostedRunsBeforeItStops) {
    int ran = 0;
    ThreadLoop loop;
    for (int i = 0; i < 100; ++i) loop.post([&] { ++ran; });
    loop.stop();
    EXPECT_EQ(ran, 100);
    loop.post([&] { ++ran; });
    loop.stop();
    EXPECT_EQ(ran, 100);
}

// One child, in which a session's allocations fail; true once all have been seen to fail.
bool survives_without(std::size_t failing, std::size_t large, const std::function<void()>& run) {
    constexpr int kAllSeen = 3;
    const pid_t child = ::fork();
    if (child == 0) {
        ::alarm(60);
        allocations.spared = std::this_thread::get_id();
        allocations.failing = failing;
        allocations.large = large;
        allocations.armed = true;
        try {
            run();
        } catch (const std::bad_alloc&) {  // its caller's to handle
        }
        ::_exit(allocations.seen < failing ? kAllSeen : 0);
    }
    int status = 0;
    ::waitpid(child, &status, 0);
    EXPECT_TRUE(WIFEXITED(status)) << "allocation " << failing << ": signal " << WTERMSIG(status);
    return !WIFEXITED(status) || WEXITSTATUS(status) == kAllSeen;
}

TEST_F(ExceptionTest, ASessionEndsWhicheverAllocationFails) {
    const auto run = [this] { fetch(Place::kNowhere); };
    std::size_t n = 1;
    while (!survives_without(n, static_cast<std::size_t>(-1), run)) n += 1 + n / 50;
    EXPECT_GT(n, 500u);
}

TEST_F(ExceptionTest, ASessionEndsWithoutRoomForAnythingLarge) {
    for (const std::size_t large : {std::size_t{1} << 9, std::size_t{1} << 12, std::size_t{1} << 14})
        survives_without(0, large, [this] { fetch(Place::kNowhere); });
}

TEST_F(ExceptionTest, ALookupEndsWhicheverAllocationFails) {
    wanted_.store_url = server_->url("");
    wanted_.manifest_url.clear();
    wanted_.layout = published_.manifest.layout;
    wanted_.model = published_.manifest.model;
    wanted_.chunk_tokens = 64;
    const auto run = [this] {
        Client client(http_);
        LookupOptions options;
        options.download = options_.download;
        options.wall_clock = options_.wall_clock;
        (void)look_up(client.loop(), client.transport(), wanted_, options);
    };
    std::size_t n = 1;
    while (!survives_without(n, static_cast<std::size_t>(-1), run)) n += 1 + n / 50;
    EXPECT_GT(n, 100u);
}

}  // namespace
}  // namespace kvcast::test
