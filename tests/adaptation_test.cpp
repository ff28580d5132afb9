// The simulator keeps time as arithmetic does, and nobody beats the oracle.
#include <gtest/gtest.h>

#include <random>

#include "bench/adaptation/decision_time.h"
#include "bench/adaptation/oracle.h"
#include "streamer/rules/rules.h"
#include "tests/tools/scratch.h"

namespace kvcast::test {
namespace {

using namespace bench;
using namespace streamer;

Trace constant(double rate) {
    return Trace("constant", {{0, rate}, {1, rate}}, 2);
}

std::vector<ChunkView> chunks(std::size_t count) {
    std::vector<ChunkView> out;
    for (std::size_t i = 0; i < count; ++i) {
        ChunkView c;
        c.first_token = 100 * i;
        c.tokens = 100;
        c.levels = {{0, 1'000'000, 0, true}, {2, 400'000, 0.01, true}, {5, 100'000, 0.05, true}};
        out.push_back(c);
    }
    return out;
}

Scenario scenario(const Trace& trace, std::size_t count = 8) {
    Scenario s;
    s.chunks = chunks(count);
    s.compute.bytes_per_token = 10'000;
    s.compute.decode_bytes_per_second = 1e9;
    s.trace = &trace;
    s.prior = {trace.rate(0), 0.01};
    return s;
}

TEST(TraceTest, IntegralAndItsInverseAgree) {
    const Trace t("t", {{0, 100}, {1, 0}, {2, 50}}, 4);
    EXPECT_DOUBLE_EQ(t.bytes(0, 4), 200);
    EXPECT_DOUBLE_EQ(t.bytes(0.5, 2.5), 75);
    EXPECT_DOUBLE_EQ(t.bytes(3, 5), 150) << "it begins again";
    EXPECT_DOUBLE_EQ(t.when(0, 100), 1);
    EXPECT_DOUBLE_EQ(t.when(0, 150), 3);
    EXPECT_DOUBLE_EQ(t.when(3.5, 50), 4.25);
    for (const double bytes : {1.0, 33.0, 199.0, 1234.0})
        EXPECT_NEAR(t.bytes(0.7, t.when(0.7, bytes)), bytes, 1e-6);
}

TEST(TraceTest, FilesAreChecked) {
    const tools::ScratchDirectory folder;
    tools::store(folder / "good", "0 8\n1.5 16\n");
    EXPECT_DOUBLE_EQ(Trace::load(folder / "good", 100).rate(2), 2e8);
    for (const char* bad : {"", "0 1\n", "0 1\n1 x\n", "0 1\n0 1\n", "1 1\n0 1\n", "0 1\n1 -1\n"}) {
        tools::store(folder / "bad", bad);
        EXPECT_NE(tools::error_of([&] { Trace::load(folder / "bad", 1); }), "") << bad;
    }
}

TEST(Simulator, TakesAsLongAsArithmeticSays) {
    const Trace trace = constant(1e6);
    Scenario s = scenario(trace);
    s.deadline = 4;
    const SessionResult r = simulate(s, *fixed_level_rule(2));
    // The bytes, the wait for first bytes (in the open once for every pair of transfers that ends together),
    // and the last chunk's decoding.
    EXPECT_GE(r.time, 3.2 + 0.01 + 0.001);
    EXPECT_LE(r.time, 3.2 + 4 * 0.01 + 0.01);
    EXPECT_NEAR(r.bytes, 3.2e6, 10);
    EXPECT_FALSE(r.missed);
    EXPECT_DOUBLE_EQ(r.kl, 0.01);
}

TEST(Simulator, ASlowDecoderIsWaitedFor) {
    const Trace trace = constant(1e9);
    Scenario s = scenario(trace);
    s.compute.decode_bytes_per_second = 1e7;
    EXPECT_NEAR(simulate(s, *fixed_level_rule(2)).time, 0.8, 0.05);
}

TEST(Simulator, AnOutageMeansTextInTime) {
    const Trace trace("outage", {{0, 1e6}, {0.2, 0}}, 100);
    Scenario s = scenario(trace);
    s.compute.prefill = {{0, 2000}};  // 0.4 s
    s.deadline = 1.5;
    const SessionResult r = simulate(s, *deadline_rule());
    EXPECT_FALSE(r.missed) << r.time;
    EXPECT_GT(r.text_tokens, 0u);
}

// Three of eight chunks, and half of the fourth.
void make_present(Scenario& s) {
    for (std::size_t i = 0; i < 4; ++i) s.chunks[i].present = i < 3 ? 100 : 50;
    for (std::size_t i = 0; i < 3; ++i) s.chunks[i].status = ChunkStatus::kPresent;
}

TEST(Simulator, WhatIsPresentTakesNoTime) {
    const Trace trace = constant(1e6);
    Scenario s = scenario(trace);
    s.deadline = 4;
    make_present(s);
    const SessionResult loaded = simulate(s, *fixed_level_rule(2));
    EXPECT_NEAR(loaded.bytes, 2e6, 10);
    EXPECT_DOUBLE_EQ(loaded.kl, 0.01 * 5 / 8);
    s.compute.prefill = {{0, 1000}};
    s.deadline = 0.5;
    const SessionResult text = simulate(s, *cachegen_rule(), true);
    EXPECT_EQ(text.text_tokens, 450u);
    EXPECT_NEAR(text.time, 0.45, 1e-6);
    EXPECT_FALSE(text.missed);
    EXPECT_EQ(text.recording->recomputed.front().first, 3u);
    EXPECT_EQ(text.recording->chunks[2].status, ChunkStatus::kPresent);
    for (ChunkView& c : s.chunks) c.status = ChunkStatus::kPresent;
    EXPECT_EQ(simulate(s, *two_pointer_rule()).time, 0);
}

TEST(OracleTest, SpendsTheBytesThereAreOnTheLeastKl) {
    const Trace trace = constant(1e6);
    Scenario s = scenario(trace);
    const Oracle oracle(s.chunks);
    s.deadline = 1000;
    EXPECT_DOUBLE_EQ(oracle.solve(s).kl, 0);
    s.deadline = 0.5;
    EXPECT_TRUE(oracle.solve(s).missed);
    EXPECT_NEAR(oracle.solve(s).time, 0.81, 0.01);
    s.deadline = 3.25;
    EXPECT_NEAR(oracle.solve(s).kl, 0.01, 0.0005) << "all at level 2";
    s.compute.prefill = {{0, 100}};
    s.deadline = 0.75;  // 7 chunks at the coarsest level do not fit with one of text, which takes a second
    EXPECT_TRUE(oracle.solve(s).missed);
    s.compute.prefill = {{0, 200}};
    EXPECT_FALSE(oracle.solve(s).missed);
}

TEST(OracleTest, IsFasterWhereLessQualityWillDo) {
    const Trace trace = constant(1e6);
    Scenario s = scenario(trace);
    const Oracle oracle(s.chunks);
    EXPECT_NEAR(oracle.fastest(s, 0), 8.01, 0.05);
    EXPECT_NEAR(oracle.fastest(s, 0.01), 3.21, 0.02);
    EXPECT_NEAR(oracle.fastest(s, 0.05), 0.81, 0.02);
    EXPECT_NEAR(oracle.fastest(s, 0.03), 2.01, 0.05) << "half of the chunks at level 2";
    s.compute.prefill = {{0, 400}};
    EXPECT_LE(oracle.fastest(s, 0), 2.01) << "all as text";
    EXPECT_GE(oracle.fastest(s, 0), 1.5);
}

TEST(OracleTest, PaysForLevelsMuchSmallerThanTheFinest) {
    const Trace trace = constant(1e6);
    Scenario s = scenario(trace, 128);
    for (ChunkView& c : s.chunks)
        c.levels = {{0, 4'000'000, 0, true}, {8, 96'000, 0.04, true}, {9, 70'000, 0.06, true}};
    const Oracle oracle(s.chunks);
    const Seconds bytes = 128 * 0.096;
    EXPECT_NEAR(oracle.fastest(s, 0.04), bytes, 0.05 * bytes);
    s.deadline = bytes * 0.9;  // of every 100 chunks, 63 at level 8
    EXPECT_NEAR(oracle.solve(s).kl, 0.047, 0.003);
}

TEST(OracleTest, IsNotBeaten) {
    std::mt19937 random(3);
    const auto drawn = [&](double low, double high) {
        return std::uniform_real_distribution<double>(low, high)(random);
    };
    for (int i = 0; i < 150; ++i) {
        std::vector<Trace::Sample> samples;
        for (int n = 0; n < 20; ++n) samples.push_back({0.2 * n, drawn(0, 4e6)});
        const Trace trace("drawn", samples, 4);
        Scenario s = scenario(trace, 1 + random() % 12);
        s.deadline = drawn(0.2, 6);
        s.start = drawn(0, 4);
        if (random() % 2 != 0) s.compute.prefill = {{0, drawn(100, 3000)}};
        const Oracle oracle(s.chunks);
        const SessionResult best = oracle.solve(s);
        for (const char* name : {"two-pointer", "mpc", "prefix-only", "deadline", "cachegen", "fixed:2"}) {
            const auto rule = rule_by_name(name);
            const SessionResult got = simulate(s, *rule.value());
            EXPECT_LT(got.time, kLongestSession) << name;
            EXPECT_LE(oracle.fastest(s, got.kl), got.time + 1e-6) << name;
            if (got.missed) continue;
            EXPECT_FALSE(best.missed) << name;
            EXPECT_LE(best.time, got.time + 1e-6) << name;
            EXPECT_LE(best.kl, got.kl + 1e-9) << name;
        }
    }
}

// Links that jump by factors of up to 16 every 0.2 s.
TEST(DefaultRule, MissesLittleMoreThanTheOracle) {
    std::mt19937 random(5);
    const auto drawn = [&](double low, double high) {
        return low * std::pow(high / low, std::uniform_real_distribution<double>(0, 1)(random));
    };
    int oracle = 0, rule = 0, one_level = 0, cachegen = 0;
    for (int i = 0; i < 400; ++i) {
        std::vector<Trace::Sample> samples;
        for (int n = 0; n < 20; ++n) samples.push_back({0.2 * n, drawn(0.5e6, 8e6)});
        const Trace trace("drawn", samples, 4);
        Scenario s = scenario(trace, 16);
        s.deadline = drawn(0.3, 3);
        s.prior = {2e6, 0.01};
        s.compute.prefill = {{0, drawn(300, 3000)}};
        oracle += Oracle(s.chunks).solve(s).missed ? 1 : 0;
        rule += simulate(s, *two_pointer_rule()).missed ? 1 : 0;
        one_level += simulate(s, *deadline_rule()).missed ? 1 : 0;
        cachegen += simulate(s, *cachegen_rule()).missed ? 1 : 0;
    }
    EXPECT_GE(oracle, 40) << "hard enough to tell";
    EXPECT_LE(rule, oracle + 24) << "of 400";
    EXPECT_GE(one_level, rule + 24);
    EXPECT_GE(cachegen, oracle + 40);
}

TEST(ReplayTest, ASimulatedSessionDecidesTheSameAgain) {
    const Trace trace("steps", {{0, 2e6}, {0.4, 0.1e6}, {0.9, 4e6}}, 100);
    Scenario s = scenario(trace, 16);
    s.compute.prefill = {{0, 1500}};
    for (const char* name : {"two-pointer", "mpc", "prefix-only", "deadline", "cachegen", "fixed:2"}) {
        Scenario behind = s;
        make_present(behind);
        const auto rule = rule_by_name(name);
        const SessionResult some = simulate(behind, *rule.value(), true);
        EXPECT_EQ(replay(*some.recording, *rule.value()).decisions.size(), some.recording->decisions.size());
        const SessionResult r = simulate(s, *rule.value(), true);
        ASSERT_TRUE(r.recording);
        const Recording again = replay(*r.recording, *rule.value());
        ASSERT_EQ(again.decisions.size(), r.recording->decisions.size()) << name;
        EXPECT_GE(again.decisions.size(), 16u);
        for (std::size_t i = 0; i < again.decisions.size(); ++i) {
            EXPECT_EQ(again.decisions[i].time, r.recording->decisions[i].time);
            EXPECT_EQ(again.decisions[i].decision.reason, r.recording->decisions[i].decision.reason);
        }
        EXPECT_EQ(again.recomputed.size(), r.recording->recomputed.size());
    }
    const SessionResult r = simulate(s, *two_pointer_rule(), true);
    EXPECT_NE(replay(*r.recording, *fixed_level_rule(5)).decisions.front().level,
              r.recording->decisions.front().level)
        << "another rule decides otherwise";
}

TEST(SharedLink, IsSharedEvenly) {
    const Trace trace = constant(2e6);
    Scenario s = scenario(trace);
    s.deadline = 4;
    const auto rule = fixed_level_rule(2);
    const Seconds alone = simulate(s, *rule).time;
    const auto both = simulate_together({s, s}, *rule, 0);
    EXPECT_NEAR(both[0].time, both[1].time, 1e-6);
    EXPECT_NEAR(both[0].time, 2 * alone, 0.1);
    const auto apart = simulate_together({s, s}, *rule, 100);
    EXPECT_NEAR(apart[0].time, alone, 1e-6);
    EXPECT_NEAR(apart[1].time, alone, 0.02) << "its time begins with it";
}

TEST(DecisionTimeTest, GrowsWithTheChunks) {
    const DecisionTime few = time_decisions(*two_pointer_rule(), 10);
    const DecisionTime many = time_decisions(*two_pointer_rule(), 1000);
    EXPECT_GT(few.p50, 0);
    EXPECT_GE(few.p99, few.p50);
    EXPECT_GT(many.p50, few.p50);
}

}  // namespace
}  // namespace kvcast::test
