// How much of a context a store has, asked before any of it is fetched: a scheduler makes room first.
//
//     const Result<Located> stored = look_up(client.loop(), client.transport(), wanted, {});
//     if (stored.ok()) ... stored.value().tokens, for which a Session brings the KV
#pragma once

#include <chrono>
#include <functional>
#include <vector>

#include "streamer/locator.h"

namespace kvcast::streamer {

struct LookupOptions {
    Duration patience = std::chrono::seconds(5);
    DownloadOptions download = {};
    std::vector<PublicKey> trusted = {};            // none: manifests need no signature
    std::function<std::int64_t()> wall_clock = {};  // seconds since 1970; default: the system's
};

// What a session with the same Wanted would find; a manifest's URL in it then saves that session the search.
// Blocks; not from the loop's thread. Errors: the Locator's, and kTimeout.
Result<Located> look_up(EventLoop& loop, Transport& transport, Wanted wanted, const LookupOptions& options);

}  // namespace kvcast::streamer
