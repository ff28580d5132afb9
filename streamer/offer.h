// What a publication offers a session: its chunks, and the levels that the session's options let it load.
#pragma once

#include <string>
#include <vector>

#include "streamer/session.h"

namespace kvcast::streamer {

// Of the manifest, which has it.
const ManifestLevel& level_of(const Manifest& manifest, unsigned level);

// kLimitExceeded where its chunks, decoded, take more memory than the session may use.
Status check_memory(const Located& located, const SessionOptions& options);

// Why a level is not loaded, whatever the network could bring; empty: it may be.
std::string refusal(const Manifest& manifest, const ManifestObject& object, const SessionOptions& options);

// Its chunks, all pending.
std::vector<ChunkView> offered_chunks(const Located& located, const SessionOptions& options);

// What no chunk covers, up to token `end`, is one more, which is text from the start.
void add_text(std::vector<ChunkView>& chunks, std::size_t end);

// The caller has the KV of so many leading tokens. Chunks within them have nothing to be loaded.
void mark_present(std::vector<ChunkView>& chunks, std::size_t tokens);

}  // namespace kvcast::streamer
