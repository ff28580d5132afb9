#include "bench/adaptation/simulator.h"

#include <algorithm>
#include <chrono>
#include <deque>
#include <optional>

#include "streamer/throughput.h"

namespace kvcast::bench {
namespace {

using streamer::ChunkStatus;
using streamer::Decision;
using streamer::RuleState;
using streamer::Throughput;

constexpr Seconds kTick = 0.02;  // as in a session

class Simulation {
  public:
    Simulation(const Scenario& s, const Rule& rule)
        : s_(s), rule_(rule), views_(s.chunks), network_(s.prior) {}

    SessionResult run() {
        pump();
        while (!complete() && now_ < kLongestSession) {
            advance(next_event());
            settle();
            pump();
        }
        result_.time = now_;
        result_.missed = !complete() || now_ > s_.deadline;
        double kl = 0, tokens = 0;
        for (const ChunkView& v : views_) {
            const auto count = static_cast<double>(v.tokens);
            tokens += count;
            const bool text = v.status == ChunkStatus::kText || v.status == ChunkStatus::kRecomputed;
            if (text) result_.text_tokens += v.tokens;
            if (!text) kl += count * v.levels[v.choice].kl;
        }
        result_.kl = kl / tokens;
        return result_;
    }

  private:
    struct Transfer {
        std::size_t chunk = 0;
        Seconds started = 0;
        double left = 0;
        double received = 0;
        bool flowing = false;
    };

    bool complete() const {
        return std::ranges::all_of(views_, [](const ChunkView& v) {
            return v.status == ChunkStatus::kReady || v.status == ChunkStatus::kRecomputed;
        });
    }

    std::size_t flowing() const {
        return static_cast<std::size_t>(std::ranges::count(transfers_, true, &Transfer::flowing));
    }
    double share() const {
        const std::size_t n = flowing();
        return n == 0 ? 0 : s_.trace->rate(s_.start + now_) / static_cast<double>(n);
    }

    Seconds next_event() const {
        Seconds next = std::min(now_ + kTick, s_.trace->next_change(s_.start + now_) - s_.start);
        const double rate = share();
        for (const Transfer& t : transfers_) {
            if (!t.flowing) next = std::min(next, t.started + s_.first_byte);
            if (t.flowing && rate > 0) next = std::min(next, now_ + t.left / rate);
        }
        if (!decoding_.empty()) next = std::min(next, decoded_at_);
        if (computed_at_) next = std::min(next, *computed_at_);
        return std::max(next, now_ + 1e-9);
    }

    void advance(Seconds to) {
        const double part = share() * (to - now_);
        now_ = to;
        for (Transfer& t : transfers_) {
            if (!t.flowing) continue;
            const double got = std::min(part, t.left);
            t.left -= got;
            t.received += got;
            if (got > 0) network_.on_bytes(now_, static_cast<std::uint64_t>(got));
            views_[t.chunk].received = std::min(static_cast<std::uint64_t>(t.received),
                                                views_[t.chunk].levels[views_[t.chunk].choice].bytes);
        }
    }

    // What is over by now.
    void settle() {
        for (Transfer& t : transfers_) {
            if (t.flowing || now_ < t.started + s_.first_byte) continue;
            t.flowing = true;
            network_.on_first_byte(now_, now_ - t.started);
        }
        for (std::size_t i = 0; i < transfers_.size();) {
            if (!transfers_[i].flowing || transfers_[i].left > 0.5) {
                ++i;
                continue;
            }
            const std::size_t chunk = transfers_[i].chunk;
            end_transfer(i);
            views_[chunk].status = ChunkStatus::kDecoding;
            if (decoding_.empty()) decoded_at_ = now_ + s_.compute.decode_time(views_[chunk].tokens);
            decoding_.push_back(chunk);
        }
        while (!decoding_.empty() && decoded_at_ <= now_) {
            views_[decoding_.front()].status = ChunkStatus::kReady;
            decoding_.pop_front();
            if (!decoding_.empty()) decoded_at_ += s_.compute.decode_time(views_[decoding_.front()].tokens);
        }
        if (computed_at_ && *computed_at_ <= now_) {
            for (std::size_t i = computing_first_; i < computing_end_; ++i)
                views_[i].status = ChunkStatus::kRecomputed;
            computed_at_.reset();
        }
    }

    void end_transfer(std::size_t i) {
        const Transfer t = transfers_[i];
        transfers_.erase(transfers_.begin() + static_cast<std::ptrdiff_t>(i));
        network_.on_end(now_, static_cast<std::uint64_t>(t.received), now_ - t.started);
        result_.bytes += t.received;
    }

    void abandon(std::size_t chunk) {
        for (std::size_t i = 0; i < transfers_.size(); ++i) {
            if (transfers_[i].chunk == chunk) return end_transfer(i);
        }
    }

    RuleState state() const {
        RuleState r;
        r.now = now_;
        r.deadline = s_.deadline;
        r.chunks = views_;
        r.network = network_.estimate(now_);
        r.compute = &s_.compute;
        r.transfers = transfers_.size();
        r.most_transfers = s_.transfers;
        for (const ChunkView& v : views_) {
            if (v.status == ChunkStatus::kText)
                r.compute_busy += s_.compute.prefill_time(v.first_token, v.tokens);
        }
        if (computed_at_) r.compute_busy -= std::min(r.compute_busy, now_ - computing_since_);
        return r;
    }

    void pump() {
        for (std::size_t turns = 2 * views_.size() + 16; turns > 0; --turns) {
            const RuleState r = state();
            const auto before = std::chrono::steady_clock::now();
            const Decision d = rule_.decide(r);
            result_.decision_seconds +=
                std::chrono::duration<double>(std::chrono::steady_clock::now() - before).count();
            ++result_.decisions;
            if (d.kind == Decision::Kind::kWait) break;
            apply(d);
        }
        start_recompute();
    }

    void apply(const Decision& d) {
        abandon(d.chunk);
        ChunkView& v = views_[d.chunk];
        if (d.kind == Decision::Kind::kText) {
            v.status = ChunkStatus::kText;
            return;
        }
        v.status = ChunkStatus::kLoading;
        v.choice = d.choice;
        v.received = 0;
        transfers_.push_back({d.chunk, now_, static_cast<double>(v.levels[d.choice].bytes), 0, false});
        network_.on_request(now_);
    }

    void start_recompute() {
        if (computed_at_) return;
        std::size_t first = 0;
        while (first < views_.size() && (views_[first].status == ChunkStatus::kReady ||
                                         views_[first].status == ChunkStatus::kRecomputed))
            ++first;
        std::size_t end = first;
        std::size_t tokens = 0;
        for (; end < views_.size() && views_[end].status == ChunkStatus::kText; ++end)
            tokens += views_[end].tokens;
        if (first == end) return;
        computing_first_ = first;
        computing_end_ = end;
        computing_since_ = now_;
        computed_at_ = now_ + s_.compute.prefill_time(views_[first].first_token, tokens);
    }

    const Scenario& s_;
    const Rule& rule_;
    std::vector<ChunkView> views_;
    Throughput network_;
    Seconds now_ = 0;
    std::vector<Transfer> transfers_;
    std::deque<std::size_t> decoding_;
    Seconds decoded_at_ = 0;
    std::size_t computing_first_ = 0, computing_end_ = 0;
    Seconds computing_since_ = 0;
    std::optional<Seconds> computed_at_;
    SessionResult result_;
};

}  // namespace

SessionResult simulate(const Scenario& scenario, const Rule& rule) {
    return Simulation(scenario, rule).run();
}

}  // namespace kvcast::bench
