#include "streamer/session.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <list>
#include <mutex>
#include <random>
#include <utility>

#include "streamer/calibration_fetch.h"
#include "streamer/offer.h"
#include "streamer/reports.h"
#include "streamer/rules/rules.h"
#include "streamer/steps.h"
#include "streamer/store.h"
#include "streamer/verify.h"

namespace kvcast::streamer {
namespace {

constexpr Duration kTick = std::chrono::milliseconds(20);  // between looks at transfers that are under way
constexpr double kManifestMargin = 1.1;  // a manifest is awaited until recomputing everything takes this much
constexpr std::size_t kFailuresOfTheStore = 2;  // chunks given up by the network, one after another

// Failures that another level of the same store would meet too.
bool is_of_the_network(const Status& status, int http_status) {
    return status.code() == ErrorCode::kNetwork || status.code() == ErrorCode::kTimeout ||
           status.code() == ErrorCode::kTls || http_status >= 500 || http_status == 429;
}

std::uint64_t drawn_seed() {
    return std::random_device()() | std::uint64_t{std::random_device()()} << 32;
}

}  // namespace

// Everything but the lanes' tasks runs on the loop's thread.
class Session::Impl : public Steps, private Controller::Owner, private CalibrationFetch::Owner {
  public:
    Impl(EventLoop& loop, Transport& transport, Wanted wanted, SessionOptions options, ChunkCodec& codec,
         Sink& sink)
        : Steps(loop, options.start.value_or(loop.now())),
          loop_(loop),
          transport_(transport),
          wanted_(std::move(wanted)),
          options_(std::move(options)),
          codec_(codec),
          sink_(sink),
          controller_(options_.rule ? options_.rule : std::shared_ptr<const Rule>(two_pointer_rule()),
                      {options_.deadline, options_.compute, options_.network, options_.transfers,
                       options_.memory_bytes},
                      *this, options_.record),
          random_(options_.seed != 0 ? options_.seed : drawn_seed()),
          calibration_({*this, *this, loop_, transport_, options_.download, codec_, controller_, random_}) {
        if (!options_.memory) options_.memory = std::make_shared<MemoryPool>();
    }

    void begin();
    void abandon(Status why) override;
    void close();
    Summary wait();
    bool wait_for(Duration patience);

    bool is_cancelled() const override { return cancelled_; }
    bool is_over() const override { return ended_ || cancelled_; }

  private:
    // A chunk on its way.
    class Transfer final : public DownloadObserver {
      public:
        Transfer(Impl& owner, std::size_t chunk, std::size_t choice, DownloadRequest request);

        void on_first_byte(Duration latency) override;
        void on_bytes(std::size_t count) override;
        void on_finished(Result<std::vector<std::uint8_t>> object, int http_status) override;

        Impl& owner;
        const std::size_t chunk;
        const std::size_t choice;
        const std::uint64_t bytes;
        bool busy = false;
        std::unique_ptr<Download> download;
    };
    // A chunk that came before its calibration.
    struct Held {
        std::size_t chunk = 0;
        std::vector<std::uint8_t> object;
    };

    template <typename Call>
    void tell(const Call& call) {
        const std::scoped_lock lock(sink_mutex_);
        if (!closed_) call();
    }

    void locate();
    void on_located(Result<Located> located);
    Status check_present() const;
    void all_present();
    void all_text(const Status& why);
    void make_chunks();
    void with_text(std::vector<ChunkView> chunks, std::size_t end);
    bool is_calibrated(std::size_t chunk, std::size_t choice) const;
    bool expects_calibrated() const;

    void pump() override;
    void give_up_late_calibration();
    void decided(const DecisionRecord& record) override;
    void start(std::size_t chunk, std::size_t choice) override;
    void stop(std::size_t chunk) override;
    void recompute(std::size_t first, std::size_t end) override;

    void on_transfer(Transfer& ended, Result<std::vector<std::uint8_t>> object, int http_status);
    void on_calibration(const Status& status) override;
    void rule_out_calibrated(const Status& why);
    void note_failure(std::size_t chunk, std::size_t choice, const Status& status);
    void on_chunk_failed(std::size_t chunk, std::size_t choice, const Status& status, int http_status);
    void exclude(std::size_t chunk, std::size_t choice);
    void exclude_all(std::size_t chunk);
    void decode(std::size_t chunk, std::vector<std::uint8_t> object);
    Status decode_on_lane(std::size_t chunk, const ManifestObject& promised,
                          std::span<const std::uint8_t> object);
    void on_decoded(std::size_t chunk, std::vector<std::uint8_t> object, const Status& status);
    void on_recomputed(std::size_t first, std::size_t end);

    void finish_when_complete();
    void finish(const Status& status);
    void summarise(const Status& status);
    const std::vector<ChunkView>& views() const { return controller_.chunks(); }
    const ManifestObject& promised(std::size_t chunk, std::size_t choice) const {
        return located_.manifest.chunks[chunk].objects[choice];
    }

    EventLoop& loop_;
    Transport& transport_;
    const Wanted wanted_;
    SessionOptions options_;
    ChunkCodec& codec_;
    Sink& sink_;
    Controller controller_;
    std::mt19937_64 random_;

    std::unique_ptr<Locator> locator_;
    EventLoop::TimerId patience_ = 0;  // for the manifest
    EventLoop::TimerId tick_ = 0;
    Located located_;
    Status publication_;
    std::vector<ChunkReport> reports_;
    std::vector<std::size_t> hash_failed_;  // [chunk]: the choice at which it did last; kNoLevel: none
    std::list<std::unique_ptr<Transfer>> transfers_;
    std::vector<Held> held_;
    std::size_t network_failures_ = 0;
    bool ended_ = false;
    Summary summary_;

    std::atomic<bool> cancelled_ = false;
    std::mutex sink_mutex_;
    bool closed_ = false;  // guarded by sink_mutex_: no more calls on the loop's thread
    std::mutex done_mutex_;
    std::condition_variable done_condition_;
    bool done_ = false;  // guarded by done_mutex_
    Lane decode_lane_;
    CalibrationFetch calibration_;
    Lane compute_lane_;
};

// ---- transfers ----

Session::Impl::Transfer::Transfer(Impl& o, std::size_t chunk_, std::size_t choice_, DownloadRequest request)
    : owner(o), chunk(chunk_), choice(choice_), bytes(request.limit) {
    download = std::make_unique<Download>(owner.loop_, owner.transport_, std::move(request),
                                          owner.options_.download, *this, owner.random_());
}

void Session::Impl::Transfer::on_first_byte(Duration latency) {
    if (std::exchange(busy, true)) return;
    owner.carry_out(
        [&] { owner.controller_.take(Event::first_byte(owner.now(), chunk, to_seconds(latency))); });
}

void Session::Impl::Transfer::on_bytes(std::size_t count) {
    owner.carry_out([&] {
        const std::uint64_t received = std::min<std::uint64_t>(download->received(), bytes);
        owner.controller_.take(Event::bytes(owner.now(), chunk, count, received));
    });
}

void Session::Impl::Transfer::on_finished(Result<std::vector<std::uint8_t>> object, int http_status) {
    Impl& session = owner;  // which destroys this
    session.carry_out([&] { session.on_transfer(*this, std::move(object), http_status); });
}

// ---- the beginning ----

void Session::Impl::begin() {
    carry_out([this] { locate(); });
}

void Session::Impl::locate() {
    if (ended_) return;
    if (const Status s = check_wanted(wanted_); !s.ok()) return finish(s);
    const std::size_t present = wanted_.present_tokens, known = wanted_.token_ids.size();
    if (known != 0 && present == known) return all_present();
    const Seconds all = options_.compute.prefill_time(present, known - present) * kManifestMargin;
    if (!wanted_.token_ids.empty() && all < options_.deadline && options_.deadline < 1e9) {
        const Seconds left = std::max(options_.deadline - all - now(), 0.0);
        patience_ = loop_.after(from_seconds(left), [this] {
            locator_.reset();
            carry_out([this] { all_text({ErrorCode::kTimeout, "no manifest before recomputing was due"}); });
        });
    }
    const Locator::Environment environment = {loop_,
                                              transport_,
                                              options_.download,
                                              options_.trusted,
                                              options_.wall_clock ? options_.wall_clock() : system_seconds(),
                                              random_()};
    const auto heard = [this](Duration latency) {
        carry_out([&] {
            controller_.take(Event::request(now()));
            controller_.take(Event::first_byte(now(), kNoChunk, to_seconds(latency)));
            controller_.take(Event::end(now(), 0, 0));
        });
    };
    const auto done = [this, weak = weak_from_this()](Result<Located> located) {
        const auto self = weak.lock();
        if (self) carry_out([&] { on_located(std::move(located)); });
    };
    locator_ = std::make_unique<Locator>(environment, wanted_, heard, done);
}

void Session::Impl::on_located(Result<Located> located) {
    if (is_over()) return;
    loop_.cancel(patience_);
    locator_.reset();
    summary_.manifest_time = now();
    if (!located.ok()) return all_text(located.status());
    located_ = std::move(located.value());
    if (const Status s = check_present(); !s.ok()) return finish(s);
    if (const Status s = check_memory(located_, options_); !s.ok()) return all_text(s);
    make_chunks();
    tell([&] { sink_.on_manifest(located_.manifest, located_.chunks); });
    if (const auto& calibration = located_.manifest.calibration) {
        calibration_.begin(*calibration, join_url(located_.root, calibration_name(calibration->id)));
        if (expects_calibrated()) calibration_.want();
    }
    pump();
}

// What the caller did not know, it learns from the manifest.
Status Session::Impl::check_present() const {
    if (!wanted_.token_ids.empty() || wanted_.present_tokens <= located_.tokens) return {};
    return {ErrorCode::kBadArgument, fmt::format("{} tokens are present, the publication has {}",
                                                 wanted_.present_tokens, located_.tokens)};
}

// No manifest says more.
void Session::Impl::all_present() {
    with_text({}, wanted_.token_ids.size());
    pump();
}

// There is nothing to load: everything the caller wants and does not have is text.
void Session::Impl::all_text(const Status& why) {
    loop_.cancel(patience_);
    publication_ = why;
    if (wanted_.token_ids.empty()) return finish(why);
    located_.token_ids = wanted_.token_ids;
    with_text({}, wanted_.token_ids.size());
    pump();
}

void Session::Impl::make_chunks() {
    const Manifest& m = located_.manifest;
    with_text(offered_chunks(located_, options_), std::max(located_.tokens, wanted_.token_ids.size()));
    for (std::size_t i = 0; i < located_.chunks; ++i) {
        if (views()[i].status == ChunkStatus::kPresent) continue;
        for (const ManifestObject& o : m.chunks[i].objects) {
            if (const std::string why = refusal(m, o, options_); !why.empty())
                add_trouble(reports_[i], o.level, why);
        }
    }
}

// With the text, up to token `end`, everything has its report.
void Session::Impl::with_text(std::vector<ChunkView> chunks, std::size_t end) {
    add_text(chunks, end);
    mark_present(chunks, wanted_.present_tokens);
    reports_ = reports_of(chunks);
    hash_failed_.assign(chunks.size(), kNoLevel);
    controller_.begin(std::move(chunks), publication_.ok() ? located_.manifest.layout.token_bytes() : 0);
}

bool Session::Impl::is_calibrated(std::size_t chunk, std::size_t choice) const {
    return views()[chunk].levels[choice].calibrated;
}

bool Session::Impl::expects_calibrated() const {
    for (std::size_t c = 0; c < views().size(); ++c) {
        for (std::size_t l = 0; l < views()[c].levels.size(); ++l) {
            if (is_calibrated(c, l) && controller_.may_load(c, l)) return true;
        }
    }
    return false;
}

// ---- decisions ----

void Session::Impl::pump() {
    if (is_over()) return;
    give_up_late_calibration();
    controller_.take(Event::look(now()));
    calibration_.go_on();
    loop_.cancel(tick_);
    tick_ = loop_.after(kTick, [this] { carry_out([this] { pump(); }); });
    finish_when_complete();
}

// Chunks that wait for it come at another level, or become text while there is time.
void Session::Impl::give_up_late_calibration() {
    std::vector<std::size_t> waiting;
    for (const Held& h : held_) waiting.push_back(h.chunk);
    if (!controller_.waits_in_vain(waiting, now()) && !controller_.is_better_off_uncalibrated(now())) return;
    calibration_.give_up({ErrorCode::kTimeout, "would be there too late"});
}

void Session::Impl::decided(const DecisionRecord& record) {
    ChunkReport& report = reports_[record.decision.chunk];
    report.decided = record.time;
    report.reason = record.decision.reason;
    report.text = record.decision.kind == Decision::Kind::kText;
    tell([&] { sink_.on_decision(record); });
}

void Session::Impl::start(std::size_t chunk, std::size_t choice) {
    if (is_calibrated(chunk, choice)) calibration_.want();
    const ManifestObject& object = promised(chunk, choice);
    DownloadRequest request;
    request.url = join_url(located_.root, object_name(located_.manifest.chunks[chunk].chain, object));
    request.bytes = request.limit = object.bytes;
    request.storage = options_.memory->take(object.bytes);
    transfers_.push_back(std::make_unique<Transfer>(*this, chunk, choice, std::move(request)));
}

void Session::Impl::stop(std::size_t chunk) {
    std::erase_if(transfers_, [&](const auto& t) { return t->chunk == chunk; });
}

// ---- what came ----

void Session::Impl::on_transfer(Transfer& ended, Result<std::vector<std::uint8_t>> object, int http_status) {
    const auto it = std::ranges::find_if(transfers_, [&](const auto& t) { return t.get() == &ended; });
    const std::unique_ptr<Transfer> transfer = std::move(*it);  // lives to the end of this function
    transfers_.erase(it);
    ChunkReport& report = reports_[transfer->chunk];
    report.requests += transfer->download->requests();
    if (object.ok()) {
        network_failures_ = 0;
        controller_.take(Event::arrived(now(), transfer->chunk));
        report.received = now();
        decode(transfer->chunk, std::move(object.value()));
    } else {
        on_chunk_failed(transfer->chunk, transfer->choice, object.status(), http_status);
    }
    pump();
}

void Session::Impl::note_failure(std::size_t chunk, std::size_t choice, const Status& status) {
    controller_.take(Event::failed(now(), chunk));
    add_trouble(reports_[chunk], views()[chunk].levels[choice].level, status.message());
}

void Session::Impl::on_chunk_failed(std::size_t chunk, std::size_t choice, const Status& status,
                                    int http_status) {
    note_failure(chunk, choice, status);
    if (!is_of_the_network(status, http_status)) {
        exclude(chunk, choice);
    } else if (++network_failures_ >= kFailuresOfTheStore) {
        for (std::size_t i = 0; i < views().size(); ++i) exclude_all(i);
    } else {
        exclude_all(chunk);
    }
}

void Session::Impl::exclude(std::size_t chunk, std::size_t choice) {
    controller_.take(Event::exclude(now(), chunk, choice));
}

void Session::Impl::exclude_all(std::size_t chunk) {
    if (views()[chunk].status != ChunkStatus::kPending) return;
    for (std::size_t i = 0; i < views()[chunk].levels.size(); ++i) exclude(chunk, i);
}

// Chunks that waited are decoded, or have to come at another level.
void Session::Impl::on_calibration(const Status& status) {
    std::vector<Held> held;
    held.swap(held_);
    if (status.ok()) {
        for (Held& h : held) decode(h.chunk, std::move(h.object));
        return;
    }
    const Status why = {status.code(), "calibration: " + status.message()};
    rule_out_calibrated(why);
    // Nothing is wrong with the chunks, or with the store: they come at levels that need no calibration.
    for (Held& h : held) {
        options_.memory->give(std::move(h.object));
        note_failure(h.chunk, views()[h.chunk].choice, why);
    }
}

void Session::Impl::rule_out_calibrated(const Status& why) {
    for (std::size_t c = 0; c < views().size(); ++c) {
        for (std::size_t l = 0; l < views()[c].levels.size(); ++l) {
            if (is_calibrated(c, l)) exclude(c, l);
        }
        if (views()[c].status == ChunkStatus::kLoading && is_calibrated(c, views()[c].choice)) {
            stop(c);
            note_failure(c, views()[c].choice, why);
        }
    }
}

void Session::Impl::decode(std::size_t chunk, std::vector<std::uint8_t> object) {
    const ManifestObject& promise = promised(chunk, views()[chunk].choice);
    if (!calibration_.is_settled() && is_calibrated(chunk, views()[chunk].choice)) {
        held_.push_back({chunk, std::move(object)});
        return;
    }
    run(decode_lane_, [this, chunk, &promise, object = std::move(object)]() mutable {
        const Status status = decode_on_lane(chunk, promise, object);
        post([this, chunk, object = std::move(object), status]() mutable {
            on_decoded(chunk, std::move(object), status);
            pump();
        });
    });
}

Status Session::Impl::decode_on_lane(std::size_t chunk, const ManifestObject& promise,
                                     std::span<const std::uint8_t> object) {
    if (cancelled_) return {ErrorCode::kCancelled, "cancelled"};
    Status status = verify_object(object, located_.manifest, chunk, promise);
    if (!status.ok()) return status;
    const TokenRange tokens = reports_[chunk].tokens;
    bool handed_over = false;
    try {
        return codec_.decode(object, [&](std::size_t layer, std::span<const DecodedPlane> planes) {
            handed_over = true;
            if (!cancelled_) sink_.on_layer(chunk, tokens, layer, planes);
        });
    } catch (...) {
        // A sink never gets the first layers of a chunk twice.
        if (handed_over) throw;
        const Status why = status_of_exception();
        return {why.code(), "decoding: " + why.message()};
    }
}

void Session::Impl::on_decoded(std::size_t chunk, std::vector<std::uint8_t> object, const Status& status) {
    if (is_over()) return;
    options_.memory->give(std::move(object));
    const std::size_t choice = views()[chunk].choice;
    if (status.ok()) {
        controller_.take(Event::ready(now(), chunk));
        ChunkReport& report = reports_[chunk];
        const ManifestObject& promise = promised(chunk, choice);
        report.level = promise.level;
        report.bytes = promise.bytes;
        report.kl = level_of(located_.manifest, promise.level).kl.value_or(-1);
        report.ready = now();
        return;
    }
    // Bytes may have been hurt on their way: once more, then another level.
    const bool again = status.code() == ErrorCode::kObjectMismatch && hash_failed_[chunk] != choice;
    const bool usable = views()[chunk].levels[choice].usable;
    on_chunk_failed(chunk, choice, status, 0);
    if (again && usable) controller_.take(Event::include(now(), chunk, choice));
    hash_failed_[chunk] = choice;
}

// ---- text ----

void Session::Impl::recompute(std::size_t first, std::size_t end) {
    const TokenRange tokens = {views()[first].first_token + views()[first].present,
                               views()[end - 1].first_token + views()[end - 1].tokens};
    run(compute_lane_, [this, first, end, tokens] {
        const std::span<const std::int32_t> known = located_.token_ids;
        const auto ids = tokens.end <= known.size() ? known.subspan(tokens.first, tokens.end - tokens.first)
                                                    : std::span<const std::int32_t>();
        if (!cancelled_) sink_.on_recompute(tokens, ids);
        post([this, first, end] { on_recomputed(first, end); });
    });
}

void Session::Impl::on_recomputed(std::size_t first, std::size_t end) {
    if (is_over()) return;
    controller_.take(Event::recomputed(now()));
    for (std::size_t i = first; i < end; ++i) reports_[i].ready = now();
    pump();
}

// ---- the end ----

void Session::Impl::finish_when_complete() {
    if (controller_.complete() && !ended_) finish({});
}

void Session::Impl::finish(const Status& status) {
    if (ended_) return;
    ended_ = true;
    loop_.cancel(tick_);
    loop_.cancel(patience_);
    locator_.reset();
    try {
        calibration_.drop();
        transfers_.clear();
        held_.clear();
        summarise(status);
        tell([&] { sink_.on_finish(summary_); });
    } catch (...) {
        calibration_.clear();
        transfers_.clear();
        summary_.status = status_of_exception();
    }
    {
        const std::scoped_lock lock(done_mutex_);
        done_ = true;
    }
    done_condition_.notify_all();
}

void Session::Impl::summarise(const Status& status) {
    summary_.status = status;
    summary_.publication = publication_;
    summary_.time = now();
    summary_.network_bytes = controller_.network().bytes();
    summary_.network = controller_.network().experience(now());
    summary_.network_measured = controller_.network().measured(now());
    summary_.recording = controller_.recording();
    add_up(reports_, summary_);
    summary_.chunks = reports_;
}

// Ends the session early, from any thread. Once tasks that the lanes have begun are over, on_finish() is the
// last callback.
void Session::Impl::abandon(Status why) {
    if (cancelled_.exchange(true)) return;
    try {
        run(decode_lane_, [this, why = std::move(why)] {
            run(compute_lane_, [this, why] { post([this, why] { finish(why); }); });
        });
    } catch (...) {
        cancelled_ = false;
        throw;
    }
}

void Session::Impl::close() {
    cancelled_ = true;
    decode_lane_.stop();
    calibration_.finish();
    compute_lane_.stop();
    {
        const std::scoped_lock lock(sink_mutex_);
        closed_ = true;
    }
    post([this] { finish({ErrorCode::kCancelled, "the session was destroyed"}); });
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
    impl_->abandon({ErrorCode::kCancelled, "the session was cancelled"});
}

Summary Session::wait() {
    return impl_->wait();
}

bool Session::wait_for(Duration patience) {
    return impl_->wait_for(patience);
}

}  // namespace kvcast::streamer
