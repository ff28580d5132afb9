#include "streamer/throughput.h"

#include <algorithm>
#include <cmath>

namespace kvcast::streamer {
namespace {

constexpr Seconds kSliceTime = 0.02;
constexpr Seconds kLongSlice = 0.25;   // a stretch ends after this time, however little came
constexpr double kSliceBytes = 65536;  // shorter stretches say more about buffers than about the link
constexpr double kForget = 0.8;        // weight of a slice relative to the next newer one
constexpr double kSmoothing = 0.3;     // of latency and error
constexpr double kUsualWait = 2;       // times the usual latency, before silence counts as one
constexpr double kLeastDoubt = 0.5;    // of what a session leaves to the next one: time passes between them

}  // namespace

// Busy time passes from the last change on.
void Throughput::on_request(Seconds now) {
    if (in_flight_++ == 0) last_byte_ = now;
}

void Throughput::on_first_byte(Seconds now, Seconds latency) {
    if (busy_++ == 0) last_change_ = now;
    first_byte_ = first_byte_ == 0 ? latency : first_byte_ + kSmoothing * (latency - first_byte_);
    last_byte_ = now;
}

void Throughput::on_bytes(Seconds now, std::uint64_t bytes) {
    bytes_ += bytes;
    last_byte_ = now;
    if (busy_ == 0) return;
    open_.bytes += static_cast<double>(bytes);
    open_.time += now - last_change_;
    last_change_ = now;
    if ((open_.time >= kSliceTime && open_.bytes >= kSliceBytes) || open_.time >= kLongSlice) close_slice();
}

void Throughput::on_end(Seconds now, std::uint64_t bytes, Seconds seconds, bool had_first_byte) {
    if (had_first_byte && busy_ > 0) {
        open_.time += now - last_change_;
        last_change_ = now;
        --busy_;
    } else if (busy_ == 0 && silent(now)) {
        open_.time += now - last_byte_;  // given up in silence: that is evidence too
    }
    if (silent(now)) last_byte_ = now;  // it is in the slice
    if (in_flight_ > 0) --in_flight_;
    if ((open_.time > 0 && open_.bytes >= kSliceBytes) || open_.time >= kLongSlice) close_slice();
    if (bytes > 0 && seconds > 0) last_transfer_ = static_cast<double>(bytes) / seconds;
}

// Whether a byte is awaited for longer than usual.
bool Throughput::silent(Seconds now) const {
    return in_flight_ > 0 && now - last_byte_ > kUsualWait * first_byte();
}

Seconds Throughput::first_byte() const {
    return first_byte_ > 0 ? first_byte_ : prior_.first_byte;
}

void Throughput::close_slice() {
    const Slice closed = open_;
    open_ = {};
    if (count_ > 0) {
        const Slice before = recent();
        const double rate = std::max(closed.bytes / closed.time, 1.0);
        const double wrong = std::min(std::abs(before.bytes / before.time - rate) / rate, 1.0);
        error_ += kSmoothing * (wrong - error_);
        std::shift_right(errors_.begin(), errors_.end(), 1);
        errors_[0] = wrong;
    }
    std::shift_right(slices_.begin(), slices_.end(), 1);
    slices_[0] = closed;
    count_ = std::min(count_ + 1, kSlices);
}

// The harmonic mean of the slices' rates, weighted by their bytes and their age: bytes over time. A stretch
// that has been open for long enough to say something counts too; the prior counts until there is either.
Throughput::Slice Throughput::recent() const {
    Slice sum;
    double weight = 1;
    const auto add = [&](const Slice& s) {
        sum.bytes += weight * s.bytes;
        sum.time += weight * s.time;
        weight *= kForget;
    };
    if (open_.time >= kSliceTime) add(open_);
    for (std::size_t i = 0; i < count_; ++i) add(slices_[i]);
    if (sum.time == 0) add({prior_.bytes_per_second * kSliceTime, kSliceTime});
    return sum;
}

ThroughputEstimate Throughput::estimate(Seconds now) const {
    ThroughputEstimate e;
    e.measured = count_ > 0;
    e.first_byte = first_byte();
    if (silent(now)) e.silence = now - last_byte_;
    // Silence is time in which nothing came: it dilutes what was seen before.
    const Slice seen = recent();
    e.mean = seen.bytes / (seen.time + e.silence);
    e.robust = e.mean / (1 + (e.measured ? error_ : prior_.doubt));
    e.cautious = e.mean / (1 + (e.measured ? std::ranges::max(errors_) : prior_.doubt));
    e.last = last_transfer_ > 0 ? last_transfer_ : prior_.bytes_per_second;
    return e;
}

NetworkPrior Throughput::experience(Seconds now) const {
    const ThroughputEstimate e = estimate(now);
    if (!e.measured) return prior_;
    return {e.mean, e.first_byte, std::max(error_, kLeastDoubt)};
}

}  // namespace kvcast::streamer
