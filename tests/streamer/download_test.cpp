// Downloads get the whole object or say why not, whatever the server does.
#include <gtest/gtest.h>

#include <future>
#include <memory>
#include <numeric>
#include <optional>

#include "streamer/download.h"
#include "streamer/lane.h"
#include "streamer/memory_pool.h"
#include "tests/streamer/fake_network.h"

namespace kvcast::test {
namespace {

using namespace streamer;
using std::chrono::milliseconds;
using Bytes = std::vector<std::uint8_t>;

class DownloadTest : public testing::Test, public DownloadObserver {
  protected:
    DownloadTest() {
        object.resize(200'000);
        std::iota(object.begin(), object.end(), std::uint8_t{0});
        options.retry.attempts = 3;
    }

    void begin(std::optional<std::uint64_t> bytes = 200'000) {
        download = std::make_unique<Download>(loop, network, DownloadRequest{"u", bytes, 300'000, {1, 2, 3}},
                                              options, *this, 1);
    }

    void on_first_byte(Duration latency) override { latencies.push_back(latency); }
    void on_bytes(std::size_t count) override {
        received += count;
        progress = download->received();
    }
    void on_finished(Result<Bytes> result, int status) override {
        outcome.emplace(std::move(result));
        http_status = status;
        download.reset();  // an observer may
    }

    std::span<const std::uint8_t> part(std::size_t first, std::size_t count = Bytes().max_size()) const {
        return std::span(object).subspan(first, std::min(count, object.size() - first));
    }
    static HttpHead whole(std::uint64_t length = 200'000) {
        HttpHead head;
        head.status = 200;
        head.content_length = length;
        head.etag = "\"a\"";
        return head;
    }
    static HttpHead partial(std::uint64_t first, std::uint64_t length = 200'000) {
        HttpHead head = whole(length - first);
        head.status = 206;
        head.range_first = first;
        head.object_bytes = length;
        return head;
    }
    static HttpResult good(int status = 200) { return {{}, status, {}}; }
    static HttpResult broken() { return {{ErrorCode::kNetwork, "reset"}, 200, {}}; }
    void pass(Duration time = std::chrono::seconds(3)) { loop.advance(time); }

    void expect_object() {
        ASSERT_TRUE(outcome);
        ASSERT_TRUE(outcome->ok()) << outcome->status().message();
        EXPECT_TRUE(outcome->value() == object);
        EXPECT_EQ(network.waiting(), 0u);
        EXPECT_EQ(loop.timers(), 0u);
    }
    void expect_failure(ErrorCode code) {
        ASSERT_TRUE(outcome);
        EXPECT_EQ(outcome->status().code(), code) << outcome->status().message();
        EXPECT_EQ(network.waiting(), 0u);
        EXPECT_EQ(loop.timers(), 0u);
    }

    FakeLoop loop;
    FakeTransport network;
    DownloadOptions options;
    Bytes object;
    std::unique_ptr<Download> download;
    std::optional<Result<Bytes>> outcome;
    int http_status = 0;
    std::vector<Duration> latencies;
    std::size_t received = 0;
    std::uint64_t progress = 0;  // received() when bytes came last
};

TEST_F(DownloadTest, BringsAnObjectOfKnownSize) {
    begin();
    loop.advance(milliseconds(40));
    EXPECT_TRUE(network.head(0, whole()));
    EXPECT_TRUE(network.body(0, part(0, 1000)));
    EXPECT_TRUE(network.body(0, part(1000)));
    network.end(0, good());
    expect_object();
    EXPECT_EQ(latencies, std::vector<Duration>{milliseconds(40)});
    EXPECT_EQ(received, object.size());
}

TEST_F(DownloadTest, BringsAnObjectOfUnknownSize) {
    begin(std::nullopt);
    HttpHead head = whole();
    head.content_length.reset();
    network.head(0, head);
    network.body(0, part(0));
    network.end(0, good());
    expect_object();
}

TEST_F(DownloadTest, ResumesWhereItBrokeOff) {
    begin();
    network.head(0, whole());
    network.body(0, part(0, 70'000));
    network.end(0, broken());
    pass();
    ASSERT_TRUE(network.waits(1));
    EXPECT_EQ(network.requests[1].request.range->first, 70'000u);
    EXPECT_EQ(network.requests[1].request.if_range, "\"a\"");
    network.head(1, partial(70'000));
    network.body(1, part(70'000));
    network.end(1, good(206));
    expect_object();
    EXPECT_EQ(received, object.size());
}

TEST_F(DownloadTest, UsesAWholeAnswerToARange) {
    begin();
    network.head(0, whole());
    network.body(0, part(0, 70'000));
    network.end(0, broken());
    pass();
    network.head(1, whole());
    network.body(1, part(0, 100'000));
    network.body(1, part(100'000));
    network.end(1, good());
    expect_object();
}

TEST_F(DownloadTest, StartsOverWhenTheObjectChanged) {
    begin();
    network.head(0, whole());
    network.body(0, Bytes(70'000, 9));
    network.end(0, broken());
    pass();
    HttpHead head = whole();
    head.etag = "\"b\"";
    network.head(1, head);
    network.body(1, part(0));
    network.end(1, good());
    expect_object();
}

TEST_F(DownloadTest, StartsOverAfterAWrongRange) {
    begin();
    network.head(0, whole());
    network.body(0, part(0, 70'000));
    network.end(0, broken());
    pass();
    network.head(1, partial(70'001));
    network.body(1, part(70'001, 10));
    network.end(1, good(206));
    pass();
    EXPECT_FALSE(network.requests[2].request.range);
    network.head(2, whole());
    network.body(2, part(0));
    network.end(2, good());
    expect_object();
}

TEST_F(DownloadTest, StartsOverAfter416) {
    begin();
    network.head(0, whole());
    network.body(0, part(0, 70'000));
    network.end(0, broken());
    pass();
    HttpHead head;
    head.status = 416;
    network.head(1, head);
    network.end(1, good(416));
    pass();
    EXPECT_FALSE(network.requests[2].request.range);
    network.head(2, whole());
    network.body(2, part(0));
    network.end(2, good());
    expect_object();
}

TEST_F(DownloadTest, APartialAnswerToAWholeRequestIsNotTaken) {
    begin();
    network.head(0, partial(0));
    network.end(0, good(206));
    pass();
    network.head(1, whole());
    network.body(1, part(0));
    network.end(1, good());
    expect_object();
}

TEST_F(DownloadTest, AShortAnswerIsResumed) {
    begin();
    HttpHead head = whole();
    head.content_length.reset();
    network.head(0, head);
    network.body(0, part(0, 150'000));
    network.end(0, good());
    pass();
    EXPECT_EQ(network.requests[1].request.range->first, 150'000u);
    network.head(1, partial(150'000));
    network.body(1, part(150'000));
    network.end(1, good(206));
    expect_object();
}

TEST_F(DownloadTest, AnotherSizeIsRefusedAtOnce) {
    begin();
    network.head(0, whole(199'999));
    network.end(0, good());
    expect_failure(ErrorCode::kObjectMismatch);
}

TEST_F(DownloadTest, AnEndlessAnswerIsCutOff) {
    begin();
    HttpHead head = whole();
    head.content_length.reset();
    network.head(0, head);
    network.body(0, part(0));
    EXPECT_FALSE(network.body(0, part(0, 1)));
    network.end(0, {{ErrorCode::kCancelled, "write error"}, 200, {}});
    expect_failure(ErrorCode::kObjectMismatch);
}

TEST_F(DownloadTest, AnObjectBeyondTheLimitIsRefused) {
    begin(std::nullopt);
    network.head(0, whole(300'001));
    network.end(0, good());
    expect_failure(ErrorCode::kObjectMismatch);
}

TEST_F(DownloadTest, FinalAnswersAreNotRepeated) {
    for (const int status : {403, 404, 410}) {
        outcome.reset();
        begin();
        HttpHead head;
        head.status = status;
        network.head(network.requests.size() - 1, head);
        network.end(network.requests.size() - 1, good(status));
        expect_failure(ErrorCode::kHttpStatus);
        EXPECT_EQ(http_status, status);
    }
    EXPECT_EQ(network.requests.size(), 3u);
}

TEST_F(DownloadTest, BackoffGrowsAndEnds) {
    options.retry.attempts = 4;
    begin();
    std::vector<Duration> pauses;
    for (std::size_t i = 0; i < 4; ++i) {
        ASSERT_TRUE(network.waits(i));
        network.end(i, {{ErrorCode::kNetwork, "refused"}, 0, {}});
        Duration pause{0};
        for (; !outcome && network.requests.size() == i + 1; pause += milliseconds(1))
            loop.advance(milliseconds(1));
        if (!outcome) pauses.push_back(pause);
    }
    expect_failure(ErrorCode::kNetwork);
    ASSERT_EQ(pauses.size(), 3u);
    for (std::size_t i = 0; i < 3; ++i) {
        const Duration ceiling = options.retry.first_delay * (1 << i);
        EXPECT_GE(pauses[i] + milliseconds(1), ceiling / 2);
        EXPECT_LE(pauses[i], ceiling + milliseconds(2));
    }
}

TEST_F(DownloadTest, WaitsAsLongAsTheServerAsks) {
    begin();
    HttpHead head;
    head.status = 503;
    network.head(0, head);
    network.end(0, {{}, 503, std::chrono::seconds(2)});
    loop.advance(milliseconds(1990));
    EXPECT_EQ(network.requests.size(), 1u);
    loop.advance(milliseconds(20));
    EXPECT_EQ(network.requests.size(), 2u);
}

TEST_F(DownloadTest, AServerThatAsksForTooLongIsGivenUp) {
    begin();
    HttpHead head;
    head.status = 429;
    network.head(0, head);
    network.end(0, {{}, 429, std::chrono::hours(1)});
    expect_failure(ErrorCode::kHttpStatus);
}

TEST_F(DownloadTest, ProgressRenewsPatience) {
    begin();
    std::size_t at = 0;
    for (std::size_t i = 0; at < object.size(); ++i, at += 70'000) {
        ASSERT_TRUE(network.waits(i)) << i;
        network.head(i, i == 0 ? whole() : partial(at));
        network.body(i, part(at, 70'000));
        network.end(i, at + 70'000 < object.size() ? broken() : good());
        pass();
    }
    expect_object();
}

TEST_F(DownloadTest, SilenceBeforeTheFirstByteIsAFailure) {
    begin();
    pass(options.first_byte_timeout + milliseconds(1));
    EXPECT_FALSE(network.waits(0));
    pass(options.first_byte_timeout * 4);
    expect_failure(ErrorCode::kTimeout);
    EXPECT_EQ(network.requests.size(), 3u);
}

// Others to the same host come first: that says nothing about the server.
TEST_F(DownloadTest, ARequestThatWaitsForAConnectionIsNotSilence) {
    network.queues = true;
    options.hedge_after = milliseconds(200);
    begin();
    pass(options.first_byte_timeout * 3);
    EXPECT_TRUE(network.waits(0));
    EXPECT_EQ(network.requests.size(), 1u) << "nor is it a reason for a hedge";
    network.connect(0);
    pass(milliseconds(100));
    network.head(0, whole());
    network.body(0, part(0));
    network.end(0, good());
    expect_object();
    EXPECT_EQ(latencies, std::vector<Duration>{milliseconds(100)});
}

TEST_F(DownloadTest, AConnectionThatIsNeverToBeHadIsAFailure) {
    network.queues = true;
    begin();
    pass(options.queue_timeout * 4);
    expect_failure(ErrorCode::kTimeout);
    EXPECT_NE(outcome->status().message().find("no connection"), std::string::npos);
}

TEST_F(DownloadTest, AnErrorsBodyIsTrafficAndNoProgress) {
    begin();
    HttpHead head;
    head.status = 503;
    network.head(0, head);
    network.body(0, part(0, 60'000));
    EXPECT_EQ(received, 60'000u);
    EXPECT_EQ(download->received(), 0u);
    EXPECT_EQ(progress, 0u);
    EXPECT_TRUE(latencies.empty());
}

TEST_F(DownloadTest, AHedgeThatLagsBehindIsNoProgress) {
    options.hedge_after = milliseconds(200);
    begin();
    network.head(0, whole());
    network.body(0, part(0, 150'000));
    pass(milliseconds(250));
    ASSERT_TRUE(network.waits(1));
    network.head(1, whole());
    network.body(1, part(0, 50'000));
    EXPECT_EQ(received, 200'000u);
    EXPECT_EQ(progress, 150'000u);
}

TEST_F(DownloadTest, AStallIsResumed) {
    begin();
    network.head(0, whole());
    network.body(0, part(0, 100'000));
    pass(options.stall_timeout + milliseconds(100));
    EXPECT_FALSE(network.waits(0));
    ASSERT_TRUE(network.waits(1));
    EXPECT_EQ(network.requests[1].request.range->first, 100'000u);
}

TEST_F(DownloadTest, AHedgeAsksForWhatIsMissing) {
    options.hedge_after = milliseconds(200);
    begin();
    network.head(0, whole());
    network.body(0, part(0, 100'000));
    loop.advance(milliseconds(201));
    ASSERT_TRUE(network.waits(1));
    EXPECT_EQ(network.requests[1].request.range->first, 100'000u);
    loop.advance(milliseconds(500));
    EXPECT_EQ(network.requests.size(), 2u);  // one hedge at a time
    network.head(1, partial(100'000));
    network.body(1, part(100'000));
    network.end(1, good(206));
    expect_object();
    EXPECT_FALSE(network.waits(0));
}

TEST_F(DownloadTest, BothHedgesMayGoOn) {
    options.hedge_after = milliseconds(200);
    begin();
    loop.advance(milliseconds(201));
    network.head(0, whole());
    network.head(1, whole());
    for (std::size_t at = 0; at < 150'000; at += 50'000) {
        network.body(0, part(at, 50'000));
        network.body(1, part(at, 50'000));
    }
    network.body(1, part(150'000));
    network.body(0, part(150'000));
    network.end(0, good());
    expect_object();
    EXPECT_EQ(received, 2 * object.size());
}

TEST_F(DownloadTest, TheOtherHedgeSurvivesAFailure) {
    options.hedge_after = milliseconds(200);
    begin();
    loop.advance(milliseconds(201));
    network.end(0, {{ErrorCode::kNetwork, "reset"}, 0, {}});
    EXPECT_FALSE(outcome);
    network.head(1, whole());
    network.body(1, part(0));
    network.end(1, good());
    expect_object();
}

TEST_F(DownloadTest, DestroyedItLeavesNothingBehind) {
    begin();
    network.head(0, whole());
    network.body(0, part(0, 5));
    download.reset();
    EXPECT_EQ(network.waiting(), 0u);
    EXPECT_EQ(loop.timers(), 0u);
    EXPECT_FALSE(outcome);
}

TEST(Retry, IsWorthItWhereTheAnswerMayChange) {
    const auto worth = [](ErrorCode code, int status) { return worth_retrying({{code, "x"}, status, {}}); };
    EXPECT_TRUE(worth(ErrorCode::kNetwork, 0));
    EXPECT_TRUE(worth(ErrorCode::kTimeout, 0));
    EXPECT_TRUE(worth(ErrorCode::kProtocol, 206));
    for (const int status : {408, 425, 429, 500, 502, 503, 504})
        EXPECT_TRUE(worth(ErrorCode::kHttpStatus, status));
    for (const int status : {400, 401, 403, 404, 410, 501, 505})
        EXPECT_FALSE(worth(ErrorCode::kHttpStatus, status));
    EXPECT_FALSE(worth(ErrorCode::kTls, 0));
    EXPECT_FALSE(worth(ErrorCode::kObjectMismatch, 200));
    EXPECT_FALSE(worth(ErrorCode::kBadArgument, 0));
}

TEST(MemoryPoolTest, KeepsWhatFitsAndGivesTheSmallestThatIsEnough) {
    MemoryPool pool(1000);
    const auto sized = [](std::size_t bytes) {
        Bytes out;
        out.reserve(bytes);
        out.push_back(1);
        return out;
    };
    pool.give(sized(600));
    pool.give(sized(300));
    pool.give(sized(200));  // too much together
    pool.give({});
    EXPECT_EQ(pool.take(250).capacity(), 300u);
    EXPECT_EQ(pool.take(700).capacity(), 0u);
    const Bytes large = pool.take(10);
    EXPECT_EQ(large.capacity(), 600u);
    EXPECT_TRUE(large.empty());
}

TEST(LaneTest, RunsTasksInOrderAndDropsThemOnceStopped) {
    const auto owned = std::make_shared<int>(0);
    std::vector<int> order;
    Lane lane;
    std::promise<void> ran;
    for (int n = 0; n < 3; ++n) lane.run([&order, n] { order.push_back(n); });
    lane.run([&] { ran.set_value(); });
    ran.get_future().wait();
    EXPECT_EQ(order, (std::vector<int>{0, 1, 2}));
    lane.stop();
    lane.run([owned] { FAIL(); });
    EXPECT_EQ(owned.use_count(), 1);
}

}  // namespace
}  // namespace kvcast::test
