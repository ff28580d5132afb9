#include "streamer/calibration_fetch.h"

#include <algorithm>
#include <utility>

#include "codec/format/chain.h"

namespace kvcast::streamer {

void CalibrationFetch::begin(const ManifestCalibration& calibration, std::string url) {
    calibration_ = calibration;
    url_ = std::move(url);
    state_ = State::kUnneeded;
}

void CalibrationFetch::want() {
    if (state_ == State::kUnneeded) state_ = State::kWanted;
}

void CalibrationFetch::go_on() {
    if (state_ == State::kWanted) ask();
    // One that nobody waits for comes as long as nothing else does.
    if (is_settled() && controller_.loading()) drop();
}

void CalibrationFetch::give_up(const Status& why) {
    controller_.take(Event::other(steps_.now(), 0));
    settle(why);
}

void CalibrationFetch::drop() {
    if (!transfer_) return;
    const Seconds now = steps_.now();
    controller_.take(Event::end(now, transfer_->came, now - transfer_->started));
    keep_begun(*transfer_);
    transfer_.reset();
}

// The codec may have to read it from somewhere, which takes its time. Chunks come meanwhile.
void CalibrationFetch::ask() {
    state_ = State::kAsked;
    steps_.run(lane_, [this] {
        if (steps_.is_cancelled()) return;
        const bool there = codec_.has_calibration(calibration_.id);
        auto front = there ? std::vector<std::uint8_t>() : codec_.begun_calibration(calibration_.id);
        steps_.post([this, there, front = std::move(front)]() mutable {
            if (steps_.is_over()) return;
            there ? settle({}) : fetch(std::move(front));
            owner_.pump();
        });
    });
}

void CalibrationFetch::fetch(std::vector<std::uint8_t> front) {
    if (front.size() == calibration_.bytes) return on_file(std::move(front), true);
    if (front.size() > calibration_.bytes) front.clear();
    DownloadRequest request;
    request.url = url_;
    request.bytes = request.limit = calibration_.bytes;
    request.front = std::move(front);
    const std::uint64_t begun = request.front.size();
    controller_.take(Event::request(steps_.now()));
    controller_.take(Event::other(steps_.now(), calibration_.bytes - begun));
    Transfer transfer;
    transfer.begun = begun;
    transfer.started = steps_.now();
    transfer.download =
        std::make_unique<Download>(loop_, transport_, std::move(request), download_, *this, random_());
    transfer_ = std::move(transfer);
}

// It may take its time.
void CalibrationFetch::keep_begun(const Transfer& transfer) {
    std::vector<std::uint8_t> front = transfer.download->release();
    if (front.size() <= transfer.begun) return;
    steps_.run(lane_, [this, front = std::move(front)] { codec_.keep_begun(calibration_.id, front); });
}

void CalibrationFetch::on_first_byte(Duration latency) {
    if (std::exchange(transfer_->busy, true)) return;
    steps_.carry_out(
        [&] { controller_.take(Event::first_byte(steps_.now(), kNoChunk, to_seconds(latency))); });
}

void CalibrationFetch::on_bytes(std::size_t count) {
    transfer_->came += count;
    steps_.carry_out([&] {
        const std::uint64_t received = std::min(transfer_->download->received(), calibration_.bytes);
        controller_.take(Event::bytes(steps_.now(), kNoChunk, count, received));
        if (state_ == State::kAsked)
            controller_.take(Event::other(steps_.now(), calibration_.bytes - received));
    });
}

void CalibrationFetch::on_finished(Result<std::vector<std::uint8_t>> object, int) {
    steps_.carry_out([&] {
        const Transfer ended = std::move(*transfer_);  // lives to the end of this function
        transfer_.reset();
        const Seconds now = steps_.now();
        controller_.take(Event::end(now, object.ok() ? ended.came : 0, now - ended.started));
        controller_.take(Event::other(now, 0));
        if (object.ok()) return on_file(std::move(object.value()), ended.begun > 0);
        keep_begun(ended);
        settle(object.status());
        owner_.pump();
    });
}

void CalibrationFetch::on_file(std::vector<std::uint8_t> file, bool resumed) {
    steps_.run(lane_, [this, file = std::move(file), resumed] {
        const bool sound = sha256(file) == calibration_.id;
        Status status = {ErrorCode::kObjectMismatch, "the calibration's bytes do not hash to its name"};
        if (sound) status = add_on_lane(file);
        // Whose fault it is, the kept bytes' or the new ones', cannot be told: all of it anew.
        const bool again = !sound && resumed;
        if (again) codec_.keep_begun(calibration_.id, {});
        steps_.post([this, status, again] {
            if (steps_.is_over()) return;
            if (again && state_ == State::kAsked) {
                fetch({});
            } else {
                settle(status);
            }
            owner_.pump();
        });
    });
}

// One that the codec cannot take rules out the levels that need it, like one that does not come.
Status CalibrationFetch::add_on_lane(std::span<const std::uint8_t> file) {
    try {
        return codec_.add_calibration(file);
    } catch (...) {
        return status_of_exception();
    }
}

void CalibrationFetch::settle(const Status& status) {
    if (is_settled()) return;  // it came after all, for the next session
    state_ = State::kSettled;
    owner_.on_calibration(status);
}

}  // namespace kvcast::streamer
