#include "streamer/reports.h"

#include <fmt/format.h>

#include <utility>

namespace kvcast::streamer {

std::vector<ChunkReport> reports_of(std::span<const ChunkView> chunks) {
    std::vector<ChunkReport> reports;
    for (const ChunkView& c : chunks) {
        ChunkReport report;
        report.tokens = {c.first_token, c.first_token + c.tokens};
        report.text = c.status == ChunkStatus::kText;
        report.kl = -1;
        report.present = c.present;
        if (report.text) report.reason = "not in the store";
        if (c.status == ChunkStatus::kPresent) report.reason = "present";
        reports.push_back(std::move(report));
    }
    return reports;
}

void add_trouble(ChunkReport& report, unsigned level, const std::string& what) {
    report.trouble += fmt::format("{}level {}: {}", report.trouble.empty() ? "" : "; ", level, what);
}

void add_up(const std::vector<ChunkReport>& reports, Summary& summary) {
    double kl = 0;
    bool known = true;
    std::size_t loaded = 0;
    for (const ChunkReport& r : reports) {
        const std::size_t tokens = r.tokens.end - r.tokens.first;
        summary.tokens += tokens;
        if (r.text) summary.text_tokens += tokens - r.present;
        if (r.text || r.present == tokens) continue;
        loaded += tokens;
        kl += r.kl * static_cast<double>(tokens);
        known &= r.kl >= 0;
    }
    if (loaded > 0) summary.kl = known ? kl / static_cast<double>(loaded) : -1;
}

}  // namespace kvcast::streamer
