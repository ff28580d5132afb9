#include "bench/adaptation/trace.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>

#include "tools/common/file.h"

namespace kvcast::bench {

Trace Trace::load(const std::string& path, double scale) {
    std::ifstream in(path);
    if (!in) throw tools::Error(fmt::format("{}: cannot open it", path));
    std::vector<Sample> samples;
    Seconds time = 0;
    double mbit = 0;
    while (in >> time >> mbit) {
        const bool ascending = samples.empty() ? time >= 0 : time > samples.back().time;
        if (!ascending || !(mbit >= 0) || !std::isfinite(mbit))
            throw tools::Error(fmt::format("{}: sample {} is not in order", path, samples.size() + 1));
        samples.push_back({time, mbit * scale * 1e6 / 8});
    }
    if (samples.size() < 2 || !in.eof())
        throw tools::Error(fmt::format("{}: not lines of seconds and Mbit/s", path));
    samples.front().time = 0;
    // The last sample lasts as long as the average one.
    const Seconds length =
        samples.back().time * static_cast<double>(samples.size()) / static_cast<double>(samples.size() - 1);
    return Trace(std::filesystem::path(path).filename().string(), std::move(samples), length);
}

Trace::Trace(std::string name, std::vector<Sample> samples, Seconds length)
    : name_(std::move(name)), samples_(std::move(samples)), length_(length) {
    for (std::size_t i = 0; i < samples_.size(); ++i) {
        before_.push_back(total_);
        const Seconds end = i + 1 < samples_.size() ? samples_[i + 1].time : length_;
        total_ += samples_[i].bytes_per_second * (end - samples_[i].time);
    }
}

std::size_t Trace::index(Seconds within) const {
    const auto after = std::ranges::upper_bound(samples_, within, {}, &Sample::time);
    return static_cast<std::size_t>(after - samples_.begin()) - 1;
}

double Trace::rate(Seconds at) const {
    return samples_[index(std::fmod(at, length_))].bytes_per_second;
}

Seconds Trace::next_change(Seconds at) const {
    const double rounds = std::floor(at / length_);
    const Seconds within = at - rounds * length_;
    const std::size_t i = index(within) + 1;
    const Seconds next = rounds * length_ + (i < samples_.size() ? samples_[i].time : length_);
    return next > at ? next : std::nextafter(at, at + 1) + 1e-9;
}

double Trace::up_to(Seconds at) const {
    const double rounds = std::floor(at / length_);
    const Seconds within = at - rounds * length_;
    const std::size_t i = index(within);
    return rounds * total_ + before_[i] + samples_[i].bytes_per_second * (within - samples_[i].time);
}

double Trace::bytes(Seconds from, Seconds to) const {
    return up_to(to) - up_to(from);
}

Seconds Trace::when(Seconds from, double bytes) const {
    Seconds at = from;
    while (bytes > 0) {
        const Seconds next = next_change(at);
        const double here = rate(at) * (next - at);
        if (here >= bytes) return at + bytes / rate(at);
        bytes -= here;
        at = next;
    }
    return at;
}

}  // namespace kvcast::bench
