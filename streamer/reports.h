// What a session tells of its chunks.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "streamer/session.h"

namespace kvcast::streamer {

// Before anything is decided.
std::vector<ChunkReport> reports_of(std::span<const ChunkView> chunks);

// One more reason why a choice failed.
void add_trouble(ChunkReport& report, unsigned level, const std::string& what);

// Tokens and expected loss of all chunks, at the session's end.
void add_up(const std::vector<ChunkReport>& reports, Summary& summary);

}  // namespace kvcast::streamer
