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
        if (report.text) report.reason = "not in the store";
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
    for (const ChunkReport& r : reports) {
        const std::size_t tokens = r.tokens.end - r.tokens.first;
        summary.tokens += tokens;
        if (r.text) summary.text_tokens += tokens;
        if (!r.text) kl += r.kl * static_cast<double>(tokens);
        known &= r.text || r.kl >= 0;
    }
    if (summary.tokens > summary.text_tokens)
        summary.kl = known ? kl / static_cast<double>(summary.tokens - summary.text_tokens) : -1;
}

}  // namespace kvcast::streamer
