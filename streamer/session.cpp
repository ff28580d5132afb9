#include "streamer/session.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <list>
#include <mutex>
#include <random>

#include "codec/format/chain.h"
#include "streamer/lane.h"
#include "streamer/rules/rules.h"
#include "streamer/store.h"
#include "streamer/verify.h"

namespace kvcast::streamer {
namespace {

constexpr Duration kTick = std::chrono::milliseconds(20);  // between looks at transfers that are under way
constexpr std::size_t kCalibration = static_cast<std::size_t>(-1);
constexpr double kTextMargin = 1.1;  // a manifest is awaited until recomputing everything takes this much
constexpr std::size_t kFailuresOfTheStore = 2;  // chunks given up by the network, one after another

// Failures that another level of the same store would meet too.
bool is_of_the_network(const Status& status, int http_status) {
    return status.code() == ErrorCode::kNetwork || status.code() == ErrorCode::kTimeout ||
           status.code() == ErrorCode::kTls || http_status >= 500 || http_status == 429;
}

std::uint64_t drawn_seed() {
    return std::random_device()() | std::uint64_t{std::random_device()()} << 32;
}

std::int64_t system_seconds() {
    return std::chrono::duration_cast<std::chrono::seconds>(
               std::chrono::system_clock::now().time_since_epoch())
        .count();
}

}  // namespace

// Everything but the lanes' tasks runs on the loop's thread.
class Session::Impl : public std::enable_shared_from_this<Impl> {
  public:
    Impl(EventLoop& loop, Transport& transport, Wanted wanted, SessionOptions options, ChunkCodec& codec,
         Sink& sink)
        : loop_(loop),
          transport_(transport),
          wanted_(std::move(wanted)),
          options_(std::move(options)),
          codec_(codec),
          sink_(sink),
          start_(loop.now()),
          network_(options_.network),
          random_(options_.seed != 0 ? options_.seed : drawn_seed()) {
        if (!options_.rule) options_.rule = two_pointer_rule();
        if (!options_.memory) options_.memory = std::make_shared<MemoryPool>();
    }

    void begin();
    void request_cancel();
    void close();
    Summary wait();
    bool wait_for(Duration patience);

  private:
    // A chunk, or the calibration, on its way.
    class Transfer final : public DownloadObserver {
      public:
        Transfer(Impl& owner, std::size_t chunk, std::size_t choice, DownloadRequest request);
        ~Transfer() override;
        Transfer(const Transfer&) = delete;
        Transfer& operator=(const Transfer&) = delete;

        void on_first_byte(Duration latency) override;
        void on_bytes(std::size_t count) override;
        void on_finished(Result<std::vector<std::uint8_t>> object, int http_status) override;

        Impl& owner;
        const std::size_t chunk;
        const std::size_t choice;
        const std::uint64_t bytes;
        const Seconds started;
        bool busy = false;
        std::unique_ptr<Download> download;
    };
    // A chunk that came before its calibration.
    struct Held {
        std::size_t chunk = 0;
        std::vector<std::uint8_t> object;
    };

    Seconds now() const { return to_seconds(loop_.now() - start_); }
    template <typename Call>
    void tell(const Call& call) {
        const std::scoped_lock lock(sink_mutex_);
        if (!closed_) call();
    }

    void on_located(Result<Located> located);
    void all_text(const Status& why);
    Status check_memory() const;
    void make_chunks();
    void add_tail(std::size_t first, std::size_t end);
    void want_calibration();

    void pump();
    RuleState state();
    bool sensible(const Decision& d) const;
    bool has_room(const Decision& d) const;
    void apply(const Decision& d);
    void load(std::size_t chunk, std::size_t choice);
    void text(std::size_t chunk);
    void text_where_nothing_is_left();
    void abandon(std::size_t chunk);

    void on_transfer(Transfer& ended, Result<std::vector<std::uint8_t>> object, int http_status);
    void on_calibration(Result<std::vector<std::uint8_t>> object);
    void calibration_is_there(const Status& status);
    void on_chunk_failed(std::size_t chunk, std::size_t choice, const Status& status, int http_status);
    void decode(std::size_t chunk, std::vector<std::uint8_t> object);
    Status decode_on_lane(std::size_t chunk, const ManifestObject& promised,
                          std::span<const std::uint8_t> object);
    void on_decoded(std::size_t chunk, std::vector<std::uint8_t> object, const Status& status);
    void recompute();
    void on_recomputed(std::size_t first, std::size_t end);
    Seconds compute_busy() const;

    void finish_when_complete();
    void finish(const Status& status);
    const ManifestObject& promised(std::size_t chunk, std::size_t choice) const {
        return located_.manifest.chunks[chunk].objects[choice];
    }

    EventLoop& loop_;
    Transport& transport_;
    const Wanted wanted_;
    SessionOptions options_;
    ChunkCodec& codec_;
    Sink& sink_;
    const Time start_;
    Throughput network_;
    std::mt19937_64 random_;

    std::unique_ptr<Locator> locator_;
    EventLoop::TimerId patience_ = 0;  // for the manifest
    EventLoop::TimerId tick_ = 0;
    Located located_;
    Status publication_;
    std::vector<ChunkView> views_;
    std::vector<ChunkReport> reports_;
    std::vector<bool> hash_failed_;  // [chunk]: once, at its present choice
    std::list<std::unique_ptr<Transfer>> transfers_;
    bool calibration_ready_ = true;
    std::vector<Held> held_;
    std::uint64_t undecoded_bytes_ = 0;
    std::size_t network_failures_ = 0;
    TokenRange computing_;  // what the compute lane works on, in chunks
    Seconds computing_since_ = 0;
    bool ended_ = false;
    Summary summary_;

    std::atomic<bool> cancelled_ = false;
    std::mutex sink_mutex_;
    bool closed_ = false;  // guarded by sink_mutex_: no more calls on the loop's thread
    std::mutex done_mutex_;
    std::condition_variable done_condition_;
    bool done_ = false;  // guarded by done_mutex_
    Lane decode_lane_;
    Lane compute_lane_;
};

// ---- transfers ----

Session::Impl::Transfer::Transfer(Impl& o, std::size_t chunk_, std::size_t choice_, DownloadRequest request)
    : owner(o), chunk(chunk_), choice(choice_), bytes(request.limit), started(o.now()) {
    owner.network_.on_request(started);
    download = std::make_unique<Download>(owner.loop_, owner.transport_, std::move(request),
                                          owner.options_.download, *this, owner.random_());
}

Session::Impl::Transfer::~Transfer() {
    owner.network_.on_end(owner.now(), download->received(), owner.now() - started);
}

void Session::Impl::Transfer::on_first_byte(Duration latency) {
    if (!busy) owner.network_.on_first_byte(owner.now(), to_seconds(latency));
    busy = true;
}

void Session::Impl::Transfer::on_bytes(std::size_t count) {
    owner.network_.on_bytes(owner.now(), count);
    if (chunk != kCalibration) owner.views_[chunk].received = std::min(download->received() + count, bytes);
}

void Session::Impl::Transfer::on_finished(Result<std::vector<std::uint8_t>> object, int http_status) {
    owner.on_transfer(*this, std::move(object), http_status);
}

// ---- the beginning ----

void Session::Impl::begin() {
    if (ended_) return;
    const bool by_tokens = !wanted_.store_url.empty() && !wanted_.token_ids.empty() && wanted_.layout;
    if (wanted_.manifest_url.empty() && !by_tokens) {
        return finish({ErrorCode::kBadArgument,
                       "a session needs a manifest's URL, or a store's URL with token ids and a layout"});
    }
    const Seconds all = options_.compute.prefill_time(0, wanted_.token_ids.size()) * kTextMargin;
    if (!wanted_.token_ids.empty() && all < options_.deadline && options_.deadline < 1e9) {
        patience_ = loop_.after(from_seconds(options_.deadline - all), [this] {
            locator_.reset();
            all_text({ErrorCode::kTimeout, "no manifest before recomputing was due"});
        });
    }
    const Locator::Environment environment = {loop_,
                                              transport_,
                                              options_.download,
                                              options_.trusted,
                                              options_.wall_clock ? options_.wall_clock() : system_seconds(),
                                              random_()};
    const auto heard = [this](Duration latency) {
        network_.on_request(now());
        network_.on_first_byte(now(), to_seconds(latency));
        network_.on_end(now(), 0, 0);
    };
    locator_ = std::make_unique<Locator>(environment, wanted_, heard,
                                         [weak = weak_from_this()](Result<Located> located) {
                                             if (const auto self = weak.lock())
                                                 self->on_located(std::move(located));
                                         });
}

void Session::Impl::on_located(Result<Located> located) {
    if (ended_ || cancelled_) return;
    loop_.cancel(patience_);
    locator_.reset();
    summary_.manifest_time = now();
    if (!located.ok()) return all_text(located.status());
    located_ = std::move(located.value());
    if (const Status s = check_memory(); !s.ok()) return all_text(s);
    make_chunks();
    tell([&] { sink_.on_manifest(located_.manifest, located_.chunks); });
    want_calibration();
    pump();
}

// There is nothing to load: everything the caller wants is text.
void Session::Impl::all_text(const Status& why) {
    loop_.cancel(patience_);
    publication_ = why;
    if (wanted_.token_ids.empty()) return finish(why);
    located_.token_ids = wanted_.token_ids;
    add_tail(0, wanted_.token_ids.size());
    pump();
}

Status Session::Impl::check_memory() const {
    const std::uint64_t per_token =
        located_.manifest.layout.values_per_token() * kernels::dtype_bytes(located_.manifest.layout.dtype);
    for (const ManifestChunk& c : located_.manifest.chunks) {
        if (c.tokens * per_token > options_.chunk_bytes) {
            return {ErrorCode::kLimitExceeded,
                    fmt::format("a chunk of {} tokens decodes to {} bytes, at most {} are allowed", c.tokens,
                                c.tokens * per_token, options_.chunk_bytes)};
        }
    }
    return {};
}

void Session::Impl::make_chunks() {
    const Manifest& m = located_.manifest;
    options_.compute.bytes_per_token = m.layout.values_per_token() * kernels::dtype_bytes(m.layout.dtype);
    std::size_t first = 0;
    for (std::size_t i = 0; i < located_.chunks; ++i) {
        ChunkView view;
        view.first_token = first;
        view.tokens = m.chunks[i].tokens;
        for (const ManifestObject& o : m.chunks[i].objects) {
            const auto level = std::ranges::find(m.levels, o.level, &ManifestLevel::level);
            const bool usable = !options_.finest_level || o.level >= *options_.finest_level;
            view.levels.push_back({o.level, o.bytes, level->kl.value_or(o.level), usable});
        }
        first += view.tokens;
        views_.push_back(std::move(view));
    }
    add_tail(first, std::max(first, wanted_.token_ids.size()));
}

// What no chunk covers is text from the start; with it, everything has its report.
void Session::Impl::add_tail(std::size_t first, std::size_t end) {
    if (end > first) {
        ChunkView tail;
        tail.first_token = first;
        tail.tokens = end - first;
        tail.status = ChunkStatus::kText;
        views_.push_back(std::move(tail));
    }
    for (const ChunkView& v : views_) {
        ChunkReport report;
        report.tokens = {v.first_token, v.first_token + v.tokens};
        report.text = v.status == ChunkStatus::kText;
        report.kl = -1;
        if (report.text) report.reason = "not in the store";
        reports_.push_back(std::move(report));
    }
    hash_failed_.resize(views_.size());
}

void Session::Impl::want_calibration() {
    const auto& calibration = located_.manifest.calibration;
    if (!calibration || codec_.has_calibration(calibration->id)) return;
    calibration_ready_ = false;
    DownloadRequest request;
    request.url = join_url(located_.root, calibration_name(calibration->id));
    request.bytes = request.limit = calibration->bytes;
    transfers_.push_back(std::make_unique<Transfer>(*this, kCalibration, 0, std::move(request)));
}

// ---- decisions ----

void Session::Impl::pump() {
    if (ended_ || cancelled_) return;
    text_where_nothing_is_left();
    // Every decision but a change of level makes progress; a rule that only ever changes its mind is cut off.
    for (std::size_t turns = 2 * views_.size() + 16; turns > 0; --turns) {
        const RuleState s = state();
        const Decision d = options_.rule->decide(s);
        if (d.kind == Decision::Kind::kWait || !sensible(d) || !has_room(d)) break;
        apply(d);
    }
    recompute();
    loop_.cancel(tick_);
    tick_ = loop_.after(kTick, [this] { pump(); });
    finish_when_complete();
}

RuleState Session::Impl::state() {
    RuleState s;
    s.now = now();
    s.deadline = options_.deadline;
    s.chunks = views_;
    s.network = network_.estimate(s.now);
    s.compute = &options_.compute;
    s.most_transfers = options_.transfers;
    s.compute_busy = compute_busy();
    for (const auto& t : transfers_) {
        if (t->chunk == kCalibration) {
            s.other_bytes = t->bytes - t->download->received();
        } else {
            ++s.transfers;
        }
    }
    return s;
}

bool Session::Impl::sensible(const Decision& d) const {
    if (d.chunk >= views_.size()) return false;
    const ChunkView& c = views_[d.chunk];
    if (c.status != ChunkStatus::kPending && c.status != ChunkStatus::kLoading) return false;
    if (d.kind == Decision::Kind::kText) return true;
    return d.choice < c.levels.size() && c.levels[d.choice].usable &&
           !(c.status == ChunkStatus::kLoading && c.choice == d.choice);
}

bool Session::Impl::has_room(const Decision& d) const {
    if (d.kind == Decision::Kind::kText) return true;
    std::uint64_t held = undecoded_bytes_;
    for (const auto& t : transfers_) held += t->chunk == d.chunk || t->chunk == kCalibration ? 0 : t->bytes;
    return held == 0 || held + views_[d.chunk].levels[d.choice].bytes <= options_.memory_bytes;
}

void Session::Impl::apply(const Decision& d) {
    DecisionRecord record = {now(), d, 0, 0, network_.estimate(now())};
    reports_[d.chunk].decided = record.time;
    reports_[d.chunk].reason = d.reason;
    if (d.kind == Decision::Kind::kText) {
        text(d.chunk);
    } else {
        record.level = views_[d.chunk].levels[d.choice].level;
        record.bytes = views_[d.chunk].levels[d.choice].bytes;
        load(d.chunk, d.choice);
    }
    tell([&] { sink_.on_decision(record); });
}

void Session::Impl::load(std::size_t chunk, std::size_t choice) {
    abandon(chunk);
    ChunkView& view = views_[chunk];
    if (view.choice != choice) hash_failed_[chunk] = false;
    view.status = ChunkStatus::kLoading;
    view.choice = choice;
    view.received = 0;
    const ManifestObject& object = promised(chunk, choice);
    DownloadRequest request;
    request.url = join_url(located_.root, object_name(located_.manifest.chunks[chunk].chain, object));
    request.bytes = request.limit = object.bytes;
    request.storage = options_.memory->take(object.bytes);
    transfers_.push_back(std::make_unique<Transfer>(*this, chunk, choice, std::move(request)));
}

void Session::Impl::text(std::size_t chunk) {
    abandon(chunk);
    views_[chunk].status = ChunkStatus::kText;
    reports_[chunk].text = true;
}

void Session::Impl::abandon(std::size_t chunk) {
    std::erase_if(transfers_, [&](const auto& t) { return t->chunk == chunk; });
}

void Session::Impl::text_where_nothing_is_left() {
    for (std::size_t i = 0; i < views_.size(); ++i) {
        if (views_[i].status != ChunkStatus::kPending || coarsest_level(views_[i]) != kNoLevel) continue;
        apply({Decision::Kind::kText, i, 0, "no level can be had"});
    }
    const bool loading = std::ranges::any_of(views_, [](const ChunkView& v) {
        return v.status == ChunkStatus::kPending || v.status == ChunkStatus::kLoading ||
               v.status == ChunkStatus::kDecoding;
    });
    if (!loading) abandon(kCalibration);
}

// ---- what came ----

void Session::Impl::on_transfer(Transfer& ended, Result<std::vector<std::uint8_t>> object, int http_status) {
    const auto it = std::ranges::find_if(transfers_, [&](const auto& t) { return t.get() == &ended; });
    const std::unique_ptr<Transfer> transfer = std::move(*it);  // lives to the end of this function
    transfers_.erase(it);
    if (transfer->chunk == kCalibration) return on_calibration(std::move(object));
    ChunkReport& report = reports_[transfer->chunk];
    report.requests += transfer->download->requests();
    if (object.ok()) {
        network_failures_ = 0;
        views_[transfer->chunk].status = ChunkStatus::kDecoding;
        report.received = now();
        undecoded_bytes_ += object.value().size();
        decode(transfer->chunk, std::move(object.value()));
    } else {
        on_chunk_failed(transfer->chunk, transfer->choice, object.status(), http_status);
    }
    pump();
}

void Session::Impl::on_chunk_failed(std::size_t chunk, std::size_t choice, const Status& status,
                                    int http_status) {
    ChunkView& view = views_[chunk];
    view.status = ChunkStatus::kPending;
    std::string& trouble = reports_[chunk].trouble;
    trouble += fmt::format("{}level {}: {}", trouble.empty() ? "" : "; ", view.levels[choice].level,
                           status.message());
    const auto rule_out = [](ChunkView& v) {
        if (v.status == ChunkStatus::kPending) {
            for (LevelView& l : v.levels) l.usable = false;
        }
    };
    if (!is_of_the_network(status, http_status)) {
        view.levels[choice].usable = false;
    } else if (++network_failures_ >= kFailuresOfTheStore) {
        std::ranges::for_each(views_, rule_out);
    } else {
        rule_out(view);
    }
}

void Session::Impl::on_calibration(Result<std::vector<std::uint8_t>> object) {
    if (!object.ok()) {
        calibration_is_there(object.status());
        return pump();
    }
    decode_lane_.run([self = shared_from_this(), file = std::move(object.value())] {
        Status status = {ErrorCode::kObjectMismatch, "the calibration's bytes do not hash to its name"};
        if (sha256(file) == self->located_.manifest.calibration->id)
            status = self->codec_.add_calibration(file);
        self->loop_.post([self, status] {
            if (self->ended_) return;
            self->calibration_is_there(status);
            self->pump();
        });
    });
}

// Chunks that waited are decoded, or have to come at another level.
void Session::Impl::calibration_is_there(const Status& status) {
    calibration_ready_ = true;
    std::vector<Held> held;
    held.swap(held_);
    if (!status.ok()) {
        for (ChunkView& v : views_) {
            for (LevelView& l : v.levels) {
                const auto listed =
                    std::ranges::find(located_.manifest.levels, l.level, &ManifestLevel::level);
                if (listed->profile == Profile::kKlt) l.usable = false;
            }
        }
    }
    for (Held& h : held) {
        if (status.ok()) {
            decode(h.chunk, std::move(h.object));
        } else {
            on_decoded(h.chunk, std::move(h.object), {status.code(), "calibration: " + status.message()});
        }
    }
}

void Session::Impl::decode(std::size_t chunk, std::vector<std::uint8_t> object) {
    const ManifestObject& promise = promised(chunk, views_[chunk].choice);
    const auto level = std::ranges::find(located_.manifest.levels, promise.level, &ManifestLevel::level);
    if (level->profile == Profile::kKlt && !calibration_ready_) {
        held_.push_back({chunk, std::move(object)});
        return;
    }
    decode_lane_.run([self = shared_from_this(), chunk, &promise, object = std::move(object)]() mutable {
        const Status status = self->decode_on_lane(chunk, promise, object);
        self->loop_.post([self, chunk, object = std::move(object), status]() mutable {
            self->on_decoded(chunk, std::move(object), status);
            self->pump();
        });
    });
}

Status Session::Impl::decode_on_lane(std::size_t chunk, const ManifestObject& promise,
                                     std::span<const std::uint8_t> object) {
    if (cancelled_) return {ErrorCode::kCancelled, "cancelled"};
    Status status = verify_object(object, located_.manifest, chunk, promise);
    if (!status.ok()) return status;
    const TokenRange tokens = reports_[chunk].tokens;
    return codec_.decode(object, [&](std::size_t layer, std::span<const DecodedPlane> planes) {
        if (!cancelled_) sink_.on_layer(chunk, tokens, layer, planes);
    });
}

void Session::Impl::on_decoded(std::size_t chunk, std::vector<std::uint8_t> object, const Status& status) {
    if (ended_ || cancelled_) return;
    undecoded_bytes_ -= object.size();
    options_.memory->give(std::move(object));
    ChunkView& view = views_[chunk];
    if (status.ok()) {
        view.status = ChunkStatus::kReady;
        ChunkReport& report = reports_[chunk];
        const ManifestObject& promise = promised(chunk, view.choice);
        const auto level = std::ranges::find(located_.manifest.levels, promise.level, &ManifestLevel::level);
        report.level = promise.level;
        report.bytes = promise.bytes;
        report.kl = level->kl.value_or(-1);
        report.ready = now();
        return;
    }
    // Bytes may have been hurt on their way: once more, then another level.
    const bool again = status.code() == ErrorCode::kObjectMismatch && !hash_failed_[chunk];
    on_chunk_failed(chunk, view.choice, status, 0);
    view.levels[view.choice].usable = view.levels[view.choice].usable || again;
    hash_failed_[chunk] = again;
}

// ---- text ----

// The first tokens that are not there yet, if they are to be recomputed: all before them is in place.
void Session::Impl::recompute() {
    if (computing_.end != 0) return;
    const auto there = [](const ChunkView& v) {
        return v.status == ChunkStatus::kReady || v.status == ChunkStatus::kRecomputed;
    };
    const auto first = std::ranges::find_if_not(views_, there);
    const auto end =
        std::find_if(first, views_.end(), [](const ChunkView& v) { return v.status != ChunkStatus::kText; });
    if (first == end) return;
    computing_ = {static_cast<std::size_t>(first - views_.begin()),
                  static_cast<std::size_t>(end - views_.begin())};
    computing_since_ = now();
    const TokenRange tokens = {first->first_token, (end - 1)->first_token + (end - 1)->tokens};
    compute_lane_.run([self = shared_from_this(), chunks = computing_, tokens] {
        const std::span<const std::int32_t> known = self->located_.token_ids;
        const auto ids = tokens.end <= known.size() ? known.subspan(tokens.first, tokens.end - tokens.first)
                                                    : std::span<const std::int32_t>();
        if (!self->cancelled_) self->sink_.on_recompute(tokens, ids);
        self->loop_.post([self, chunks] { self->on_recomputed(chunks.first, chunks.end); });
    });
}

void Session::Impl::on_recomputed(std::size_t first, std::size_t end) {
    if (ended_ || cancelled_) return;
    computing_ = {};
    for (std::size_t i = first; i < end; ++i) {
        views_[i].status = ChunkStatus::kRecomputed;
        reports_[i].ready = now();
    }
    pump();
}

Seconds Session::Impl::compute_busy() const {
    Seconds busy = 0;
    for (std::size_t i = 0; i < views_.size(); ++i) {
        if (views_[i].status == ChunkStatus::kText)
            busy += options_.compute.prefill_time(views_[i].first_token, views_[i].tokens);
    }
    if (computing_.end != 0) busy -= std::min(busy, now() - computing_since_);
    return busy;
}

// ---- the end ----

void Session::Impl::finish_when_complete() {
    const bool complete = std::ranges::all_of(views_, [](const ChunkView& v) {
        return v.status == ChunkStatus::kReady || v.status == ChunkStatus::kRecomputed;
    });
    if (complete && !ended_) finish({});
}

void Session::Impl::finish(const Status& status) {
    if (ended_) return;
    ended_ = true;
    loop_.cancel(tick_);
    loop_.cancel(patience_);
    locator_.reset();
    transfers_.clear();
    held_.clear();
    summary_.status = status;
    summary_.publication = publication_;
    summary_.time = now();
    summary_.network_bytes = network_.bytes();
    summary_.network = network_.experience(now());
    double kl = 0;
    for (const ChunkReport& r : reports_) {
        const std::size_t tokens = r.tokens.end - r.tokens.first;
        summary_.tokens += tokens;
        if (r.text) summary_.text_tokens += tokens;
        if (!r.text) kl += std::max(r.kl, 0.0) * static_cast<double>(tokens);
    }
    if (summary_.tokens > summary_.text_tokens)
        summary_.kl = kl / static_cast<double>(summary_.tokens - summary_.text_tokens);
    summary_.chunks = reports_;
    tell([&] { sink_.on_finish(summary_); });
    {
        const std::scoped_lock lock(done_mutex_);
        done_ = true;
    }
    done_condition_.notify_all();
}

// Once tasks that the lanes have begun are over, on_finish() is the last callback.
void Session::Impl::request_cancel() {
    if (cancelled_.exchange(true)) return;
    decode_lane_.run([self = shared_from_this()] {
        self->compute_lane_.run([self] {
            self->loop_.post([self] { self->finish({ErrorCode::kCancelled, "the session was cancelled"}); });
        });
    });
}

void Session::Impl::close() {
    cancelled_ = true;
    decode_lane_.stop();
    compute_lane_.stop();
    {
        const std::scoped_lock lock(sink_mutex_);
        closed_ = true;
    }
    loop_.post([self = shared_from_this()] {
        self->finish({ErrorCode::kCancelled, "the session was destroyed"});
    });
}

Summary Session::Impl::wait() {
    std::unique_lock lock(done_mutex_);
    done_condition_.wait(lock, [this] { return done_; });
    return summary_;
}

bool Session::Impl::wait_for(Duration patience) {
    std::unique_lock lock(done_mutex_);
    return done_condition_.wait_for(lock, patience, [this] { return done_; });
}

Session::Session(EventLoop& loop, Transport& transport, Wanted wanted, SessionOptions options,
                 ChunkCodec& codec, Sink& sink)
    : impl_(std::make_shared<Impl>(loop, transport, std::move(wanted), std::move(options), codec, sink)) {
    loop.post([impl = impl_] { impl->begin(); });
}

Session::~Session() {
    impl_->close();
}

void Session::cancel() {
    impl_->request_cancel();
}

Summary Session::wait() {
    return impl_->wait();
}

bool Session::wait_for(Duration patience) {
    return impl_->wait_for(patience);
}

}  // namespace kvcast::streamer
