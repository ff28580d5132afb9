// Base64 (RFC 4648, with padding) and UTF-8 (RFC 3629).
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace kvcast::streamer {

std::string base64_encode(std::span<const std::uint8_t> bytes);

// Nothing where the text is not canonical base64.
std::optional<std::vector<std::uint8_t>> base64_decode(std::string_view text);

// Well-formed: nothing longer than it needs to be, no surrogates.
bool is_utf8(std::string_view text);

}  // namespace kvcast::streamer
