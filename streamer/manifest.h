// The manifest of a publication: which chunks a context has, at which levels, and what they hash to.
// STORE.md, section 2. A manifest is the root of trust: whoever has checked it can check every byte that it
// names.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "codec/format/chunk_header.h"

namespace kvcast::streamer {

struct ManifestLimits {
    static constexpr std::size_t kBytes = std::size_t{64} << 20;
    static constexpr std::size_t kChunks = std::size_t{1} << 20;
    static constexpr std::size_t kLevels = 256;
    static constexpr std::uint64_t kObjectBytes = std::uint64_t{1} << 40;
};

// A quality level of the publication.
struct ManifestLevel {
    unsigned level = 0;  // as in the chunk header; 0 is lossless
    Profile profile = Profile::kLossless;
    std::optional<double> kl;  // expected divergence of the next token, nats

    friend bool operator==(const ManifestLevel&, const ManifestLevel&) = default;
};

// One chunk at one level.
struct ManifestObject {
    unsigned level = 0;
    std::uint64_t bytes = 0;
    Hash sha256 = {};

    friend bool operator==(const ManifestObject&, const ManifestObject&) = default;
};

struct ManifestChunk {
    Hash chain = {};
    std::size_t tokens = 0;
    std::vector<std::int32_t> token_ids;  // none where the publisher keeps them back
    std::vector<ManifestObject> objects;  // ascending level

    friend bool operator==(const ManifestChunk&, const ManifestChunk&) = default;
};

struct ManifestCalibration {
    Hash id = {};  // SHA-256 of the file
    std::uint64_t bytes = 0;

    friend bool operator==(const ManifestCalibration&, const ManifestCalibration&) = default;
};

struct Manifest {
    std::string model;
    Layout layout;
    std::uint64_t base_position = 0;
    std::optional<ManifestCalibration> calibration;
    std::vector<ManifestLevel> levels;  // ascending, from finest to coarsest
    std::vector<ManifestChunk> chunks;  // at least one
    std::int64_t created = 0;           // seconds since 1970, UTC
    std::optional<std::int64_t> expires;
    std::string session;  // a tag for collection; may be empty

    std::size_t tokens() const;
    // The identity of the whole publication: its last chunk's.
    const Hash& chain() const { return chunks.back().chain; }

    friend bool operator==(const Manifest&, const Manifest&) = default;
};

// Its text is UTF-8.
std::string write_manifest(const Manifest& manifest);

// Parses and checks shape, ranges and order: kBadManifest with the field at fault. Never throws.
Result<Manifest> read_manifest(std::string_view json);

// Whether the chunks' identities follow from these tokens (the manifest's own where a chunk has them), the
// model, the layout and the salt. `token_ids` may be longer than the publication, or empty. Returns how many
// leading chunks they confirm; kForeign where not even the first one is confirmed, kBadArgument where neither
// side has tokens.
Result<std::size_t> confirm_chain(const Manifest& manifest, std::string_view salt,
                                  std::span<const std::int32_t> token_ids);

// What the system's clock says, in seconds since 1970.
std::int64_t system_seconds();

// "2026-11-21T05:00:00Z", and back (that form only).
std::string format_time(std::int64_t seconds);
std::optional<std::int64_t> parse_time(std::string_view text);

}  // namespace kvcast::streamer
