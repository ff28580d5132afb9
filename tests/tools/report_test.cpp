// Pages say what happened, and carry nothing that a reader's browser would run or fetch.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "bench/adaptation/simulator.h"
#include "streamer/rules/rules.h"
#include "tools/report/session_page.h"
#include "tools/report/svg.h"
#include "tools/report/timeline.h"

namespace kvcast::test {
namespace {

using namespace bench;
using namespace tools;
using namespace streamer;
using testing::HasSubstr;
using testing::Not;

class ReportTest : public testing::Test {
  protected:
    // Eight chunks of 100 tokens over a link that breaks down after 0.2 s, unless it is told not to.
    SessionResult session(const Rule& rule, double rate_after = 0.05e6) {
        for (std::size_t i = 0; i < 8; ++i) {
            ChunkView c;
            c.first_token = 100 * i;
            c.tokens = 100;
            c.levels = {{0, 1'000'000, 0, true}, {2, 400'000, 0.01, true}, {5, 100'000, 0.05, true}};
            c.present = std::clamp(present, 100 * i, 100 * (i + 1)) - 100 * i;
            if (c.present == c.tokens) c.status = ChunkStatus::kPresent;
            scenario.chunks.push_back(c);
        }
        scenario.compute.bytes_per_token = 10'000;
        scenario.compute.prefill = {{0, 1000}};
        trace.emplace("link", std::vector<Trace::Sample>{{0, 2e6}, {0.2, rate_after}}, 100);
        scenario.trace = &*trace;
        scenario.prior = {2e6, 0.01};
        return simulate(scenario, rule, true);
    }
    std::string page(const SessionResult& r, const std::string& title = "a link") {
        return render({.title = title, .rule = "two-pointer", .recording = &*r.recording});
    }

    Scenario scenario;
    std::size_t present = 0;  // leading tokens
    std::optional<Trace> trace;
};

std::size_t count(const std::string& text, const std::string& part) {
    std::size_t n = 0;
    for (std::size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++n;
    return n;
}

TEST_F(ReportTest, ATimelineTellsWhatBecameOfEveryChunk) {
    const SessionResult r = session(*two_pointer_rule());
    const Timeline t = timeline_of(*r.recording);
    EXPECT_TRUE(t.complete);
    EXPECT_NEAR(t.end, r.time, 1e-9);
    EXPECT_EQ(t.tokens, 800u);
    EXPECT_EQ(t.text_tokens, r.text_tokens);
    EXPECT_NEAR(t.kl, r.kl, 1e-9);
    EXPECT_EQ(t.attempts.size() + t.text.size(), r.recording->decisions.size());
    std::size_t arrived = 0, recomputed = 0;
    for (const Attempt& a : t.attempts) {
        arrived += a.arrived ? 1 : 0;
        EXPECT_LT(a.from, a.to);
    }
    for (const Work& w : t.recomputing) {
        recomputed += w.end - w.first;
        EXPECT_NEAR(w.to - w.from, 0.1 * static_cast<double>(w.end - w.first), 1e-6);
    }
    EXPECT_EQ(arrived, t.decoding.size());
    EXPECT_EQ(arrived + recomputed, 8u);
    EXPECT_GT(recomputed, 0u);
    EXPECT_LT(arrived, t.attempts.size()) << "the link broke down under some";
    EXPECT_DOUBLE_EQ(t.moments.front().time, 0);
    EXPECT_GT(t.moments.back().time, 0.2);
}

TEST_F(ReportTest, PresentTokensAreNotCalledLoaded) {
    present = 350;
    const SessionResult loaded = session(*fixed_level_rule(2), 2e6);
    const Timeline t = timeline_of(*loaded.recording);
    EXPECT_TRUE(t.complete);
    EXPECT_EQ(t.present_tokens, 300u) << "the fourth chunk came whole";
    EXPECT_NEAR(t.kl, loaded.kl, 1e-9);
    EXPECT_THAT(page(loaded), HasSubstr("500 of 800 tokens loaded"));
    EXPECT_THAT(page(loaded), HasSubstr("0 recomputed from text, 300 present before"));
    EXPECT_EQ(count(page(loaded), "class=\"present\""), 3u + 1) << "and in the legend";
    scenario = {};
    scenario.deadline = 0.5;
    scenario.compute.prefill = {{0, 1000}};
    EXPECT_THAT(page(session(*cachegen_rule())), HasSubstr("450 recomputed from text, 350 present before"));
}

TEST_F(ReportTest, ThePageSaysWhetherTheDeadlineHeld) {
    scenario.deadline = 30;
    EXPECT_THAT(page(session(*fixed_level_rule(2), 2e6)), HasSubstr("<b>In time</b>"));
    scenario = {};
    scenario.deadline = 0.5;
    EXPECT_THAT(page(session(*fixed_level_rule(2), 2e6)), HasSubstr("<b>Late</b>"));
}

TEST_F(ReportTest, EveryDecisionHasItsReasonOnHover) {
    const SessionResult r = session(*two_pointer_rule());
    const std::string html = page(r);
    for (const DecisionRecord& d : r.recording->decisions)
        EXPECT_THAT(html, HasSubstr(html_escaped(d.decision.reason) + "</title>"));
    EXPECT_GE(count(html, "<title>"), r.recording->decisions.size());
    EXPECT_EQ(count(html, "<svg"), 1u);
    EXPECT_EQ(count(html, "</svg>"), 1u);
}

TEST_F(ReportTest, NothingIsRunOrFetched) {
    const std::string evil = "\"><script>alert('x')</script>&amp;";
    std::string html = page(session(*two_pointer_rule()), evil);
    EXPECT_THAT(html, Not(HasSubstr("<script")));
    EXPECT_THAT(html, HasSubstr(html_escaped(evil)));
    const std::string name = "xmlns=\"http://www.w3.org/2000/svg\"";
    html.erase(html.find(name), name.size());
    for (const char* link : {"http:", "https:", "url(", "@import", "src=", "href="})
        EXPECT_THAT(html, Not(HasSubstr(link)));
}

TEST_F(ReportTest, AnUnknownDivergenceIsNotCalledNone) {
    SessionResult r = session(*fixed_level_rule(2));
    EXPECT_THAT(page(r), HasSubstr("expected KL 0."));
    for (ChunkView& c : r.recording->chunks) c.levels[1].kl_known = false;
    EXPECT_THAT(page(r), HasSubstr("expected KL unknown"));
}

TEST_F(ReportTest, WithoutADeadlineThereIsNoLine) {
    scenario.deadline = std::numeric_limits<Seconds>::infinity();
    const std::string html = page(session(*fixed_level_rule(5), 2e6));
    EXPECT_THAT(html, HasSubstr("<b>Complete</b>"));
    EXPECT_THAT(html, Not(HasSubstr("class=\"deadline\"")));
    EXPECT_THAT(html, Not(HasSubstr("inf")));
    EXPECT_THAT(html, Not(HasSubstr("nan")));
}

TEST_F(ReportTest, AnEmptySessionIsAPageToo) {
    Recording nothing;
    const std::string html = render({.title = "nothing", .rule = "mpc", .recording = &nothing});
    EXPECT_THAT(html, HasSubstr("</html>"));
    EXPECT_THAT(html, Not(HasSubstr("nan")));
    EXPECT_THAT(html, Not(HasSubstr("inf")));
}

TEST(HtmlTest, WhatHasAMeaningIsEscaped) {
    EXPECT_EQ(html_escaped("a<b> & \"c\" 'd'"), "a&lt;b&gt; &amp; &quot;c&quot; &#39;d&#39;");
    EXPECT_EQ(html_escaped("grüße"), "grüße");
}

}  // namespace
}  // namespace kvcast::test
