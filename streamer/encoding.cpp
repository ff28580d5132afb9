#include "streamer/encoding.h"

#include <openssl/evp.h>

namespace kvcast::streamer {

std::string base64_encode(std::span<const std::uint8_t> bytes) {
    std::string out((bytes.size() + 2) / 3 * 4 + 1, '\0');  // one more for OpenSSL's terminator
    EVP_EncodeBlock(reinterpret_cast<unsigned char*>(out.data()), bytes.data(),
                    static_cast<int>(bytes.size()));
    out.pop_back();
    return out;
}

std::optional<std::vector<std::uint8_t>> base64_decode(std::string_view text) {
    if (text.size() % 4 != 0 || text.size() > std::size_t{1} << 30) return std::nullopt;
    std::vector<std::uint8_t> out(text.size() / 4 * 3);
    const int length = EVP_DecodeBlock(out.data(), reinterpret_cast<const unsigned char*>(text.data()),
                                       static_cast<int>(text.size()));
    if (length != static_cast<int>(out.size())) return std::nullopt;
    for (std::size_t padding = 0; padding < 2 && text.ends_with('='); ++padding) {
        text.remove_suffix(1);
        out.pop_back();
    }
    // OpenSSL skips blanks and bits that do not belong; what does not come back unchanged is refused.
    std::string again = base64_encode(out);
    while (again.ends_with('=')) again.pop_back();
    if (again != text) return std::nullopt;
    return out;
}

bool is_utf8(std::string_view text) {
    constexpr char32_t kLeast[] = {0, 0, 0x80, 0x800, 0x10000};  // by length
    while (!text.empty()) {
        const auto lead = static_cast<unsigned char>(text[0]);
        const std::size_t length = lead < 0x80 ? 1 : lead < 0xc0 ? 0 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
        if (length == 0 || lead >= 0xf8 || length > text.size()) return false;
        char32_t value = length == 1 ? lead : lead & (0x7fu >> length);
        for (const char c : text.substr(1, length - 1)) {
            const auto next = static_cast<unsigned char>(c);
            if ((next & 0xc0) != 0x80) return false;
            value = value << 6 | (next & 0x3fu);
        }
        const bool surrogate = value >= 0xd800 && value < 0xe000;
        if (value < kLeast[length] || value > 0x10ffff || surrogate) return false;
        text.remove_prefix(length);
    }
    return true;
}

}  // namespace kvcast::streamer
