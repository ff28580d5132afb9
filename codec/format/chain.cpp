#include "codec/format/chain.h"

#include <openssl/sha.h>

namespace kvcast {
namespace {

void append_counted(std::vector<std::uint8_t>& bytes, std::string_view text) {
    ByteWriter out(bytes);
    out.fixed(static_cast<std::uint32_t>(text.size()));
    out.bytes({reinterpret_cast<const std::uint8_t*>(text.data()), text.size()});
}

}  // namespace

Hash sha256(std::span<const std::uint8_t> bytes) {
    Hash out;
    SHA256(bytes.data(), bytes.size(), out.data());
    return out;
}

Hash layout_hash(const Layout& layout) {
    std::vector<std::uint8_t> bytes;
    ByteWriter out(bytes);
    write_layout(layout, out);
    return sha256(bytes);
}

Hash chain_hash(const Hash& parent, std::string_view salt, const Hash& layout, std::string_view model,
                std::span<const std::int32_t> token_ids) {
    std::vector<std::uint8_t> bytes;
    ByteWriter out(bytes);
    out.bytes(parent);
    append_counted(bytes, salt);
    out.bytes(layout);
    append_counted(bytes, model);
    out.fixed(static_cast<std::uint32_t>(token_ids.size()));
    for (const std::int32_t id : token_ids) out.fixed(id);
    return sha256(bytes);
}

std::string to_hex(std::span<const std::uint8_t> bytes) {
    constexpr char digits[] = "0123456789abcdef";
    std::string text;
    for (const std::uint8_t b : bytes) {
        text += digits[b >> 4];
        text += digits[b & 15];
    }
    return text;
}

std::optional<Hash> hash_from_hex(std::string_view text) {
    Hash out = {};
    if (text.size() != 2 * out.size()) return std::nullopt;
    for (std::size_t i = 0; i < text.size(); ++i) {
        const std::size_t digit = std::string_view("0123456789abcdef").find(text[i]);
        if (digit == std::string_view::npos) return std::nullopt;
        out[i / 2] = static_cast<std::uint8_t>(out[i / 2] << 4 | digit);
    }
    return out;
}

}  // namespace kvcast
