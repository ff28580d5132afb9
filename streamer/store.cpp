#include "streamer/store.h"

#include <fmt/format.h>

#include "codec/format/chain.h"

namespace kvcast::streamer {
namespace {

constexpr std::string_view kManifestFolder = "manifests/";
constexpr std::string_view kManifestSuffix = ".json";

}  // namespace

std::string object_name(const Hash& chain, const ManifestObject& object) {
    return fmt::format("{}/{}-{}.kvc", to_hex(chain), object.level, to_hex(object.sha256).substr(0, 16));
}

std::string calibration_name(const Hash& id) {
    return fmt::format("calibrations/{}.kvcal", to_hex(id));
}

std::string manifest_name(const Manifest& manifest) {
    const std::string chain = to_hex(manifest.chain());
    if (manifest.session.empty()) return fmt::format("{}{}{}", kManifestFolder, chain, kManifestSuffix);
    const auto* tag = reinterpret_cast<const std::uint8_t*>(manifest.session.data());
    const std::string digits = to_hex(sha256({tag, manifest.session.size()})).substr(0, 8);
    return fmt::format("{}{}-{}{}", kManifestFolder, chain, digits, kManifestSuffix);
}

std::string pointer_name(const Hash& chain) {
    return fmt::format("{}/manifest", to_hex(chain));
}

std::string pointer_to(std::string_view name) {
    name.remove_prefix(kManifestFolder.size());
    name.remove_suffix(kManifestSuffix.size());
    return std::string(name) + "\n";
}

std::optional<std::string> manifest_of_pointer(std::span<const std::uint8_t> pointer) {
    std::string_view text(reinterpret_cast<const char*>(pointer.data()), pointer.size());
    if (text.ends_with('\n')) text.remove_suffix(1);
    if (text.size() < 64 || text.size() >= kPointerBytes) return std::nullopt;
    if (text.find_first_not_of("0123456789abcdef-") != std::string_view::npos) return std::nullopt;
    return fmt::format("{}{}{}", kManifestFolder, text, kManifestSuffix);
}

std::string root_of_manifest(std::string_view url) {
    url = url.substr(0, url.find_first_of("?#"));
    for (int part = 0; part < 2; ++part) {
        const std::size_t slash = url.rfind('/');
        if (slash == std::string_view::npos) return ".";
        url = url.substr(0, slash);
    }
    return std::string(url);
}

std::string join_url(std::string_view root, std::string_view name) {
    return fmt::format("{}{}{}", root, root.ends_with('/') ? "" : "/", name);
}

}  // namespace kvcast::streamer
