// A .kvc file: chunk objects one after another.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "codec/format/chunk_header.h"

namespace kvcast::tools {

struct ChunkInFile {
    std::uint64_t offset = 0;  // bytes from the start of the file
    std::uint64_t bytes = 0;   // header and blocks
    ChunkHeader header;        // without token ids: a few bytes may stand for 65535 of them
};

// Reads all headers and checks that the objects are whole and follow each other. Throws DamagedInput.
std::vector<ChunkInFile> list_chunks(std::span<const std::uint8_t> bytes, const std::string& name);

}  // namespace kvcast::tools
