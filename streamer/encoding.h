// Base64 (RFC 4648, with padding).
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

}  // namespace kvcast::streamer
