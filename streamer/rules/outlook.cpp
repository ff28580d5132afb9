#include "streamer/rules/outlook.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

namespace kvcast::streamer {
namespace {

constexpr std::size_t kAlwaysInFlight = 2;
constexpr Seconds kNextLook = 0.02;   // until a rule is asked again at the latest
constexpr Seconds kTextAhead = 0.03;  // text is begun this much before the last moment for it
constexpr double kTextAdvantage = 0.5;

}  // namespace

Outlook::Outlook(const RuleState& state)
    : s_(state), left_(state.deadline - state.now), first_pending_(state.chunks.size()) {
    bytes_to_come_ = static_cast<double>(s_.other_bytes);
    for (std::size_t i = 0; i < s_.chunks.size(); ++i) {
        const ChunkView& c = s_.chunks[i];
        if (c.status == ChunkStatus::kPending) {
            if (pending_++ == 0) first_pending_ = i;
            last_pending_ = i;
        } else if (c.status == ChunkStatus::kLoading) {
            const double to_come = bytes_to_come(c);
            next_bytes_ = in_flight_++ == 0 ? to_come : std::min(next_bytes_, to_come);
            bytes_to_come_ += to_come;
            bytes_come_ |= c.received > 0;
            tokens_to_come_ += c.tokens;
        } else if (c.status == ChunkStatus::kDecoding) {
            decoding_tokens_ += c.tokens;
        } else {
            continue;
        }
        chunk_tokens_ = std::max(chunk_tokens_, c.tokens);
    }
}

Seconds Outlook::load_time(const Load& pending, double rate) const {
    rate = std::max(rate, 1.0);
    const std::size_t to_come = pending.tokens + tokens_to_come_;
    const Seconds decode_all = s_.compute->decode_time(to_come + decoding_tokens_);
    const Seconds calibrated = s_.other_bytes == 0 ? 0 : static_cast<double>(s_.other_bytes) / rate;
    if (to_come == 0) return calibrated + decode_all;
    const Seconds decode_last = s_.compute->decode_time(std::min(chunk_tokens_, to_come));
    const Seconds wait = !bytes_come_ || s_.network.silence > 0 ? s_.network.first_byte : 0;
    const Seconds network = wait + (bytes_to_come_ + pending.bytes) / rate;
    // Transfers in flight share the link.
    const double next = in_flight_ > 0 ? next_bytes_ * static_cast<double>(in_flight_) : pending.next_bytes;
    const Seconds idle = decoding_tokens_ > 0 ? 0 : wait + next / rate;
    return std::max(network + decode_last, std::max(idle, calibrated) + decode_all);
}

bool Outlook::wants_transfer() const {
    if (s_.transfers >= s_.most_transfers) return false;
    return s_.transfers < kAlwaysInFlight ||
           bytes_to_come_ <= s_.network.robust * (s_.network.first_byte + kNextLook);
}

LevelLoads loads_from(const RuleState& state, std::size_t first) {
    LevelLoads loads;
    for (std::size_t i = state.chunks.size(); i-- > first && loads.count == 0;) {
        if (state.chunks[i].status != ChunkStatus::kPending) continue;
        for (const LevelView& l : state.chunks[i].levels) {
            if (l.usable && loads.count < LevelLoads::kMost) loads.level[loads.count++] = l.level;
        }
    }
    std::fill_n(loads.bytes.begin(), loads.count, 0.0);
    for (std::size_t c = first; c < state.chunks.size(); ++c) {
        const ChunkView& chunk = state.chunks[c];
        if (chunk.status != ChunkStatus::kPending) continue;
        loads.tokens += chunk.tokens;
        for (std::size_t j = 0; j < loads.count; ++j) loads.bytes[j] += bytes_at(chunk, loads.level[j], j);
    }
    return loads;
}

Seconds text_time(const RuleState& state) {
    Seconds time = state.compute_busy;
    for (const ChunkView& c : state.chunks) {
        if (is_missing(c)) time += state.compute->prefill_time(c);
    }
    return time;
}

bool text_is_due(Seconds load, Seconds text, Seconds left, double margin) {
    if (load <= left) return false;
    if (text <= left) return text + kTextAhead >= margin * left || load > kHope * left;
    return text < kTextAdvantage * load;
}

std::string what_is_left(Seconds left) {
    return std::isinf(left) ? "no deadline" : fmt::format("{:.0f} ms are left", left * 1e3);
}

}  // namespace kvcast::streamer
