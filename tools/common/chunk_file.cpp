#include "tools/common/chunk_file.h"

#include <fmt/format.h>

#include <utility>

#include "codec/decoder.h"
#include "tools/common/damage.h"

namespace kvcast::tools {

std::vector<ChunkInFile> list_chunks(std::span<const std::uint8_t> bytes, const std::string& name) {
    std::vector<ChunkInFile> chunks;
    std::uint64_t at = 0;
    do {
        Result<ChunkHeader> header = read_header(bytes.subspan(at));
        if (!header.ok()) raise(name, at, header.status());
        const std::uint64_t length = header.value().header_bytes + header.value().payload_bytes();
        if (length > bytes.size() - at) {
            raise(name, at,
                  {ErrorCode::kTruncated,
                   fmt::format("the chunk has {} bytes, {} are there", length, bytes.size() - at)});
        }
        if (!chunks.empty()) {
            const Status follows = check_consecutive(chunks.back().header, header.value());
            if (!follows.ok()) raise(name, at, follows);
        }
        chunks.push_back({at, length, std::move(header.value())});
        std::exchange(chunks.back().header.token_ids, {});
        at += length;
    } while (at < bytes.size());
    return chunks;
}

}  // namespace kvcast::tools
