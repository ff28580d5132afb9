// Where things lie in a store. STORE.md, section 1. Names are relative to the store's root, a folder or a
// URL.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "codec/format/layout.h"
#include "streamer/manifest.h"

namespace kvcast::streamer {

// Content has one name: equal objects of different publications are stored once, and an object under a name
// never changes.
std::string object_name(const Hash& chain, const ManifestObject& object);  // <chain>/<level>-<sha256, 16>.kvc
std::string calibration_name(const Hash& id);                              // calibrations/<id>.kvcal
// manifests/<chain of the last chunk>.json, or <chain>-<8 digits> where the publication has a session tag:
// sessions do not end each other's publications.
std::string manifest_name(const Manifest& manifest);
std::string pointer_name(const Hash& chain);  // <chain>/manifest

// A pointer says which manifest has its chunk: the manifest's name without folder and suffix, and a newline.
std::string pointer_to(std::string_view manifest_name);
std::optional<std::string> manifest_of_pointer(std::span<const std::uint8_t> pointer);
inline constexpr std::size_t kPointerBytes = 74;  // at most

// The manifest's own name is the last two parts of its URL; what is before them is the root.
std::string root_of_manifest(std::string_view manifest_url);
std::string join_url(std::string_view root, std::string_view name);

}  // namespace kvcast::streamer
