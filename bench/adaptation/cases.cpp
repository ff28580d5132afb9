#include "bench/adaptation/cases.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>

#include "tools/common/file.h"

namespace kvcast::bench {

using streamer::Manifest;
using streamer::ManifestLevel;
using streamer::ManifestObject;

std::vector<ModelClass> model_classes() {
    ComputeModel small, large;
    small.prefill = {{0, 620}};
    small.decode_bytes_per_second = 0.25e9;
    small.bytes_per_token = 23040;
    large.prefill = {{0, 9000}, {32768, 5000}};
    large.decode_bytes_per_second = 20e9;
    large.bytes_per_token = 131072;
    return {{"smol", 1, small}, {"8b", 131072.0 / 23040, large}};
}

std::vector<ChunkView> chunks_of(const Manifest& m, std::size_t tokens, double bytes_scale) {
    std::vector<ChunkView> out;
    // The first chunk has the sinks; later ones repeat.
    for (std::size_t first = 0; first < tokens; first += out.back().tokens) {
        const std::size_t i =
            out.size() < m.chunks.size() ? out.size() : 1 + (out.size() - 1) % (m.chunks.size() - 1);
        ChunkView v;
        v.first_token = first;
        v.tokens = std::min(m.chunks[i].tokens, tokens - first);
        for (const ManifestObject& o : m.chunks[i].objects) {
            const auto level = std::ranges::find(m.levels, o.level, &ManifestLevel::level);
            v.levels.push_back({o.level,
                                static_cast<std::uint64_t>(static_cast<double>(o.bytes) * bytes_scale),
                                level->kl.value_or(o.level), true});
        }
        out.push_back(std::move(v));
    }
    return out;
}

Manifest load_publication(const std::string& path) {
    const tools::MappedFile file(path);
    const auto m =
        streamer::read_manifest({reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()});
    if (!m.ok()) throw tools::Error(fmt::format("{}: {}", path, m.status().message()));
    if (m.value().chunks.size() < 2) throw tools::Error(fmt::format("{}: fewer than two chunks", path));
    return m.value();
}

std::vector<std::string> trace_files(const std::vector<std::string>& paths) {
    std::vector<std::string> out;
    for (const std::string& path : paths) {
        if (!std::filesystem::is_directory(path)) {
            out.push_back(path);
            continue;
        }
        for (const auto& entry : std::filesystem::directory_iterator(path)) {
            const std::string name = entry.path().filename().string();
            if (entry.is_regular_file() && name.find('.') == std::string::npos && name != "LICENSE")
                out.push_back(entry.path().string());
        }
    }
    std::ranges::sort(out);
    if (out.empty()) throw tools::Error("no traces");
    return out;
}

std::string family_of(const std::string& name) {
    return name.substr(0, name.find('_'));
}

}  // namespace kvcast::bench
