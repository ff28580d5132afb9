// Stores the KV cache of a context at several levels, as an engine that has computed one does.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "codec/encoder.h"
#include "codec/klt/calibration.h"
#include "streamer/publisher.h"

namespace kvcast::client {

// A context and its KV in the caller's memory, which is read during the call.
struct Context {
    const Layout* layout = nullptr;
    std::string_view model;  // UTF-8
    std::string_view salt;   // keeps the chunks' identities apart from other tenants'; may be empty
    std::span<const std::int32_t> token_ids;  // not negative
    std::uint64_t base_position = 0;
    std::span<const PlaneRows> planes;  // [layer][plane], rows of all tokens
};

struct PublishOptions {
    std::vector<unsigned> levels;  // ascending; 0 is lossless; empty: all that there are
    // With a calibration lossy levels are of the klt profile, else of delta. Both or neither: the calibration
    // and the file it was read from, which goes into the store.
    std::shared_ptr<const Calibration> calibration;
    std::span<const std::uint8_t> calibration_file;
    std::map<unsigned, double> delta_kl;  // what delta's levels cost the model, in nats, where that is known
    std::size_t chunk_tokens = 256;
    // As EncodeOptions has them: delta's step multipliers, and how much decoders can do side by side (1 and 1
    // for GPUs).
    LayerSteps layer_steps = {};
    std::size_t block_heads = EncodeOptions{}.block_heads;
    std::size_t run_layers = EncodeOptions{}.run_layers;
    std::int64_t now = 0;                       // seconds since 1970
    std::optional<std::int64_t> ttl;            // seconds from now on; default: no end
    std::string session;                        // a tag for collection, UTF-8; may be empty
    bool with_tokens = true;                    // put the token ids into the manifest
    const streamer::PrivateKey* key = nullptr;  // signs the manifest
    // Told how many tokens a chunk has that was stored, or taken over; where it returns false, the rest is
    // not (kCancelled).
    std::function<bool(std::size_t tokens)> on_chunk = {};
    // Leading chunks that the destination has are taken over, not encoded again: no time is spent on them,
    // and values that were loaded at a lossy level replace no better ones. They are those of the publication
    // there that has the longest prefix of the context, as far as they are of the same tokens, base position,
    // levels (with profile and KL) and calibration, and their objects are there; the first one that is not,
    // and all after it, are encoded. Their rows are not read. Their steps and blocks stay as they were
    // encoded. With a key, only what a manifest says that it has signed is taken over; without one, whoever
    // can write to the destination is believed. That nothing can be taken over is no error.
    bool extend = false;
};

struct Published {
    std::string name;  // of the manifest, in the store
    streamer::Manifest manifest;
    streamer::PublishedBytes bytes;     // those taken over were there already
    std::size_t chunks_taken_over = 0;  // of the manifest's, leading ones
    std::size_t tokens_taken_over = 0;
};

// What a level is called for by its number alone: 0 is lossless, others are of klt with a calibration, else
// of delta.
EncodeOptions level_options(unsigned level, std::shared_ptr<const Calibration> calibration);
// The last of them.
unsigned last_level(const Calibration* calibration);

// Encodes on the executor, one chunk at a time. Errors: kBadArgument, kCancelled, those of
// ChunkEncoder::encode, and the destination's; objects that were stored by then stay there until they are
// collected.
Result<Published> publish(streamer::Destination& destination, const Context& context,
                          const PublishOptions& options, Executor& executor);

}  // namespace kvcast::client
