// The identity of chunks: a hash chain over what a chunk's KV was computed from.
//
//   chain = SHA-256(parent | salt | layout hash | model id | token ids)
//
// Chunks of contexts that share a prefix share its identities (prefix caching), equal content has one name
// (dedupe), and a secret salt keeps tenants apart. FORMAT.md, section 4. Thread-safe.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "codec/format/layout.h"

namespace kvcast {

Hash sha256(std::span<const std::uint8_t> bytes);

// SHA-256 of the layout as the chunk header stores it.
Hash layout_hash(const Layout& layout);

// `parent` is all zero for the first chunk of a context.
Hash chain_hash(const Hash& parent, std::string_view salt, const Hash& layout, std::string_view model,
                std::span<const std::int32_t> token_ids);

// Lower-case hexadecimal.
std::string to_hex(std::span<const std::uint8_t> bytes);

// The inverse, for 64 digits; nothing where the text is anything else.
std::optional<Hash> hash_from_hex(std::string_view text);

}  // namespace kvcast
