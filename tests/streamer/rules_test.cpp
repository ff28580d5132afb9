// Rules decide as their equations say.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "streamer/rules/outlook.h"
#include "streamer/rules/rules.h"
#include "streamer/throughput.h"

namespace kvcast::test {
namespace {

using namespace streamer;
using testing::HasSubstr;
using Kind = Decision::Kind;

// Eight chunks of 100 tokens; levels 0, 2, 5 of 1000, 400 and 100 kB.
class RuleTest : public testing::Test {
  protected:
    RuleTest() {
        for (std::size_t i = 0; i < 8; ++i) {
            ChunkView c;
            c.first_token = 100 * i;
            c.tokens = 100;
            c.levels = {{0, 1'000'000, 0, true}, {2, 400'000, 0.01, true}, {5, 100'000, 0.05, true}};
            chunks.push_back(c);
        }
        compute.bytes_per_token = 10'000;
        compute.decode_bytes_per_second = 1e9;
        network(1e6);
    }
    void network(double rate) { state.network = {rate, rate, rate, rate, 0.01, 0, true}; }
    Decision decide(const Rule& rule) {
        state.chunks = chunks;
        state.compute = &compute;
        state.most_transfers = most_transfers;
        state.transfers =
            static_cast<std::size_t>(std::ranges::count(chunks, ChunkStatus::kLoading, &ChunkView::status));
        return rule.decide(state);
    }

    std::vector<ChunkView> chunks;
    ComputeModel compute;
    RuleState state;
    std::size_t most_transfers = 2;
};

TEST_F(RuleTest, FixedTakesItsLevelOrACoarserOne) {
    const auto rule = fixed_level_rule(2);
    EXPECT_EQ(decide(*rule).choice, 1u);
    chunks[0].levels[1].usable = false;
    EXPECT_EQ(decide(*rule).choice, 2u);
    chunks[0].levels[2].usable = false;
    EXPECT_EQ(decide(*rule).choice, 0u);
    chunks[0].levels[0].usable = false;
    EXPECT_EQ(decide(*rule).kind, Kind::kText);
}

TEST_F(RuleTest, FixedKeepsTheLinkBusyAndNoMore) {
    const auto rule = fixed_level_rule(2);
    chunks[0].status = ChunkStatus::kLoading;
    EXPECT_EQ(decide(*rule).chunk, 1u);
    chunks[1].status = ChunkStatus::kLoading;
    EXPECT_EQ(decide(*rule).kind, Kind::kWait);
}

TEST_F(RuleTest, CacheGenTakesTheFinestLevelWhoseRestFits) {
    const auto rule = cachegen_rule();
    state.deadline = 8.0;
    EXPECT_EQ(decide(*rule).choice, 0u);
    state.deadline = 7.9;
    EXPECT_EQ(decide(*rule).choice, 1u);
    state.deadline = 0.81;
    EXPECT_EQ(decide(*rule).choice, 2u);
    state.deadline = 0.1;
    EXPECT_EQ(decide(*rule).choice, 2u);
    chunks[0].status = ChunkStatus::kLoading;
    EXPECT_EQ(decide(*rule).kind, Kind::kWait);
}

TEST_F(RuleTest, CacheGenSendsTextWhereRecomputingTheRestFits) {
    compute.prefill = {{0, 100.0}};  // 8 s for all
    const auto rule = cachegen_rule();
    state.deadline = 7.9;
    EXPECT_EQ(decide(*rule).kind, Kind::kLoad);
    state.deadline = 8.1;
    EXPECT_EQ(decide(*rule).kind, Kind::kText);
}

TEST_F(RuleTest, DeadlineTakesOneLevelForAllThatIsLeft) {
    const auto rule = deadline_rule();
    EXPECT_EQ(decide(*rule).choice, 0u) << "without a deadline, the finest";
    state.deadline = 9;
    EXPECT_EQ(decide(*rule).choice, 0u);
    state.deadline = 8.5;
    EXPECT_EQ(decide(*rule).choice, 1u);
    state.deadline = 1;
    EXPECT_EQ(decide(*rule).choice, 2u);
    EXPECT_THAT(decide(*rule).reason, HasSubstr("level 5"));
}

TEST_F(RuleTest, DeadlineChargesWhatIsInFlightDecodingAndTheCalibration) {
    const auto rule = deadline_rule();
    state.deadline = 4;
    EXPECT_EQ(decide(*rule).choice, 1u);
    state.other_bytes = 500'000;
    EXPECT_EQ(decide(*rule).choice, 2u);
    state.other_bytes = 0;
    compute.decode_bytes_per_second = 2e6;
    EXPECT_EQ(decide(*rule).choice, 2u);
    compute.decode_bytes_per_second = 1e9;
    chunks[0].status = ChunkStatus::kLoading;
    chunks[0].choice = 0;
    EXPECT_EQ(decide(*rule).choice, 2u);
}

TEST_F(RuleTest, DeadlineLoadsTheCoarsestWhereNothingFits) {
    state.deadline = 0.2;
    const Decision d = decide(*deadline_rule());
    EXPECT_EQ(d.kind, Kind::kLoad);
    EXPECT_EQ(d.choice, 2u);
    EXPECT_THAT(d.reason, HasSubstr("late"));
}

TEST_F(RuleTest, DeadlineTurnsToTextWhenOnlyThatIsInTime) {
    compute.prefill = {{0, 1000.0}};  // 0.8 s for all
    state.deadline = 0.85;
    network(0.9e6);
    EXPECT_EQ(decide(*deadline_rule()).kind, Kind::kText);
    network(2e6);
    EXPECT_EQ(decide(*deadline_rule()).kind, Kind::kLoad);
}

TEST_F(RuleTest, DeadlineAbandonsASilentTransferInTimeForText) {
    compute.prefill = {{0, 1000.0}};
    chunks.resize(1);  // 0.1 s of text
    chunks[0].status = ChunkStatus::kLoading;
    chunks[0].choice = 2;
    const auto rule = deadline_rule();
    state.deadline = 1;
    Throughput seen({1e6, 0.01});
    seen.on_request(0);
    for (state.now = 0; state.now < 1; state.now += 0.02) {
        state.network = seen.estimate(state.now);
        if (decide(*rule).kind == Kind::kText) break;
    }
    EXPECT_GT(state.now, 0.05);
    EXPECT_LT(state.now, 0.9);
}

TEST_F(RuleTest, DeadlineStartsOverWhereTheLinkIsSlowerThanItSeemed) {
    const auto rule = deadline_rule();
    chunks[0].status = chunks[1].status = ChunkStatus::kLoading;  // at 1000 kB each
    chunks[0].received = 950'000;
    state.deadline = 1.2;
    network(1e6);
    const Decision first = decide(*rule);
    EXPECT_EQ(first.kind, Kind::kLoad);
    EXPECT_EQ(first.chunk, 1u);
    EXPECT_EQ(first.choice, 2u);
    EXPECT_THAT(first.reason, HasSubstr("over again at level 5"));
    chunks[1].choice = 2;
    EXPECT_EQ(decide(*rule).kind, Kind::kWait) << "what is nearly here goes on";
    state.deadline = 20;
    chunks[1].choice = 0;
    EXPECT_EQ(decide(*rule).kind, Kind::kWait);
}

TEST_F(RuleTest, MpcFillsTheTimeWithTwoNeighbouringLevels) {
    const auto rule = mpc_rule();
    EXPECT_EQ(decide(*rule).choice, 0u) << "without a deadline, the finest";
    state.deadline = 5.5;  // 3.2 MB take 5.3 s at 0.6 of the rate
    EXPECT_EQ(decide(*rule).choice, 1u);
    EXPECT_THAT(decide(*rule).reason, HasSubstr("% of the rest"));
    state.deadline = 6.5;
    EXPECT_EQ(decide(*rule).choice, 0u) << "one chunk";
    state.network.cautious = 0.5e6;
    EXPECT_EQ(decide(*rule).choice, 1u) << "the link has erred";
}

TEST_F(RuleTest, MpcTakesTextForItsQuality) {
    compute.prefill = {{0, 1000}};  // 0.1 s a chunk
    state.deadline = 6;             // everything fits at level 2; with text for the front, at level 0
    const Decision d = decide(*mpc_rule());
    EXPECT_EQ(d.kind, Kind::kText);
    EXPECT_EQ(d.chunk, 0u);
    EXPECT_EQ(decide(*two_pointer_rule()).kind, Kind::kText);
    state.deadline = 20;
    EXPECT_EQ(decide(*mpc_rule()).kind, Kind::kLoad) << "level 0 is as good as text";
}

TEST_F(RuleTest, PrefixOnlyLoadsInOrder) {
    const auto rule = prefix_only_rule();
    compute.prefill = {{0, 1000}};  // 0.8 s for all
    state.deadline = 5.5;
    EXPECT_EQ(decide(*rule).kind, Kind::kLoad);
    EXPECT_EQ(decide(*rule).chunk, 0u);
    EXPECT_EQ(decide(*rule).choice, 1u);
    state.deadline = 20;
    EXPECT_EQ(decide(*rule).choice, 0u);
}

TEST_F(RuleTest, PrefixOnlyNeverLoadsBehindText) {
    const auto rule = prefix_only_rule();
    compute.prefill = {{0, 1000}};
    chunks[0].status = ChunkStatus::kReady;
    chunks[1].status = ChunkStatus::kText;
    chunks[5].status = ChunkStatus::kLoading;
    for (std::size_t i = 2; i < chunks.size(); ++i) {
        const Decision d = decide(*rule);
        EXPECT_EQ(d.kind, Kind::kText);
        ASSERT_EQ(d.chunk, i);
        chunks[i].status = ChunkStatus::kText;
    }
    EXPECT_EQ(decide(*rule).kind, Kind::kWait);
}

TEST_F(RuleTest, PrefixOnlyTurnsToTextAtItsLastMoment) {
    const auto rule = prefix_only_rule();
    compute.prefill = {{0, 1000}};
    network(0.6e6);  // 1.3 s at the coarsest level
    state.deadline = 1;
    EXPECT_EQ(decide(*rule).kind, Kind::kLoad) << "0.8 s of text can wait";
    state.now = 0.15;
    EXPECT_EQ(decide(*rule).kind, Kind::kText);
    state.now = 0.3;
    EXPECT_EQ(decide(*rule).kind, Kind::kLoad) << "both are late, and text is not much quicker";
    state.now = 0;
    network(0.2e6);
    EXPECT_EQ(decide(*rule).kind, Kind::kText) << "loading takes more than twice the time left";
}

// Two-pointer counts on half of the rate, and on 10 ms less than there are.
TEST_F(RuleTest, TwoPointerTakesTheFinestLevelForAllAndAStepFinerForOne) {
    const auto rule = two_pointer_rule();
    EXPECT_EQ(decide(*rule).choice, 0u) << "without a deadline, the finest";
    state.deadline = 16.5;  // 8 MB take 16 s
    EXPECT_EQ(decide(*rule).choice, 0u);
    state.deadline = 6.6;  // 3.2 MB take 6.4 s
    EXPECT_EQ(decide(*rule).choice, 1u);
    state.deadline = 7.8;  // one chunk more by 600 kB: another 1.2 s
    EXPECT_EQ(decide(*rule).choice, 0u);
    state.deadline = 1;
    EXPECT_EQ(decide(*rule).choice, 2u);
    EXPECT_THAT(decide(*rule).reason, HasSubstr("late"));
}

TEST_F(RuleTest, TwoPointerTakesNoTimeForMoreThanEnough) {
    const auto rule = two_pointer_rule();
    for (ChunkView& c : chunks) c.levels[1].kl = 0.0009;  // of 0.05
    EXPECT_EQ(decide(*rule).choice, 0u) << "no hurry";
    state.deadline = 100;
    EXPECT_EQ(decide(*rule).choice, 1u);
    for (ChunkView& c : chunks) c.levels[1].usable = false;
    EXPECT_EQ(decide(*rule).choice, 0u) << "what lies between is not to be had";
}

TEST_F(RuleTest, TwoPointerKeepsLevelsEven) {
    const auto rule = two_pointer_rule();
    state.deadline = 100;
    chunks[7].status = chunks[6].status = ChunkStatus::kReady;
    chunks[7].choice = chunks[6].choice = 2;
    EXPECT_EQ(decide(*rule).choice, 1u) << "a fifth of the others' KL";
    chunks[6].choice = 1;
    EXPECT_EQ(decide(*rule).choice, 1u) << "a third of their mean";
    chunks[7].choice = 1;
    EXPECT_EQ(decide(*rule).choice, 0u);
}

TEST_F(RuleTest, TwoPointerRecomputesFromTheFrontAndLoadsFromTheBack) {
    const auto rule = two_pointer_rule();
    compute.prefill = {{0, 950}};  // 0.105 s a chunk
    state.deadline = 1;            // 7 chunks of text, or 4 loaded ones at the coarsest level
    const Decision text = decide(*rule);
    EXPECT_EQ(text.kind, Kind::kText);
    EXPECT_EQ(text.chunk, 0u);
    chunks[0].status = ChunkStatus::kText;
    state.compute_busy = 0.105;
    const Decision load = decide(*rule);
    EXPECT_EQ(load.kind, Kind::kLoad) << "the engine has something to do";
    EXPECT_EQ(load.chunk, 7u);
    state.compute_busy = 0.02;
    EXPECT_EQ(decide(*rule).chunk, 1u) << "it is about to be idle";
    state.deadline = 20;
    EXPECT_EQ(decide(*rule).kind, Kind::kText) << "in time without it, but sooner with it";
    state.deadline = std::numeric_limits<Seconds>::infinity();
    EXPECT_EQ(decide(*rule).kind, Kind::kLoad) << "no hurry";
    state.deadline = 20;
    compute.prefill = {{0, 5}};  // 20 s a chunk
    chunks[0].status = ChunkStatus::kPending;
    state.compute_busy = 0;
    EXPECT_EQ(decide(*rule).kind, Kind::kLoad) << "all is loaded before one chunk is recomputed";
}

// A link that was slow an hour ago is looked at again.
TEST_F(RuleTest, TwoPointerLooksAtALinkThatWasOnlySaidToBeSlow) {
    const auto rule = two_pointer_rule();
    compute.prefill = {{0, 1000}};  // 0.1 s a chunk
    state.deadline = 2;
    network(1e4);
    chunks[0].status = ChunkStatus::kText;
    state.compute_busy = 0.1;
    EXPECT_EQ(decide(*rule).kind, Kind::kWait) << "it is slow";
    state.network.measured = false;
    const Decision probe = decide(*rule);
    EXPECT_EQ(probe.kind, Kind::kLoad);
    EXPECT_EQ(probe.chunk, 7u);
    EXPECT_EQ(probe.choice, 0u) << "fine enough";
    state.other_bytes = 1000;
    EXPECT_EQ(decide(*rule).kind, Kind::kWait) << "the calibration shows as much";
    state.other_bytes = 0;
    chunks[7].status = ChunkStatus::kLoading;
    chunks[7].choice = 2;
    EXPECT_EQ(decide(*rule).kind, Kind::kWait) << "one is enough, and it is not given up for what was said";
    state.network.silence = 0.1;
    EXPECT_EQ(decide(*rule).kind, Kind::kText) << "nothing comes";
    chunks[7].status = ChunkStatus::kText;
    state.network.silence = 0;
    EXPECT_EQ(decide(*rule).kind, Kind::kWait) << "nor is another one tried";
    chunks[7].status = ChunkStatus::kPending;
    state.network.first_byte = 0.7;
    EXPECT_EQ(decide(*rule).kind, Kind::kWait) << "the answer would take too long";
    state.network.first_byte = 0.01;
    chunks[7].status = ChunkStatus::kLoading;
    state.network.silence = 0;
    state.network.measured = true;
    EXPECT_EQ(decide(*rule).kind, Kind::kText) << "it is slow";
}

TEST_F(RuleTest, TwoPointerBeginsNoTextThatWouldBeLate) {
    const auto rule = two_pointer_rule();
    compute.prefill = {{0, 100}};  // 1 s a chunk
    state.deadline = 0.9;          // loading takes 1.6 s at half of the rate
    EXPECT_EQ(decide(*rule).kind, Kind::kLoad);
    network(1e4);
    EXPECT_EQ(decide(*rule).kind, Kind::kText) << "there is no hope";
}

TEST_F(RuleTest, TwoPointerWaitsForTheFirstChunkBeforeItDecodes) {
    const auto rule = two_pointer_rule();
    compute.decode_bytes_per_second = 1e7;  // 0.8 s for all
    network(1e7);
    state.deadline = 1.05;
    EXPECT_EQ(decide(*rule).choice, 0u) << "the first MB takes 0.2 s";
    state.deadline = 0.95;
    EXPECT_EQ(decide(*rule).choice, 1u);
}

TEST_F(RuleTest, TwoPointerStartsLateTransfersOver) {
    const auto rule = two_pointer_rule();
    for (ChunkView& c : chunks) c.status = ChunkStatus::kReady;
    chunks[6].status = chunks[7].status = ChunkStatus::kLoading;  // 1 MB each
    chunks[7].received = 900'000;
    state.deadline = 2;
    EXPECT_EQ(decide(*rule).kind, Kind::kWait);
    state.deadline = 1;
    Decision d = decide(*rule);
    EXPECT_EQ(d.kind, Kind::kLoad);
    EXPECT_EQ(d.chunk, 6u) << "the one with most to come";
    EXPECT_EQ(d.choice, 1u) << "0.5 s, of which 0.6 are allowed";
    compute.prefill = {{0, 1000}};
    d = decide(*rule);
    EXPECT_EQ(d.kind, Kind::kText);
    EXPECT_EQ(d.chunk, 6u);
}

TEST_F(RuleTest, TwoPointerWaitsForNoQuietLink) {
    const auto rule = two_pointer_rule();
    for (ChunkView& c : chunks) c.status = ChunkStatus::kReady;
    chunks[6].status = chunks[7].status = ChunkStatus::kLoading;  // 2 s for both
    compute.prefill = {{0, 200}};                                 // 0.5 s a chunk
    state.deadline = 100;
    const Decision d = decide(*rule);
    EXPECT_EQ(d.kind, Kind::kText) << "in time either way, but much sooner";
    EXPECT_EQ(d.chunk, 6u);
    network(3e6);
    EXPECT_EQ(decide(*rule).kind, Kind::kWait) << "the link is not that slow";
    network(1e6);
    chunks[5].status = ChunkStatus::kText;
    state.compute_busy = 0.1;
    EXPECT_EQ(decide(*rule).kind, Kind::kWait) << "the engine has something to do";
    chunks[5].status = ChunkStatus::kReady;
    state.compute_busy = 0;
    state.deadline = std::numeric_limits<Seconds>::infinity();
    EXPECT_EQ(decide(*rule).kind, Kind::kWait) << "no hurry";
}

TEST_F(RuleTest, MoreTransfersWhereFirstBytesTakeLong) {
    for (const char* name : {"two-pointer", "mpc", "prefix-only", "deadline", "fixed:2"}) {
        const auto rule = rule_by_name(name);
        chunks[7].status = chunks[6].status = ChunkStatus::kLoading;
        chunks[7].choice = chunks[6].choice = 2;
        most_transfers = 3;
        network(1e6);
        EXPECT_EQ(decide(*rule.value()).kind, Kind::kWait) << name << ": 200 kB are to come";
        state.network.first_byte = 0.3;
        EXPECT_EQ(decide(*rule.value()).kind, Kind::kLoad) << name << ": 300 kB before a first byte";
        most_transfers = 2;
        EXPECT_EQ(decide(*rule.value()).kind, Kind::kWait) << name << ": never more than the caller allows";
    }
}

// Chunks that are there, but wait for the calibration, are not decoded before it is there.
TEST_F(RuleTest, WhatIsToComeBeforeAnyChunkCountsIsWaitedFor) {
    for (ChunkView& c : chunks) c.status = ChunkStatus::kDecoding;
    state.other_bytes = 2'000'000;
    decide(*fixed_level_rule(2));
    EXPECT_NEAR(Outlook(state).load_time({}, 1e6), 2.008, 1e-6);
    chunks[0].status = ChunkStatus::kLoading;
    chunks[0].received = 999'000;
    decide(*fixed_level_rule(2));
    EXPECT_NEAR(Outlook(state).load_time({}, 1e6), 2.008, 1e-6) << "its decoding follows the others'";
}

TEST_F(RuleTest, PrefillTimeFollowsThePosition) {
    compute.prefill = {{0, 1000}, {1000, 500}};
    EXPECT_DOUBLE_EQ(compute.prefill_time(0, 0), 0);
    EXPECT_DOUBLE_EQ(compute.prefill_time(0, 1000), 1000 / 750.0);
    EXPECT_DOUBLE_EQ(compute.prefill_time(2000, 100), 100 / 500.0);
    compute.prefill.clear();
    EXPECT_TRUE(std::isinf(compute.prefill_time(0, 1)));
}

TEST_F(RuleTest, TextOfAChunkBeginsBehindWhatIsPresent) {
    compute.prefill = {{0, 1000}, {1000, 500}};
    ChunkView c;
    c.first_token = 1000;
    c.tokens = 100;
    c.present = 60;
    EXPECT_DOUBLE_EQ(compute.prefill_time(c), compute.prefill_time(1060, 40));
}

// The front is where present chunks end: they are neither text, behind which prefix-only would load nothing,
// nor loaded, so that they make no level even.
TEST_F(RuleTest, PresentChunksAreThereAndOfNoLevel) {
    compute.prefill = {{0, 950}};  // 0.105 s a chunk
    for (std::size_t i = 0; i < 3; ++i) {
        chunks[i].status = ChunkStatus::kPresent;
        chunks[i].present = 100;
        chunks[i].levels.clear();
    }
    state.deadline = 0.6;  // as in TwoPointerRecomputesFromTheFrontAndLoadsFromTheBack
    EXPECT_EQ(decide(*two_pointer_rule()).kind, Kind::kText);
    EXPECT_EQ(decide(*two_pointer_rule()).chunk, 3u);
    EXPECT_EQ(decide(*cachegen_rule()).kind, Kind::kText);
    EXPECT_EQ(decide(*cachegen_rule()).chunk, 3u);
    compute.prefill.clear();
    state.deadline = 100;
    for (const char* name : {"two-pointer", "mpc", "prefix-only", "deadline", "cachegen", "fixed:2"}) {
        const Decision d = decide(*rule_by_name(name).value());
        EXPECT_EQ(d.kind, Kind::kLoad) << name;
        EXPECT_GE(d.chunk, 3u) << name;
    }
    chunks[7].status = ChunkStatus::kReady;
    chunks[7].choice = 2;
    EXPECT_EQ(decide(*two_pointer_rule()).choice, 1u) << "a fifth of the loaded ones' KL";
}

TEST_F(RuleTest, ArePure) {
    std::mt19937 random(1);
    for (const char* name : {"two-pointer", "mpc", "prefix-only", "deadline", "cachegen", "fixed:2"}) {
        const auto made = rule_by_name(name);
        const Rule& rule = *made.value();
        for (int i = 0; i < 300; ++i) {
            for (ChunkView& c : chunks) {
                c.status = static_cast<ChunkStatus>(random() % 7);
                c.present = c.status == ChunkStatus::kPresent ? c.tokens : random() % c.tokens;
                c.choice = random() % 3;
                c.received = random() % 100'000;
                for (LevelView& l : c.levels) l.usable = random() % 4 != 0;
            }
            state.now = static_cast<double>(random() % 100) / 50;
            state.deadline = static_cast<double>(random() % 100) / 25;
            network(1e4 * static_cast<double>(random() % 1000));
            compute.prefill.clear();
            if (random() % 2 != 0) compute.prefill = {{0, static_cast<double>(100 + random() % 1000)}};
            const Decision a = decide(rule), b = decide(rule);
            EXPECT_EQ(a.kind, b.kind);
            EXPECT_EQ(a.reason, b.reason);
            if (a.kind == Kind::kWait) continue;
            ASSERT_LT(a.chunk, chunks.size());
            EXPECT_TRUE(chunks[a.chunk].status == ChunkStatus::kPending ||
                        (chunks[a.chunk].status == ChunkStatus::kLoading &&
                         (a.kind == Kind::kText || a.choice != chunks[a.chunk].choice)));
            EXPECT_TRUE(a.kind == Kind::kText || chunks[a.chunk].levels.at(a.choice).usable);
            EXPECT_FALSE(a.reason.empty());
        }
    }
}

TEST(Rules, AreKnownByName) {
    for (const char* name : {"two-pointer", "mpc", "prefix-only", "deadline", "cachegen"})
        EXPECT_STREQ(rule_by_name(name).value()->name(), name);
    EXPECT_STREQ(rule_by_name("fixed:12").value()->name(), "fixed");
    for (const char* bad : {"", "Deadline", "fixed", "fixed:", "fixed:x", "fixed:-1", "fixed:256"})
        EXPECT_EQ(rule_by_name(bad).status().code(), ErrorCode::kBadArgument) << bad;
}

// A transfer of `bytes` at `rate` after `latency`, in steps of a millisecond. Returns when it ended.
Seconds transfer(Throughput& t, Seconds now, double bytes, double rate, Seconds latency) {
    const Seconds start = now;
    t.on_request(now);
    now += latency;
    t.on_first_byte(now, latency);
    for (double left = bytes; left > 0;) {
        now += 0.001;
        const double part = std::min(left, rate * 0.001);
        t.on_bytes(now, static_cast<std::uint64_t>(part));
        left -= part;
    }
    t.on_end(now, static_cast<std::uint64_t>(bytes), now - start, true);
    return now;
}

TEST(ThroughputTest, BeginsWithThePrior) {
    const Throughput t({5e6, 0.2});
    const ThroughputEstimate e = t.estimate(0);
    EXPECT_FALSE(e.measured);
    EXPECT_DOUBLE_EQ(e.mean, 5e6);
    EXPECT_DOUBLE_EQ(e.robust, 5e6 / 3) << "a guess is doubted";
    EXPECT_DOUBLE_EQ(Throughput({5e6, 0.2, 0}).estimate(0).robust, 5e6);
    EXPECT_DOUBLE_EQ(e.first_byte, 0.2);
}

TEST(ThroughputTest, ASessionLeavesItsExperienceToTheNext) {
    Throughput t({5e6, 0.2});
    EXPECT_DOUBLE_EQ(t.experience(0).bytes_per_second, 5e6) << "nothing was measured";
    EXPECT_FALSE(t.measured(0));
    Seconds now = 0;
    for (int i = 0; i < 10; ++i) now = transfer(t, now, 1e6, 20e6, 0.1);
    EXPECT_TRUE(t.measured(now));
    const NetworkPrior left = t.experience(now);
    EXPECT_NEAR(left.bytes_per_second, 20e6, 0.5e6);
    EXPECT_NEAR(left.first_byte, 0.1, 0.01);
    EXPECT_LT(left.doubt, NetworkPrior{}.doubt);
    EXPECT_GT(left.doubt, 0.2) << "time passes between sessions";
}

TEST(ThroughputTest, KeepsLatencyApartFromRate) {
    Throughput t({5e6, 0.2});
    Seconds now = 0;
    for (int i = 0; i < 10; ++i) now = transfer(t, now, 1e6, 20e6, 0.1);
    const ThroughputEstimate e = t.estimate(now);
    EXPECT_NEAR(e.mean, 20e6, 0.5e6);
    EXPECT_NEAR(e.first_byte, 0.1, 0.01);
    EXPECT_NEAR(e.last, 1e6 / 0.15, 1e5) << "CacheGen's figure has the latency in it";
}

TEST(ThroughputTest, IsAggregateOverParallelTransfers) {
    Throughput t({5e6, 0.2});
    t.on_request(0);
    t.on_request(0);
    t.on_first_byte(0.01, 0.01);
    t.on_first_byte(0.01, 0.01);
    for (int i = 1; i <= 200; ++i) {
        t.on_bytes(0.01 + i * 0.001, 5000);
        t.on_bytes(0.01 + i * 0.001, 5000);
    }
    EXPECT_NEAR(t.estimate(0.21).mean, 10e6, 0.2e6);
    EXPECT_EQ(t.bytes(), 2'000'000u);
}

TEST(ThroughputTest, IsMoreCarefulOnARestlessLink) {
    Throughput steady({5e6, 0.01}), restless({5e6, 0.01});
    Seconds a = 0, b = 0;
    for (int i = 0; i < 12; ++i) {
        a = transfer(steady, a, 1e6, 10e6, 0.01);
        b = transfer(restless, b, 1e6, i % 2 ? 30e6 : 6e6, 0.01);
    }
    EXPECT_GT(steady.estimate(a).robust, 0.95 * steady.estimate(a).mean);
    EXPECT_LT(restless.estimate(b).robust, 0.75 * restless.estimate(b).mean);
}

TEST(ThroughputTest, ADripIsSeenLongBeforeItEnds) {
    Throughput t({5e6, 0.01});
    t.on_request(0);
    t.on_first_byte(0.01, 0.01);
    for (int i = 1; i <= 20; ++i) t.on_bytes(0.01 + i * 0.01, 20);
    EXPECT_LT(t.estimate(0.21).mean, 1e6);
    for (int i = 21; i <= 100; ++i) t.on_bytes(0.01 + i * 0.01, 20);
    EXPECT_LT(t.estimate(1.01).mean, 1e5);
}

TEST(ThroughputTest, SilenceLowersTheEstimate) {
    Throughput t({5e6, 0.01});
    const Seconds now = transfer(t, 0, 4e6, 10e6, 0.01);
    EXPECT_DOUBLE_EQ(t.estimate(now + 10).silence, 0) << "nothing is awaited";
    t.on_request(now);
    const double before = t.estimate(now).mean;
    EXPECT_DOUBLE_EQ(t.estimate(now + 0.015).mean, before);
    EXPECT_LT(t.estimate(now + 0.5).mean, 0.5 * before);
    EXPECT_LT(t.estimate(now + 5).mean, 0.1 * before);
}

// A request that was answered 404, say, while another one streams.
TEST(ThroughputTest, ATransferThatEndsWithoutAFirstByteTakesNothingFromOthers) {
    Throughput t({5e6, 0.01});
    t.on_request(0);
    t.on_request(0);
    t.on_first_byte(0.01, 0.01);
    t.on_end(0.02, 0, 0.02, false);
    for (int i = 1; i <= 2000; ++i) t.on_bytes(0.02 + i * 0.001, 1000);
    EXPECT_TRUE(t.estimate(2.02).measured);
    EXPECT_NEAR(t.estimate(2.02).mean, 1e6, 1e4);
}

TEST(ThroughputTest, SilenceThatWasGivenUpIsRemembered) {
    Throughput t({5e6, 0.01});
    t.on_request(0);
    t.on_request(0);
    t.on_end(1, 0, 1, false);
    t.on_end(1, 0, 1, false);
    EXPECT_LT(t.estimate(1).mean, 0.1 * 5e6);
    t.on_request(1);
    EXPECT_LT(t.estimate(1).mean, 0.1 * 5e6);
}

}  // namespace
}  // namespace kvcast::test
