// The C interface: stores and sessions.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>

#include "streamer/http/client.h"
#include "streamer/http/http_destination.h"
#include "streamer/http/location.h"
#include "streamer/lookup.h"
#include "streamer/rules/rules.h"
#include "streamer/session.h"
#include "streamer/store.h"
#include "tools/client/c_boundary.h"
#include "tools/client/codec_adapter.h"
#include "tools/client/device_codec.h"
#include "tools/client/link_memory.h"
#include "tools/client/publication.h"

using namespace kvcast;
using namespace kvcast::client;

namespace kvcast::client {
namespace {

constexpr double kDay = 86400;  // seconds

class CSink final : public streamer::Sink {
  public:
    explicit CSink(const kvcast_sink& calls) : calls_(calls) {}

    void on_layer(std::size_t, streamer::TokenRange tokens, std::size_t layer,
                  std::span<const streamer::DecodedPlane> planes) override {
        kvcast_rows rows[LayoutLimits::kPlanes] = {};
        for (std::size_t p = 0; p < planes.size(); ++p) rows[p] = {planes[p].rows, planes[p].row_bytes};
        calls_.on_layer(calls_.user, tokens.first, tokens.end, static_cast<std::uint32_t>(layer), rows);
    }
    void on_recompute(streamer::TokenRange tokens, std::span<const std::int32_t> token_ids) override {
        calls_.on_recompute(calls_.user, tokens.first, tokens.end,
                            token_ids.empty() ? nullptr : token_ids.data());
    }
    void on_finish(const streamer::Summary&) override {
        if (calls_.on_finish != nullptr) calls_.on_finish(calls_.user);
    }

    // Nowhere, where the engine says so.
    std::vector<device::DevicePlane> place(const ChunkHeader& chunk) const {
        std::vector<kvcast_place> places(chunk.layout.layers * chunk.layout.planes.size());
        const std::size_t end = chunk.first_token + chunk.tokens;
        std::vector<device::DevicePlane> out;
        if (calls_.on_place(calls_.user, chunk.first_token, end, places.data()) != 0) return out;
        for (const kvcast_place& p : places) {
            out.push_back({p.rows, p.row_bytes, p.head_bytes, p.pages, p.page_tokens, p.page_bytes, p.slot});
        }
        return out;
    }

  private:
    const kvcast_sink calls_;
};

using Connections = std::shared_ptr<streamer::Client>;

// A codec for one session at a time.
struct SessionCodec {
    std::unique_ptr<CachedCodec> codec;
    std::unique_ptr<const CSink*> sink;  // of its session; null where KV goes to host memory
};

}  // namespace
}  // namespace kvcast::client

struct kvcast_client {
    kvcast_client(std::size_t workers, bool device, std::string folder, streamer::HttpOptions options)
        : threads(workers),
          on_device(device),
          cache_folder(std::move(folder)),
          http(std::move(options)),
          connections(std::make_shared<streamer::Client>(http)) {}

    // A codec decodes one session at a time, and remembers calibrations for the next. `placed`: on a device,
    // KV goes where the session's sink says. kNoDevice, kDevice.
    Result<SessionCodec> take_codec(bool placed) {
        std::optional<SessionCodec> codec = idle_codec(placed);
        if (codec) return std::move(*codec);
        return open_codec(placed);
    }
    void give_back(SessionCodec codec) {
        const std::scoped_lock lock(mutex);
        if (idle.size() < kMostIdle) idle.push_back(std::move(codec));
    }

    // Connections for a URL, which becomes that of its server. kBadArgument.
    Result<Connections> connections_to(std::string& url) {
        Result<streamer::Location> at = streamer::locate(url, streamer::process_variables);
        if (!at.ok()) return at.status();
        url = std::move(at.value().url);
        const std::optional<streamer::S3Credentials>& keys = at.value().s3;
        if (!keys) return connections;
        if (const Connections known = known_connections(*keys)) return known;
        streamer::HttpOptions with_keys = http;
        with_keys.s3 = keys;
        return remember({*keys, std::make_shared<streamer::Client>(std::move(with_keys))});
    }

    const std::size_t threads;
    const bool on_device;
    const std::string cache_folder;
    const streamer::HttpOptions http;

  private:
    // With the keys of a store in S3.
    struct SignedConnections {
        streamer::S3Credentials keys;
        Connections connections;
    };

    // What takes its time, opening and closing codecs and connections, is done without the lock.
    std::optional<SessionCodec> idle_codec(bool placed) {
        const std::scoped_lock lock(mutex);
        idle.reserve(kMostIdle);
        const auto known =
            std::ranges::find(idle, placed, [](const SessionCodec& c) { return c.sink != nullptr; });
        if (known == idle.end()) return std::nullopt;
        SessionCodec codec = std::move(*known);
        idle.erase(known);
        return codec;
    }
    Connections known_connections(const streamer::S3Credentials& keys) {
        const std::scoped_lock lock(mutex);
        const auto known = std::ranges::find(signed_connections, keys, &SignedConnections::keys);
        return known != signed_connections.end() ? known->connections : nullptr;
    }
    // Those of the same keys that another thread has made meanwhile win. Keys that are temporary have
    // successors; whoever still uses old ones keeps their connections.
    Connections remember(const SignedConnections& made) {
        Connections oldest;  // ends behind the lock
        const std::scoped_lock lock(mutex);
        const auto known = std::ranges::find(signed_connections, made.keys, &SignedConnections::keys);
        if (known != signed_connections.end()) return known->connections;
        if (signed_connections.size() == kMostKeys) {
            oldest = std::move(signed_connections.front().connections);
            signed_connections.erase(signed_connections.begin());
        }
        signed_connections.push_back(made);
        return made.connections;
    }

    Result<SessionCodec> open_codec(bool placed) const {
        if (!on_device) return SessionCodec{std::make_unique<CodecAdapter>(threads, cache_folder), nullptr};
        auto decoder = device::DeviceDecoder::open({});
        if (!decoder.ok()) return decoder.status();
        if (!placed)
            return SessionCodec{std::make_unique<CodecAdapter>(std::move(decoder.value()), cache_folder),
                                nullptr};
        auto sink = std::make_unique<const CSink*>(nullptr);
        auto place = [at = sink.get()](const ChunkHeader& chunk) { return (*at)->place(chunk); };
        return SessionCodec{std::make_unique<DeviceCodec>(std::move(decoder.value()), place, cache_folder),
                            std::move(sink)};
    }

    static constexpr std::size_t kMostIdle = 8;
    static constexpr std::size_t kMostKeys = 4;

    const Connections connections;
    std::mutex mutex;
    std::vector<SignedConnections> signed_connections;  // guarded by mutex
    std::vector<SessionCodec> idle;                     // guarded by mutex
};

namespace kvcast::client {
namespace {

Result<streamer::Wanted> wanted_of(const kvcast_request& r) {
    streamer::Wanted out;
    out.manifest_url = text_or_none(r.manifest_url);
    out.store_url = text_or_none(r.store_url);
    if (out.manifest_url.empty() == out.store_url.empty())
        return bad_argument("one of manifest_url and store_url is given, not both and not neither");
    out.model = text_or_none(r.model);
    if (out.model.empty()) return bad_argument("no model given");
    Result<Layout> layout = layout_of(r.layout);
    if (!layout.ok()) return layout.status();
    out.layout = std::move(layout.value());
    if (r.tokens == 0 || r.tokens > ChunkLimits::kPosition)
        return bad_argument(fmt::format("{} tokens, or room for so many", r.tokens));
    if (r.present_tokens > r.tokens)
        return bad_argument(fmt::format("{} tokens are present, of {} at most", r.present_tokens, r.tokens));
    out.present_tokens = r.present_tokens;
    const auto ids = span_of(r.token_ids, r.tokens);
    out.token_ids.assign(ids.begin(), ids.end());
    if (r.chunk_tokens != 0) out.chunk_tokens = r.chunk_tokens;
    out.salt = text_or_none(r.salt);
    return out;
}

template <typename AnyWanted>
auto& url_of(AnyWanted& wanted) {
    return wanted.manifest_url.empty() ? wanted.store_url : wanted.manifest_url;
}

// What a request is about, and over which connections.
struct Addressed {
    streamer::Wanted wanted;
    Connections connections;
};

Result<Addressed> addressed(kvcast_client& client, const kvcast_request& r) {
    Result<streamer::Wanted> wanted = wanted_of(r);
    if (!wanted.ok()) return wanted.status();
    const Result<Connections> connections = client.connections_to(url_of(wanted.value()));
    if (!connections.ok()) return connections.status();
    return Addressed{std::move(wanted.value()), connections.value()};
}

Status read_keys(const kvcast_request& r, std::vector<streamer::PublicKey>& keys) {
    if (Status s = check_list(r.trusted_keys, r.trusted_key_count, "trusted_keys"); !s.ok()) return s;
    for (const char* const pem : span_of(r.trusted_keys, r.trusted_key_count)) {
        auto key = streamer::PublicKey::from_pem(text_or_none(pem));
        if (!key.ok()) return key.status();
        keys.push_back(std::move(key.value()));
    }
    return {};
}

Result<streamer::SessionOptions> options_of(const kvcast_client& client, const kvcast_request& r,
                                            const streamer::Wanted& wanted) {
    streamer::SessionOptions o;
    if (!(r.deadline >= 0) || !(r.prefill_tokens_per_second >= 0))
        return bad_argument("a deadline and a speed of prefill are 0 or more");
    if (r.deadline > 0) o.deadline = r.deadline;
    if (r.prefill_tokens_per_second > 0) o.compute.prefill = {{0, r.prefill_tokens_per_second}};
    o.compute.decode_bytes_per_second =
        client.on_device ? kExpectedDeviceSpeed : expected_decode_speed(client.threads);
    auto rule = streamer::rule_by_name(r.rule != nullptr ? r.rule : "two-pointer");
    if (!rule.ok()) return rule.status();
    o.rule = std::move(rule.value());
    if (r.finest_level != 0) o.finest_level = r.finest_level;
    const std::uint64_t token_bytes = wanted.layout->token_bytes();
    if (wanted.token_ids.empty() && r.tokens <= o.kv_bytes / token_bytes) o.kv_bytes = r.tokens * token_bytes;
    o.network = remembered_link(client.cache_folder, url_of(wanted)).value_or(streamer::NetworkPrior{});
    if (Status s = read_keys(r, o.trusted); !s.ok()) return s;
    return o;
}

// Who waits for a loop's work does so on another thread.
Status check_thread(const streamer::Client& connections) {
    return connections.loop().is_current() ? bad_argument("not from a call of the sink") : Status();
}

Result<kvcast_stored> look_up(kvcast_client& client, const kvcast_request& r, double seconds) {
    Result<Addressed> to = addressed(client, r);
    if (!to.ok()) return to.status();
    streamer::LookupOptions options;
    options.patience = streamer::from_seconds(seconds);
    if (Status s = read_keys(r, options.trusted); !s.ok()) return s;
    streamer::Client& over = *to.value().connections;
    if (Status s = check_thread(over); !s.ok()) return s;
    const auto located =
        streamer::look_up(over.loop(), over.transport(), std::move(to.value().wanted), options);
    if (!located.ok()) return located.status();
    const streamer::Located& l = located.value();
    // In the caller's terms, who may have said s3://.
    const std::string url = r.manifest_url != nullptr
                                ? r.manifest_url
                                : streamer::join_url(r.store_url, l.manifest_url.substr(l.root.size() + 1));
    kvcast_stored out = {.struct_bytes = sizeof(kvcast_stored),
                         .tokens = l.tokens,
                         .finest_bytes = 0,
                         .coarsest_bytes = 0,
                         .manifest_url = ""};
    std::size_t end = 0;
    for (const streamer::ManifestChunk& chunk : std::span(l.manifest.chunks).first(l.chunks)) {
        end += chunk.tokens;
        if (end <= r.present_tokens) continue;
        out.finest_bytes += chunk.objects.front().bytes;
        out.coarsest_bytes += chunk.objects.back().bytes;
    }
    if (url.size() >= sizeof out.manifest_url)
        return Status(ErrorCode::kBufferTooSmall, fmt::format("a manifest's URL of {} bytes", url.size()));
    std::memcpy(out.manifest_url, url.c_str(), url.size() + 1);
    return out;
}

kvcast_summary described(const streamer::Summary& s) {
    return {.struct_bytes = sizeof(kvcast_summary),
            .time = s.time,
            .manifest_time = s.manifest_time,
            .network_bytes = s.network_bytes,
            .tokens = s.tokens,
            .text_tokens = s.text_tokens,
            .kl = s.kl,
            .publication = static_cast<std::int32_t>(s.publication.code()),
            .reserved = 0};
}

Status check_publication(const kvcast_publication& p) {
    if (text_or_none(p.model).empty()) return bad_argument("no model given");
    if (p.ttl < 0) return bad_argument("a life of less than no time");
    if (Status s = check_list(p.levels, p.level_count, "levels"); !s.ok()) return s;
    return check_list(static_cast<const char*>(p.calibration), p.calibration_bytes, "bytes of calibration");
}

Result<std::string> publish_to(kvcast_client& client, const std::string& target,
                               const kvcast_publication& p) {
    if (Status s = check_publication(p); !s.ok()) return s;
    const Result<Layout> layout = layout_of(p.layout);
    if (!layout.ok()) return layout.status();
    const auto planes = rows_of(p.planes, layout.value());
    if (!planes.ok()) return planes.status();
    const std::string model = p.model, salt = text_or_none(p.salt);
    const Context context = {&layout.value(), model,         salt, span_of(p.token_ids, p.tokens),
                             p.base_position, planes.value()};
    ThreadPool pool(client.threads);
    PublishOptions options;
    const auto levels = span_of(p.levels, p.level_count);
    options.levels.assign(levels.begin(), levels.end());
    if (p.calibration != nullptr) {
        options.calibration_file = octets_of(p.calibration, p.calibration_bytes);
        auto calibration = Calibration::read(options.calibration_file, pool);
        if (!calibration.ok()) return calibration.status();
        options.calibration = std::move(calibration.value());
    }
    if (p.chunk_tokens != 0) options.chunk_tokens = p.chunk_tokens;
    const auto steps = span_of(p.layer_steps, layout.value().layers * layout.value().planes.size());
    options.layer_steps.assign(steps.begin(), steps.end());
    options.block_heads = p.block_heads;
    if (p.run_layers != 0) options.run_layers = p.run_layers;
    options.now = streamer::system_seconds();
    if (p.ttl > 0) options.ttl = p.ttl;
    options.session = text_or_none(p.session);
    options.with_tokens = p.without_tokens == 0;
    options.extend = p.extend != 0;
    std::optional<streamer::PrivateKey> key;
    if (p.key != nullptr) {
        auto read = streamer::PrivateKey::from_pem(p.key);
        if (!read.ok()) return read.status();
        options.key = &key.emplace(std::move(read.value()));
    }
    if (p.on_chunk != nullptr)
        options.on_chunk = [&p](std::size_t tokens) { return p.on_chunk(p.user, tokens) == 0; };
    const auto destination = streamer::open_destination(target, client.http, streamer::process_variables);
    if (!destination.ok()) return destination.status();
    const auto published = publish(*destination.value(), context, options, pool);
    if (!published.ok()) return published.status();
    return streamer::join_url(destination.value()->root(), published.value().name);
}

}  // namespace
}  // namespace kvcast::client

struct kvcast_session {
    kvcast_session(kvcast_client& from, SessionCodec with, Addressed to, streamer::SessionOptions options,
                   const kvcast_sink& calls)
        : client(from),
          connections(std::move(to.connections)),
          url(url_of(to.wanted)),
          codec(std::move(with)),
          sink(calls) {
        if (codec.sink) *codec.sink = &sink;
        session.emplace(connections->loop(), connections->transport(), std::move(to.wanted),
                        std::move(options), *codec.codec, sink);
    }

    ~kvcast_session() {
        session.reset();
        client.give_back(std::move(codec));
    }

    // Of a session that has ended.
    const char* troubles() {
        const std::scoped_lock lock(mutex);
        if (!troubles_told) troubles_told = lines_of(session->wait());
        return troubles_told->c_str();
    }

    kvcast_client& client;
    const Connections connections;
    const std::string url;
    SessionCodec codec;
    CSink sink;
    std::optional<streamer::Session> session;

  private:
    static std::string lines_of(const streamer::Summary& s) {
        std::string lines;
        if (!s.publication.ok()) lines += s.publication.message() + "\n";
        for (const streamer::ChunkReport& c : s.chunks) {
            if (!c.trouble.empty())
                lines += fmt::format("tokens {} to {}: {}\n", c.tokens.first, c.tokens.end - 1, c.trouble);
        }
        return lines;
    }

    std::mutex mutex;
    std::optional<std::string> troubles_told;  // guarded by mutex
};

extern "C" {

int kvcast_client_open(const kvcast_client_options* options, kvcast_client** client) {
    return guarded([&]() -> Status {
        if (client == nullptr) return bad_argument("no place for the client given");
        *client = nullptr;
        if (Status s = check_struct(options, "client_options"); !s.ok()) return s;
        if (Status s = check_threads(options->threads); !s.ok()) return s;
        const std::string device = options->device != nullptr ? options->device : "cpu";
        if (device != "cpu" && device != "cuda")
            return bad_argument(fmt::format("device '{}', there are cpu and cuda", device));
        if (device == "cuda") {
            if (auto there = device::DeviceDecoder::open({}); !there.ok()) return there.status();
        }
        streamer::HttpOptions http;
        http.ca_file = text_or_none(options->ca_file);
        *client = std::make_unique<kvcast_client>(threads_or_all(options->threads), device == "cuda",
                                                  text_or_none(options->cache_folder), std::move(http))
                      .release();
        return {};
    });
}

void kvcast_client_close(kvcast_client* client) {
    delete client;
}

int kvcast_publish(kvcast_client* client, const char* destination, const kvcast_publication* publication,
                   char* url, size_t url_bytes) {
    return guarded([&]() -> Status {
        if (client == nullptr || destination == nullptr || url == nullptr)
            return bad_argument("no client, no destination, or no place for the URL given");
        if (Status s = check_struct(publication, "publication"); !s.ok()) return s;
        const Result<std::string> at = publish_to(*client, destination, *publication);
        if (!at.ok()) return at.status();
        if (at.value().size() >= url_bytes)
            return {ErrorCode::kBufferTooSmall,
                    fmt::format("stored at {}, for which {} bytes are too few", at.value(), url_bytes)};
        std::memcpy(url, at.value().c_str(), at.value().size() + 1);
        return {};
    });
}

int kvcast_fetch(kvcast_client* client, const kvcast_request* request, const kvcast_sink* sink,
                 kvcast_session** session) {
    return guarded([&]() -> Status {
        const streamer::Time called = streamer::Clock::now();
        if (client == nullptr || session == nullptr)
            return bad_argument("no client, or no place for the session given");
        *session = nullptr;
        if (Status s = check_struct(request, "request"); !s.ok()) return s;
        if (Status s = check_struct(sink, "sink"); !s.ok()) return s;
        if (sink->on_layer == nullptr || sink->on_recompute == nullptr)
            return bad_argument("a sink without on_layer or on_recompute");
        const bool placed = sink->on_place != nullptr;
        if (placed && !client->on_device) return bad_argument("on_place needs a client of the device cuda");
        Result<Addressed> to = addressed(*client, *request);
        if (!to.ok()) return to.status();
        Result<streamer::SessionOptions> options = options_of(*client, *request, to.value().wanted);
        if (!options.ok()) return options.status();
        options.value().memory = to.value().connections->memory();
        options.value().start = called;
        Result<SessionCodec> codec = client->take_codec(placed);
        if (!codec.ok()) return codec.status();
        *session = std::make_unique<kvcast_session>(*client, std::move(codec.value()), std::move(to.value()),
                                                    std::move(options.value()), *sink)
                       .release();
        return {};
    });
}

int kvcast_look_up(kvcast_client* client, const kvcast_request* request, double seconds,
                   kvcast_stored* stored) {
    return guarded([&]() -> Status {
        if (client == nullptr) return bad_argument("no client given");
        if (Status s = check_struct(request, "request"); !s.ok()) return s;
        if (Status s = check_struct(stored, "stored"); !s.ok()) return s;
        if (!(seconds > 0 && seconds <= kDay))
            return bad_argument("a patience is more than 0 and at most a day");
        const Result<kvcast_stored> found = client::look_up(*client, *request, seconds);
        if (found.ok()) *stored = found.value();
        return found.status();
    });
}

int kvcast_session_wait(kvcast_session* session, double seconds, kvcast_summary* summary) {
    bool pending = false;
    const int code = guarded([&]() -> Status {
        if (session == nullptr) return bad_argument("no session given");
        if (summary != nullptr) {
            if (Status s = check_struct(summary, "summary"); !s.ok()) return s;
        }
        if (std::isnan(seconds)) return bad_argument("a patience that is not a number");
        if (Status s = check_thread(*session->connections); !s.ok()) return s;
        // What is longer than a day waits as long as it takes.
        pending =
            seconds >= 0 && seconds < kDay && !session->session->wait_for(streamer::from_seconds(seconds));
        if (pending) return {};
        const streamer::Summary ended = session->session->wait();
        if (summary != nullptr) *summary = described(ended);
        if (ended.network_measured) remember_link(session->client.cache_folder, session->url, ended.network);
        return ended.status;
    });
    return pending ? told(KVCAST_PENDING, "the session has not ended yet") : code;
}

const char* kvcast_session_troubles(kvcast_session* session) {
    const char* lines = nullptr;
    guarded([&]() -> Status {
        if (session == nullptr) return bad_argument("no session given");
        if (session->session->wait_for(streamer::Duration(0))) lines = session->troubles();
        return {};
    });
    return lines;
}

void kvcast_session_cancel(kvcast_session* session) {
    guarded([&]() -> Status {
        if (session != nullptr) session->session->cancel();
        return {};
    });
}

void kvcast_session_close(kvcast_session* session) {
    delete session;
}

}  // extern "C"
