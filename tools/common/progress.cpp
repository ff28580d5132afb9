#include "tools/common/progress.h"

#include <fmt/format.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <utility>

namespace kvcast::tools {
namespace {

constexpr std::chrono::milliseconds kRedrawInterval{100};
constexpr std::size_t kDefaultColumns = 80;
constexpr const char* kClearLine = "\r\033[K";

std::size_t terminal_columns() {
    struct winsize size = {};
    if (::ioctl(STDERR_FILENO, TIOCGWINSZ, &size) != 0 || size.ws_col == 0) return kDefaultColumns;
    return size.ws_col;
}

// Three significant digits and a decimal prefix: "12.3 M". From 999.5 on, three digits would round to
// "1e+03".
std::string scaled(double value) {
    constexpr std::array<const char*, 5> kPrefixes = {"", "k", "M", "G", "T"};
    std::size_t prefix = 0;
    while (value >= 999.5 && prefix + 1 < kPrefixes.size()) {
        value /= 1000;
        ++prefix;
    }
    return fmt::format("{:.3g} {}", value, kPrefixes[prefix]);
}

}  // namespace

Progress::Progress(std::string label, std::uint64_t total_units, std::string unit)
    : label_(std::move(label)),
      unit_(std::move(unit)),
      total_(total_units),
      enabled_(::isatty(STDERR_FILENO) == 1),
      start_(std::chrono::steady_clock::now()),
      next_draw_(start_ + kRedrawInterval) {}

Progress::~Progress() {
    if (enabled_) std::fputs(kClearLine, stderr);
}

void Progress::advance(std::uint64_t units) {
    done_ += units;
    if (!enabled_) return;
    const auto now = std::chrono::steady_clock::now();
    if (now < next_draw_) return;
    next_draw_ = now + kRedrawInterval;
    draw();
}

void Progress::draw() {
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start_;
    const double done = static_cast<double>(done_);
    std::string line = label_;
    if (total_ > 0) {
        line += fmt::format(" {:3.0f}%", std::min(100.0, 100.0 * done / static_cast<double>(total_)));
    }
    line += fmt::format("  {}{}", scaled(done), unit_);
    if (elapsed.count() > 0) line += fmt::format("  {}{}/s", scaled(done / elapsed.count()), unit_);
    // A line that wraps could not be cleared. Not fmt::print(): it throws where the terminal has gone away.
    line.resize(std::min(line.size(), terminal_columns() - 1));
    std::fputs((kClearLine + line).c_str(), stderr);
    std::fflush(stderr);
}

}  // namespace kvcast::tools
