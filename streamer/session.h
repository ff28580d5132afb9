// Brings the KV cache of a context from a store before a deadline, at the best quality that the network
// allows, and has recomputed from text what the network cannot bring.
//
//     Client client({});  // http/client.h: a thread and its connections, or the caller's own
//     Session session(client.loop(), client.transport(), wanted, options, codec, sink);
//     const Summary summary = session.wait();
//
// Nothing reaches the sink that was not checked: the manifest against trusted keys, expiry, model and tokens;
// every object against the manifest's hash and the codec's own checks. Whatever fails becomes another level
// or text.
#pragma once

#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "streamer/chunk_codec.h"
#include "streamer/controller.h"
#include "streamer/download.h"
#include "streamer/event_loop.h"
#include "streamer/locator.h"
#include "streamer/memory_pool.h"

namespace kvcast::streamer {

struct TokenRange {
    std::size_t first = 0;
    std::size_t end = 0;
};

// What became of one chunk. Times are seconds since the session began.
struct ChunkReport {
    TokenRange tokens;
    bool text = false;        // recomputed, not loaded
    unsigned level = 0;       // where loaded
    double kl = 0;            // that the manifest expects of the level; negative: it does not say
    std::uint64_t bytes = 0;  // of the object
    std::size_t requests = 0;
    Seconds decided = 0;   // the choice that stood
    Seconds received = 0;  // its last byte
    Seconds ready = 0;     // with the sink, or recomputed
    std::string reason;    // of the choice
    std::string trouble;   // why earlier choices failed; empty: none did
    // Leading ones of its tokens that the caller had. All of them: the chunk was neither loaded nor
    // recomputed.
    std::size_t present = 0;
};

struct Summary {
    Status status;       // kOk: every token is loaded, recomputed or present; kCancelled; else why not
    Status publication;  // why nothing could be loaded, where that is so
    std::vector<ChunkReport> chunks;
    Seconds time = 0;                 // from the session's start to its last callback
    Seconds manifest_time = 0;        // until the manifest was checked
    std::uint64_t network_bytes = 0;  // bodies received, everything counted
    NetworkPrior network;             // what the next session on this link may begin with
    bool network_measured = false;    // whether this one has seen any of that
    std::size_t tokens = 0;           // of the context, present ones too
    std::size_t text_tokens = 0;      // recomputed: no present ones
    // Mean over the tokens of loaded chunks of what the manifest expects; negative: it does not say of all.
    double kl = 0;
    std::optional<Recording> recording = std::nullopt;  // if it was asked for
};

// Callbacks of a session. Those on the loop's thread must return soon. None comes after Session's destructor.
// What one throws ends the session: kOutOfMemory, kSystem or kThrown, with what the exception says.
class Sink {
  public:
    virtual ~Sink() = default;

    // Loop's thread; once, before the others, if there is a manifest: none is fetched where all of token_ids
    // is present. `chunks` leading chunks of it are used.
    virtual void on_manifest(const Manifest& manifest, std::size_t chunks) { (void)manifest, (void)chunks; }

    // Decode thread. Layers of a chunk come in order, chunks in any order; all layers of a chunk, or none. A
    // chunk comes whole, also where some of its tokens are present.
    virtual void on_layer(std::size_t chunk, TokenRange tokens, std::size_t layer,
                          std::span<const DecodedPlane> planes) = 0;

    // Compute thread. All KV before the range is there; returns when that of the range is, or is sure to come
    // in time. No present tokens are in it. `token_ids` are the range's; empty where neither side has them.
    virtual void on_recompute(TokenRange tokens, std::span<const std::int32_t> token_ids) = 0;

    // Loop's thread.
    virtual void on_decision(const DecisionRecord& record) { (void)record; }

    // Loop's thread; last.
    virtual void on_finish(const Summary& summary) { (void)summary; }
};

struct SessionOptions {
    Seconds deadline = std::numeric_limits<Seconds>::infinity();  // since the session's start, which is
    std::optional<Time> start = std::nullopt;                     // this, or its construction
    std::shared_ptr<const Rule> rule;                             // default: two_pointer_rule()
    ComputeModel compute = {};
    NetworkPrior network = {};
    std::optional<unsigned> finest_level = std::nullopt;    // finer ones are not loaded
    std::size_t transfers = kMostTransfers;                 // objects at once, at most
    std::uint64_t memory_bytes = std::uint64_t{256} << 20;  // of objects on their way or not yet decoded; a
                                                            // single larger one is taken alone
    // Of one chunk, decoded, of one object, and of the calibration: what is larger is refused.
    std::uint64_t chunk_bytes = std::uint64_t{1} << 30;
    // Of all chunks, decoded: what a manifest may make the sink hold.
    std::uint64_t kv_bytes = std::numeric_limits<std::uint64_t>::max();
    DownloadOptions download = {};
    std::vector<PublicKey> trusted = {};            // none: manifests need no signature
    std::shared_ptr<MemoryPool> memory = nullptr;   // shared by sessions; none: one of the session's own
    std::function<std::int64_t()> wall_clock = {};  // seconds since 1970; default: the system's
    std::uint64_t seed = 0;                         // of the jitter; 0: drawn
    bool record = false;  // keep every event; some 60 bytes for every piece that comes
};

// Methods may be called from any thread. The loop, the transport, the codec and the sink outlive the session,
// which may use the codec until it is destroyed: it keeps what came of a calibration. What came to a session
// that is destroyed while it runs, and was not cancelled and waited for, is lost. Not destroyed from within a
// callback.
class Session {
  public:
    // Begins at once. A Wanted or options that make no sense end the session with kBadArgument.
    Session(EventLoop& loop, Transport& transport, Wanted wanted, SessionOptions options, ChunkCodec& codec,
            Sink& sink);
    // Cancels, and waits for callbacks that are running.
    ~Session();
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;

    // Nothing new is fetched, decoded or delivered; on_finish() comes with kCancelled unless the session has
    // ended.
    void cancel();

    // Blocks until on_finish() has returned. Not from the loop's thread.
    Summary wait();

    // The same for at most `patience`; whether the session has ended.
    bool wait_for(Duration patience);

  private:
    class Impl;
    std::shared_ptr<Impl> impl_;
};

}  // namespace kvcast::streamer
