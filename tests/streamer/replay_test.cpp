// A real session's events, played again through the simulator, lead to the same decisions.
#include <gtest/gtest.h>

#include <fmt/format.h>

#include "bench/adaptation/simulator.h"
#include "streamer/http/client.h"
#include "streamer/rules/rules.h"
#include "tests/streamer/fault_server.h"
#include "tests/streamer/publication.h"
#include "tools/client/codec_adapter.h"

namespace kvcast::test {
namespace {

using namespace streamer;

std::vector<std::string> lines(const Recording& r) {
    std::vector<std::string> out;
    for (const DecisionRecord& d : r.decisions) {
        out.push_back(fmt::format("{:.9f} {} chunk {} level {}: {}", d.time,
                                  d.decision.kind == Decision::Kind::kText ? "text" : "load",
                                  d.decision.chunk, d.level, d.decision.reason));
    }
    for (const RecomputeRecord& c : r.recomputed)
        out.push_back(fmt::format("{:.9f} recompute {}-{}", c.time, c.first, c.end));
    return out;
}

// Faults as fault_server.py takes them, for objects whose path matches.
struct Trouble {
    const char* name;
    const char* fault;
};

class ReplayTest : public testing::TestWithParam<Trouble> {
  protected:
    Recording record(const std::string& rule, std::size_t present = 0) {
        tools::ScratchDirectory folder;
        const auto store = std::move(folder_destination(folder.path()).value());
        PublicationOptions many;
        many.tokens = 512;
        const Published published = publish(*store, many);
        FaultServer server(folder.path());
        if (*GetParam().fault != '\0') server.fault(GetParam().fault);
        Wanted wanted;
        wanted.manifest_url = server.url(published.name);
        wanted.token_ids = published.token_ids;
        wanted.present_tokens = present;
        SessionOptions options;
        options.record = true;
        options.deadline = 1.5;
        options.rule = std::move(rule_by_name(rule).value());
        options.compute.prefill = {{0, 2000.0}};
        options.download.retry.first_delay = std::chrono::milliseconds(10);
        options.wall_clock = [] { return 1'800'000'100; };
        Client client({});
        client::CodecAdapter codec(1, "");
        CheckingSink sink(published);
        sink.present = present;
        Session session(client.loop(), client.transport(), wanted, options, codec, sink);
        const Summary s = session.wait();
        sink.expect_complete(s, published.token_ids.size());
        EXPECT_TRUE(s.recording.has_value());
        return s.recording.value_or(Recording{});
    }
};

TEST_P(ReplayTest, LeadsToTheSameDecisions) {
    for (const char* name : {"two-pointer", "mpc", "deadline", "cachegen"}) {
        const Recording was = record(name);
        EXPECT_GE(was.decisions.size(), 8u);
        const auto rule = rule_by_name(name);
        EXPECT_EQ(lines(bench::replay(was, *rule.value())), lines(was)) << name;
        // The recording is what decides, not the rule alone: with one event less, time itself differs.
        Recording shorter = was;
        std::erase_if(shorter.events, [](const Event& e) { return e.kind == Event::Kind::kLook; });
        EXPECT_TRUE(bench::replay(shorter, *rule.value()).decisions.empty());
    }
}

TEST_P(ReplayTest, LeadsToTheSameDecisionsBehindWhatWasPresent) {
    const Recording was = record("two-pointer", 150);
    EXPECT_EQ(was.chunks[1].status, ChunkStatus::kPresent);
    EXPECT_EQ(was.chunks[2].present, 22u);
    EXPECT_GE(was.decisions.size(), 6u);
    EXPECT_EQ(lines(bench::replay(was, *two_pointer_rule())), lines(was));
}

INSTANTIATE_TEST_SUITE_P(
    Links, ReplayTest,
    testing::Values(Trouble{"Clean", ""},
                    Trouble{"Slow", R"({"match": "kvc$", "fault": "pace", "rate": 100000})"},
                    Trouble{"Damaged", R"({"match": "kvc$", "fault": "flip", "at": 200, "times": 3})"},
                    Trouble{"Reset", R"({"match": "kvc$", "fault": "reset", "times": 2})"},
                    Trouble{"Gone", R"({"match": "kvc$", "fault": "status", "status": 404})"}),
    [](const auto& of) { return of.param.name; });

}  // namespace
}  // namespace kvcast::test
