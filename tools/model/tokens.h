// Token ids in files: a JSON array, a JSON object of named arrays, or raw little-endian int32.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace kvcast::model {

using TokenIds = std::vector<std::int32_t>;

enum class TokenFileKind : std::uint8_t { kJson, kRaw };

// Reads one sequence. `name` chooses it from an object, and may be empty where there is only one. "-" reads
// standard input. Throws tools::Error: anything but integers from 0 to 2^31 - 1, a name that is not there, no
// tokens.
TokenIds read_tokens(const std::string& path, const std::string& name,
                     TokenFileKind kind = TokenFileKind::kJson);

// Reads all sequences of a JSON object of named arrays. Throws tools::Error.
std::map<std::string, TokenIds> read_token_sets(const std::string& path);

}  // namespace kvcast::model
