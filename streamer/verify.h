// Whether an object is what its manifest promises, before anything is decoded from it.
#pragma once

#include <span>

#include "streamer/manifest.h"

namespace kvcast::streamer {

// Size, SHA-256, header checksum, and that the header names the manifest's model, layout, calibration, level,
// tokens and place in the chain. kObjectMismatch for the hash, kForeign for another chunk's header, else what
// read_header() says. Thread-safe.
Status verify_object(std::span<const std::uint8_t> object, const Manifest& manifest, std::size_t chunk,
                     const ManifestObject& promised);

}  // namespace kvcast::streamer
