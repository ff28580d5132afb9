#include "tools/report/timeline.h"

#include <algorithm>
#include <map>

namespace kvcast::tools {
namespace {

using namespace streamer;
using Kind = Event::Kind;

// Decides what was recorded, and notes what there was to see.
class RecordedRule final : public Rule {
  public:
    explicit RecordedRule(const std::vector<DecisionRecord>& decisions) : decisions_(decisions) {}
    const char* name() const override { return "recorded"; }

    Decision decide(const RuleState& state) const override {
        Moment m = {state.now, state.network, 0};
        for (const ChunkView& c : state.chunks) {
            if (c.status == ChunkStatus::kLoading) m.bytes_in_flight += bytes_to_come(c);
        }
        moments.push_back(m);
        // What no level was left for, the controller decides by itself.
        const auto settled = [&](const DecisionRecord& d) {
            return d.decision.kind == Decision::Kind::kText &&
                   state.chunks[d.decision.chunk].status == ChunkStatus::kText;
        };
        while (next_ < decisions_.size() && decisions_[next_].time == state.now && settled(decisions_[next_]))
            ++next_;
        if (next_ == decisions_.size() || decisions_[next_].time > state.now) return {};
        return decisions_[next_++].decision;
    }

    mutable std::vector<Moment> moments;

  private:
    const std::vector<DecisionRecord>& decisions_;
    mutable std::size_t next_ = 0;
};

// Keeps the timeline while the events go by.
class Historian final : private Controller::Owner {
  public:
    explicit Historian(const Recording& r)
        : r_(r), rule_(std::make_shared<RecordedRule>(r.decisions)), controller_(rule_, r.options, *this) {
        controller_.begin(r.chunks, r.options.compute.bytes_per_token);
    }

    Timeline run() {
        for (const Event& e : r_.events) {
            now_ = e.time;
            note(e);
            controller_.take(e);
        }
        for (Attempt& a : t_.attempts) {
            if (flying_.contains(a.chunk) && &t_.attempts[flying_[a.chunk]] == &a) a.to = now_;
        }
        t_.moments = rule_->moments;
        t_.end = now_;
        t_.complete = controller_.complete();
        sum_up();
        return std::move(t_);
    }

  private:
    void note(const Event& e) {
        if (e.kind == Kind::kArrived || e.kind == Kind::kFailed) {
            land(e.chunk, e.kind == Kind::kArrived);
            if (e.kind == Kind::kArrived) arrived_[e.chunk] = e.time;
        }
        if (e.kind == Kind::kReady) {
            t_.decoding.push_back({e.chunk, e.chunk + 1, std::max(arrived_[e.chunk], decoded_), e.time});
            decoded_ = e.time;
        }
        if (e.kind == Kind::kRecomputed && !t_.recomputing.empty()) t_.recomputing.back().to = e.time;
    }

    void land(std::size_t chunk, bool arrived) {
        const auto it = flying_.find(chunk);
        if (it == flying_.end()) return;
        t_.attempts[it->second].to = now_;
        t_.attempts[it->second].arrived = arrived;
        flying_.erase(it);
    }

    void stop(std::size_t chunk) override { land(chunk, false); }
    void start(std::size_t, std::size_t) override {}
    void recompute(std::size_t first, std::size_t end) override {
        t_.recomputing.push_back({first, end, now_, now_});
    }
    void decided(const DecisionRecord& d) override {
        const std::size_t chunk = d.decision.chunk;
        if (d.decision.kind == Decision::Kind::kText) {
            t_.text.push_back({chunk, d.decision.reason, d.time});
            return;
        }
        flying_[chunk] = t_.attempts.size();
        t_.attempts.push_back({chunk, d.level, d.bytes, d.decision.reason, d.time, d.time, false});
    }

    void sum_up() {
        double kl = 0;
        bool known = true;
        for (const ChunkView& v : controller_.chunks()) {
            t_.tokens += v.tokens;
            const bool text = v.status == ChunkStatus::kText || v.status == ChunkStatus::kRecomputed;
            const bool present = v.status == ChunkStatus::kPresent;
            if (text) t_.text_tokens += v.tokens - v.present;
            if (text || present) t_.present_tokens += v.present;
            if (text || present || v.levels.empty()) continue;
            kl += v.levels[v.choice].kl * static_cast<double>(v.tokens);
            known &= v.levels[v.choice].kl_known;
        }
        if (t_.tokens > 0) t_.kl = known ? kl / static_cast<double>(t_.tokens) : -1;
    }

    const Recording& r_;
    const std::shared_ptr<RecordedRule> rule_;
    Controller controller_;
    Timeline t_;
    Seconds now_ = 0;
    Seconds decoded_ = 0;
    std::map<std::size_t, std::size_t> flying_;  // chunk: index of its attempt
    std::map<std::size_t, Seconds> arrived_;
};

}  // namespace

Timeline timeline_of(const Recording& recording) {
    return Historian(recording).run();
}

}  // namespace kvcast::tools
