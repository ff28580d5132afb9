#include "bench/adaptation/simulator.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <deque>
#include <memory>
#include <optional>

namespace kvcast::bench {
namespace {

using streamer::ChunkStatus;
using streamer::Controller;
using streamer::Decision;
using streamer::Event;
using streamer::RuleState;

constexpr Seconds kTick = 0.02;  // as in a session

// The rule, with a stopwatch.
class TimedRule final : public Rule {
  public:
    explicit TimedRule(const Rule& rule) : rule_(rule) {}
    const char* name() const override { return rule_.name(); }
    Decision decide(const RuleState& state) const override {
        const auto before = std::chrono::steady_clock::now();
        Decision d = rule_.decide(state);
        seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - before).count();
        ++decisions;
        return d;
    }

    mutable double seconds = 0;
    mutable std::size_t decisions = 0;

  private:
    const Rule& rule_;
};

// One session's side of it. Its time begins with it.
class Client final : private Controller::Owner {
  public:
    Client(const Scenario& s, const Rule& rule, Seconds begins, bool record)
        : s_(s),
          begins_(begins),
          rule_(std::make_shared<TimedRule>(rule)),
          controller_(rule_, {s.deadline, s.compute, s.prior, s.transfers}, *this, record) {
        controller_.begin(s.chunks, s.compute.bytes_per_token);
    }

    bool begun() const { return begun_; }
    bool over() const { return controller_.complete() || now_ >= kLongestSession; }
    std::size_t flowing() const {
        return static_cast<std::size_t>(std::ranges::count(transfers_, true, &Transfer::flowing));
    }

    // Of the link's time, as `to` below; `rate` is each transfer's.
    Seconds next_event(double rate) const {
        if (!begun_) return begins_;
        Seconds next = now_ + kTick;
        for (const Transfer& t : transfers_) {
            if (!t.flowing) next = std::min(next, t.started + s_.first_byte);
            if (t.flowing && rate > 0) next = std::min(next, now_ + t.left / rate);
        }
        if (!decoding_.empty()) next = std::min(next, decoded_at_);
        if (computed_at_) next = std::min(next, *computed_at_);
        return begins_ + std::max(next, now_ + 1e-9);
    }

    void advance(Seconds to, double rate) {
        if (!begun_) return;
        const double part = rate * (to - begins_ - now_);
        now_ = to - begins_;
        for (Transfer& t : transfers_) {
            if (!t.flowing) continue;
            const double got = std::min(part, t.left);
            t.left -= got;
            t.received += got;
            if (got > 0) {
                controller_.take(Event::bytes(now_, t.chunk, static_cast<std::uint64_t>(got),
                                              static_cast<std::uint64_t>(t.received)));
            }
        }
    }

    void settle(Seconds to) {
        if (!begun_ && to < begins_) return;
        begun_ = true;
        settle_transfers();
        settle_decoder();
        if (computed_at_ && *computed_at_ <= now_) {
            computed_at_.reset();
            controller_.take(Event::recomputed(now_));
        }
        controller_.take(Event::look(now_));
    }

    SessionResult result() const {
        SessionResult r;
        r.time = now_;
        r.missed = !controller_.complete() || now_ > s_.deadline;
        r.bytes = bytes_;
        double kl = 0, tokens = 0;
        for (const ChunkView& v : controller_.chunks()) {
            const auto count = static_cast<double>(v.tokens);
            tokens += count;
            const bool text = v.status == ChunkStatus::kText || v.status == ChunkStatus::kRecomputed;
            if (text) r.text_tokens += v.tokens - v.present;
            if (!text && v.status != ChunkStatus::kPresent) kl += count * v.levels[v.choice].kl;
        }
        r.kl = kl / tokens;
        r.decisions = rule_->decisions;
        r.decision_seconds = rule_->seconds;
        r.recording = controller_.recording();
        return r;
    }

  private:
    struct Transfer {
        std::size_t chunk = 0;
        Seconds started = 0;
        double left = 0;
        double received = 0;
        bool flowing = false;
    };

    void settle_transfers() {
        for (Transfer& t : transfers_) {
            if (t.flowing || now_ < t.started + s_.first_byte) continue;
            t.flowing = true;
            controller_.take(Event::first_byte(now_, t.chunk, now_ - t.started));
        }
        for (std::size_t i = 0; i < transfers_.size();) {
            const Transfer t = transfers_[i];
            if (!t.flowing || t.left > 0.5) {
                ++i;
                continue;
            }
            stop(t.chunk);
            controller_.take(Event::arrived(now_, t.chunk));
            if (decoding_.empty()) decoded_at_ = now_ + decode_time(t.chunk);
            decoding_.push_back(t.chunk);
        }
    }

    void settle_decoder() {
        while (!decoding_.empty() && decoded_at_ <= now_) {
            controller_.take(Event::ready(now_, decoding_.front()));
            decoding_.pop_front();
            if (!decoding_.empty()) decoded_at_ += decode_time(decoding_.front());
        }
    }

    Seconds decode_time(std::size_t chunk) const { return s_.compute.decode_time(s_.chunks[chunk].tokens); }

    void start(std::size_t chunk, std::size_t choice) override {
        transfers_.push_back(
            {chunk, now_, static_cast<double>(s_.chunks[chunk].levels[choice].bytes), 0, false});
    }

    void stop(std::size_t chunk) override {
        const auto t = std::ranges::find(transfers_, chunk, &Transfer::chunk);
        bytes_ += t->received;
        transfers_.erase(t);
    }

    void recompute(std::size_t first, std::size_t end) override {
        const std::size_t token = s_.chunks[first].first_token + s_.chunks[first].present;
        const std::size_t tokens = s_.chunks[end - 1].first_token + s_.chunks[end - 1].tokens - token;
        computed_at_ = now_ + s_.compute.prefill_time(token, tokens);
    }

    const Scenario& s_;
    const Seconds begins_;
    const std::shared_ptr<TimedRule> rule_;
    Controller controller_;
    bool begun_ = false;
    Seconds now_ = 0;
    std::vector<Transfer> transfers_;
    std::deque<std::size_t> decoding_;
    Seconds decoded_at_ = 0;
    std::optional<Seconds> computed_at_;
    double bytes_ = 0;
};

void run(const Trace& trace, Seconds start, const std::vector<std::unique_ptr<Client>>& clients) {
    Seconds now = 0;
    for (const auto& c : clients) c->settle(now);
    while (true) {
        std::size_t flowing = 0;
        for (const auto& c : clients) flowing += c->over() ? 0 : c->flowing();
        const double rate = flowing == 0 ? 0 : trace.rate(start + now) / static_cast<double>(flowing);
        Seconds next = std::numeric_limits<Seconds>::infinity();
        for (const auto& c : clients) {
            if (!c->over()) next = std::min(next, c->next_event(rate));
        }
        if (std::isinf(next)) return;
        next = std::min(next, std::max(trace.next_change(start + now) - start, now + 1e-9));
        now = next;
        for (const auto& c : clients) {
            if (c->over()) continue;
            c->advance(now, rate);
            c->settle(now);
        }
    }
}

// Does nothing: what happened is in the recording.
class NoOwner final : public Controller::Owner {
    void start(std::size_t, std::size_t) override {}
    void stop(std::size_t) override {}
    void recompute(std::size_t, std::size_t) override {}
};

std::shared_ptr<const Rule> borrowed(const Rule& rule) {
    return {std::shared_ptr<const Rule>(), &rule};
}

}  // namespace

SessionResult simulate(const Scenario& scenario, const Rule& rule, bool record) {
    std::vector<std::unique_ptr<Client>> clients;
    clients.push_back(std::make_unique<Client>(scenario, rule, 0, record));
    run(*scenario.trace, scenario.start, clients);
    return clients.front()->result();
}

std::vector<SessionResult> simulate_together(const std::vector<Scenario>& scenarios, const Rule& rule,
                                             Seconds gap) {
    std::vector<std::unique_ptr<Client>> clients;
    for (const Scenario& s : scenarios)
        clients.push_back(
            std::make_unique<Client>(s, rule, gap * static_cast<double>(clients.size()), false));
    run(*scenarios.front().trace, scenarios.front().start, clients);
    std::vector<SessionResult> results;
    for (const auto& c : clients) results.push_back(c->result());
    return results;
}

Recording replay(const Recording& recording, const Rule& rule) {
    NoOwner owner;
    Controller controller(borrowed(rule), recording.options, owner, true);
    controller.begin(recording.chunks, recording.options.compute.bytes_per_token);
    for (const Event& e : recording.events) controller.take(e);
    return *controller.recording();
}

}  // namespace kvcast::bench
