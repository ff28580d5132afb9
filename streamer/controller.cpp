#include "streamer/controller.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "streamer/rules/outlook.h"

namespace kvcast::streamer {
namespace {

constexpr double kTextMargin = 0.9;  // of the time left, for text
constexpr std::size_t kMostTurns = 1024;
constexpr Seconds kNever = std::numeric_limits<Seconds>::infinity();

bool is_there(const ChunkView& v) {
    return v.status == ChunkStatus::kReady || v.status == ChunkStatus::kRecomputed ||
           v.status == ChunkStatus::kPresent;
}

}  // namespace

Controller::Controller(std::shared_ptr<const Rule> rule, ControllerOptions options, Owner& owner, bool record)
    : rule_(std::move(rule)), options_(std::move(options)), owner_(owner), network_(options_.network) {
    if (record) recording_.emplace().options = options_;
}

void Controller::begin(std::vector<ChunkView> chunks, std::uint64_t bytes_per_token) {
    views_ = std::move(chunks);
    begun_.resize(views_.size());
    options_.compute.bytes_per_token = bytes_per_token;
    if (recording_) {
        recording_->chunks = views_;
        recording_->options = options_;
    }
}

void Controller::take(const Event& e) {
    if (recording_) recording_->events.push_back(e);
    switch (e.kind) {
        case Event::Kind::kRequest:
            return network_.on_request(e.time);
        case Event::Kind::kFirstByte:
            (e.chunk == kNoChunk ? other_begun_ : begun_[e.chunk]).has_first_byte = true;
            return network_.on_first_byte(e.time, e.seconds);
        case Event::Kind::kBytes:
            network_.on_bytes(e.time, e.count);
            if (e.chunk != kNoChunk) {
                ChunkView& v = views_[e.chunk];
                v.received = std::min(e.received, v.levels[v.choice].bytes);
            }
            return;
        case Event::Kind::kEnd:
            return end_transfer(other_begun_, e.time, e.count, e.seconds);
        case Event::Kind::kOther:
            other_bytes_ = e.left;
            return;
        case Event::Kind::kArrived:
        case Event::Kind::kFailed: {
            ChunkView& v = views_[e.chunk];
            if (v.status == ChunkStatus::kLoading)
                end_transfer(begun_[e.chunk], e.time, v.received, e.time - begun_[e.chunk].time);
            v.status = e.kind == Event::Kind::kArrived ? ChunkStatus::kDecoding : ChunkStatus::kPending;
            return;
        }
        case Event::Kind::kReady:
            views_[e.chunk].status = ChunkStatus::kReady;
            return;
        case Event::Kind::kRecomputed:
            for (std::size_t i = computing_first_; i < computing_end_; ++i)
                views_[i].status = ChunkStatus::kRecomputed;
            computing_first_ = computing_end_ = 0;
            return;
        case Event::Kind::kExclude:
        case Event::Kind::kInclude:
            views_[e.chunk].levels[e.choice].usable = e.kind == Event::Kind::kInclude;
            return;
        case Event::Kind::kLook:
            return look(e.time);
    }
}

bool Controller::complete() const {
    return std::ranges::all_of(views_, is_there);
}

bool Controller::loading() const {
    return std::ranges::find(views_, ChunkStatus::kLoading, &ChunkView::status) != views_.end();
}

bool Controller::waits_in_vain(std::span<const std::size_t> waiting, Seconds now) const {
    if (waiting.empty() || other_bytes_ == 0 || !options_.compute.can_recompute()) return false;
    const RuleState s = state(now);
    Seconds text = text_time(s);
    std::size_t tokens = 0;
    for (const std::size_t i : waiting) {
        text += options_.compute.prefill_time(views_[i]);
        tokens += views_[i].tokens;
    }
    const double rate = std::max(s.network.robust, 1.0);
    const Seconds left = s.deadline - now;
    Seconds load = static_cast<double>(other_bytes_) / rate + options_.compute.decode_time(tokens);
    // While nothing comes, few bytes are no reason to expect them in time: late, and not beyond hope.
    if (s.network.silence > 0) load = std::max(load, std::nextafter(left, kNever));
    return text_is_due(load, text, left, kTextMargin);
}

bool Controller::is_better_off_uncalibrated(Seconds now) const {
    double with = static_cast<double>(other_bytes_), without = 0;
    for (const ChunkView& c : views_) {
        const bool loading = c.status == ChunkStatus::kLoading;
        const bool chosen = loading || c.status == ChunkStatus::kDecoding;
        const bool waits = chosen && c.levels[c.choice].calibrated;
        if (!is_missing(c) && !waits) continue;
        double least = 0, least_uncalibrated = kNever;
        for (const LevelView& l : c.levels) {
            if (!l.usable) continue;
            least = static_cast<double>(l.bytes);
            if (!l.calibrated) least_uncalibrated = least;
        }
        if (chosen) (waits ? least : least_uncalibrated) = loading ? bytes_to_come(c) : 0;
        with += least;
        without += least_uncalibrated;
    }
    const double rate = std::max(network_.estimate(now).robust, 1.0);
    return other_bytes_ > 0 && with / rate > options_.deadline - now && without < with;
}

void Controller::look(Seconds now) {
    text_where_nothing_is_left(now);
    // Every decision but a change of level makes progress; a rule that only ever changes its mind is cut off.
    // Nor do many chunks hold up whoever else waits for this thread: what is left is decided at the next
    // look.
    for (std::size_t turns = std::min(2 * views_.size() + 16, kMostTurns); turns > 0; --turns) {
        const Decision d = rule_->decide(state(now));
        if (d.kind == Decision::Kind::kWait || !sensible(d) || !has_room(d)) break;
        apply(d, now);
    }
    recompute(now);
}

RuleState Controller::state(Seconds now) const {
    RuleState s;
    s.now = now;
    s.deadline = options_.deadline;
    s.chunks = views_;
    s.network = network_.estimate(now);
    s.compute = &options_.compute;
    s.transfers =
        static_cast<std::size_t>(std::ranges::count(views_, ChunkStatus::kLoading, &ChunkView::status));
    s.most_transfers = options_.transfers;
    s.other_bytes = other_bytes_;
    s.compute_busy = compute_busy(now);
    return s;
}

bool Controller::sensible(const Decision& d) const {
    if (d.chunk >= views_.size()) return false;
    const ChunkView& c = views_[d.chunk];
    if (c.status != ChunkStatus::kPending && c.status != ChunkStatus::kLoading) return false;
    if (d.kind == Decision::Kind::kText) return true;
    return d.choice < c.levels.size() && c.levels[d.choice].usable &&
           !(c.status == ChunkStatus::kLoading && c.choice == d.choice);
}

bool Controller::has_room(const Decision& d) const {
    if (d.kind == Decision::Kind::kText) return true;
    std::uint64_t held = 0;
    for (std::size_t i = 0; i < views_.size(); ++i) {
        const ChunkView& v = views_[i];
        const bool holds = v.status == ChunkStatus::kLoading || v.status == ChunkStatus::kDecoding;
        if (holds && i != d.chunk) held += v.levels[v.choice].bytes;
    }
    return held == 0 || held + views_[d.chunk].levels[d.choice].bytes <= options_.memory_bytes;
}

void Controller::apply(const Decision& d, Seconds now) {
    DecisionRecord record = {now, d, 0, 0, network_.estimate(now)};
    stop(d.chunk, now);
    ChunkView& v = views_[d.chunk];
    if (d.kind == Decision::Kind::kText) {
        v.status = ChunkStatus::kText;
    } else {
        record.level = v.levels[d.choice].level;
        record.bytes = v.levels[d.choice].bytes;
        v.status = ChunkStatus::kLoading;
        v.choice = d.choice;
        v.received = 0;
        begun_[d.chunk] = {now, false};
        network_.on_request(now);
    }
    if (recording_) recording_->decisions.push_back(record);
    owner_.decided(record);
    if (d.kind == Decision::Kind::kLoad) owner_.start(d.chunk, d.choice);
}

void Controller::end_transfer(Begun& begun, Seconds now, std::uint64_t bytes, Seconds seconds) {
    network_.on_end(now, bytes, seconds, std::exchange(begun.has_first_byte, false));
}

void Controller::stop(std::size_t chunk, Seconds now) {
    if (views_[chunk].status != ChunkStatus::kLoading) return;
    end_transfer(begun_[chunk], now, views_[chunk].received, now - begun_[chunk].time);
    owner_.stop(chunk);
}

void Controller::text_where_nothing_is_left(Seconds now) {
    for (std::size_t i = 0; i < views_.size(); ++i) {
        if (views_[i].status == ChunkStatus::kPending && coarsest_level(views_[i]) == kNoLevel)
            apply({Decision::Kind::kText, i, 0, "no level can be had"}, now);
    }
}

// The first tokens that are not there yet, if they are to be recomputed: all before them is in place.
void Controller::recompute(Seconds now) {
    if (computing_end_ != 0) return;
    const auto first = std::ranges::find_if_not(views_, is_there);
    const auto end =
        std::find_if(first, views_.end(), [](const ChunkView& v) { return v.status != ChunkStatus::kText; });
    if (first == end) return;
    computing_first_ = static_cast<std::size_t>(first - views_.begin());
    computing_end_ = static_cast<std::size_t>(end - views_.begin());
    computing_since_ = now;
    if (recording_) recording_->recomputed.push_back({now, computing_first_, computing_end_});
    owner_.recompute(computing_first_, computing_end_);
}

Seconds Controller::compute_busy(Seconds now) const {
    Seconds busy = 0;
    for (const ChunkView& v : views_) {
        if (v.status == ChunkStatus::kText) busy += options_.compute.prefill_time(v);
    }
    if (computing_end_ != 0) busy -= std::min(busy, now - computing_since_);
    return busy;
}

}  // namespace kvcast::streamer
