#include "tools/client/link_memory.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <span>

#include "codec/format/chain.h"
#include "tools/common/file.h"

namespace kvcast::client {
namespace {

using streamer::NetworkPrior;

constexpr auto kFresh = std::chrono::hours(1);

// "https://host:8443/a/b" is served by "https://host:8443".
std::string path_for(const std::string& folder, const std::string& url) {
    const std::size_t scheme = url.find("://");
    const std::size_t path = url.find('/', scheme == std::string::npos ? 0 : scheme + 3);
    const std::string server = url.substr(0, path);
    const std::span bytes(reinterpret_cast<const std::uint8_t*>(server.data()), server.size());
    const Hash hash = sha256(bytes);
    return fmt::format("{}/link-{}", folder, to_hex(std::span(hash).first(8)));
}

}  // namespace

std::optional<NetworkPrior> remembered_link(const std::string& folder, const std::string& url) {
    if (folder.empty()) return std::nullopt;
    const std::string path = path_for(folder, url);
    std::ifstream in(path);
    NetworkPrior link;
    if (!(in >> link.bytes_per_second >> link.first_byte >> link.doubt)) return std::nullopt;
    const bool sound = link.bytes_per_second > 0 && link.first_byte > 0 && link.doubt >= 0 &&
                       std::isfinite(link.bytes_per_second + link.first_byte + link.doubt);
    if (!sound) return std::nullopt;
    std::error_code unknown;
    const auto written = std::filesystem::last_write_time(path, unknown);
    const auto now = std::filesystem::file_time_type::clock::now();
    // A slow link of long ago is no reason never to look at it again.
    if (unknown || now - written > kFresh) {
        link.doubt = std::max(link.doubt, NetworkPrior{}.doubt);
        link.bytes_per_second = std::max(link.bytes_per_second, NetworkPrior{}.bytes_per_second);
    }
    return link;
}

void remember_link(const std::string& folder, const std::string& url, const NetworkPrior& link) {
    if (folder.empty()) return;
    try {
        std::filesystem::create_directories(folder);
        tools::write_text(path_for(folder, url), fmt::format("{:.0f} {:.6f} {:.3f}\n", link.bytes_per_second,
                                                             link.first_byte, link.doubt));
    } catch (const std::exception&) {
    }
}

}  // namespace kvcast::client
