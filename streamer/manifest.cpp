#include "streamer/manifest.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cmath>

#include "codec/format/byte_reader.h"
#include "codec/format/byte_writer.h"
#include "codec/format/chain.h"
#include "streamer/encoding.h"
#include "streamer/json_gate.h"

namespace kvcast::streamer {
namespace {

using Json = nlohmann::json;

constexpr std::uint64_t kManifestVersion = 1;

constexpr std::string_view kKnownKeys[] = {
    "kvcast_manifest", "model",   "layout", "base_position", "calibration", "levels",  "chunks", "created",
    "expires",         "session", "id",     "bytes",         "level",       "profile", "kl",     "chain",
    "tokens",          "objects", "sha256", "token_ids",
};
// Of one chunk with all its token ids, or of all else.
constexpr std::size_t kMostContainers = 4 * ManifestLimits::kLevels;
constexpr std::size_t kMostValues = ChunkLimits::kTokens + 8 * ManifestLimits::kLevels;

// The first thing that is wrong with a manifest. Thrown inside read_manifest() only.
struct Wrong {
    std::string what;
};

[[noreturn]] void wrong(std::string what) {
    throw Wrong{std::move(what)};
}

const Json& field(const Json& object, const char* name) {
    if (!object.is_object()) wrong(fmt::format("expected an object with '{}'", name));
    const auto it = object.find(name);
    if (it == object.end()) wrong(fmt::format("'{}' is missing", name));
    return *it;
}

std::uint64_t number(const Json& object, const char* name, std::uint64_t most) {
    const Json& value = field(object, name);
    if (!value.is_number_unsigned() || value.get<std::uint64_t>() > most)
        wrong(fmt::format("'{}' is not a whole number of at most {}", name, most));
    return value.get<std::uint64_t>();
}

const std::string& text(const Json& object, const char* name) {
    const Json& value = field(object, name);
    if (!value.is_string()) wrong(fmt::format("'{}' is not a string", name));
    return value.get_ref<const std::string&>();
}

const Json& list(const Json& object, const char* name, std::size_t least, std::size_t most) {
    const Json& value = field(object, name);
    if (!value.is_array() || value.size() < least || value.size() > most)
        wrong(fmt::format("'{}' is not a list of {} to {} entries", name, least, most));
    return value;
}

Hash hash(const Json& object, const char* name) {
    const auto value = hash_from_hex(text(object, name));
    if (!value) wrong(fmt::format("'{}' is not 64 lower-case hexadecimal digits", name));
    return *value;
}

std::int64_t time(const Json& object, const char* name) {
    const auto value = parse_time(text(object, name));
    if (!value) wrong(fmt::format("'{}' is not a time like 2026-11-21T05:00:00Z", name));
    return *value;
}

Layout layout(const Json& object) {
    const auto bytes = base64_decode(text(object, "layout"));
    if (!bytes) wrong("'layout' is not base64");
    ByteReader in(*bytes);
    Result<Layout> value = read_layout(in);
    if (!value.ok()) wrong("layout: " + value.status().message());
    if (in.left() != 0) wrong(fmt::format("'layout' has {} bytes too many", in.left()));
    return std::move(value.value());
}

Profile profile(const Json& object) {
    for (const Profile p : {Profile::kLossless, Profile::kDelta, Profile::kKlt}) {
        if (text(object, "profile") == profile_name(p)) return p;
    }
    wrong(fmt::format("unknown profile '{}'", text(object, "profile")));
}

std::vector<ManifestLevel> levels(const Json& object) {
    std::vector<ManifestLevel> out;
    for (const Json& entry : list(object, "levels", 1, ManifestLimits::kLevels)) {
        ManifestLevel l = {static_cast<unsigned>(number(entry, "level", 255)), profile(entry), std::nullopt};
        if ((l.level == 0) != (l.profile == Profile::kLossless))
            wrong(fmt::format("level {} cannot be {}", l.level, profile_name(l.profile)));
        if (!out.empty() && out.back().level >= l.level) wrong("levels are not in ascending order");
        if (entry.contains("kl")) {
            const Json& kl = entry["kl"];
            if (!kl.is_number() || !(kl.get<double>() >= 0) || !std::isfinite(kl.get<double>()))
                wrong("'kl' is not a number of nats");
            l.kl = kl.get<double>();
        }
        out.push_back(l);
    }
    return out;
}

std::vector<std::int32_t> token_ids(const Json& chunk, std::size_t tokens) {
    std::vector<std::int32_t> out;
    if (!chunk.contains("token_ids")) return out;
    for (const Json& id : list(chunk, "token_ids", tokens, tokens)) {
        if (!id.is_number_unsigned() || id.get<std::uint64_t>() > INT32_MAX) wrong("a token id is not one");
        out.push_back(id.get<std::int32_t>());
    }
    return out;
}

ManifestChunk chunk(const Json& entry) {
    ManifestChunk out;
    out.chain = hash(entry, "chain");
    out.tokens = number(entry, "tokens", ChunkLimits::kTokens);
    if (out.tokens == 0) wrong("a chunk has no tokens");
    out.token_ids = token_ids(entry, out.tokens);
    for (const Json& object : list(entry, "objects", 1, ManifestLimits::kLevels)) {
        const ManifestObject o = {static_cast<unsigned>(number(object, "level", 255)),
                                  number(object, "bytes", ManifestLimits::kObjectBytes),
                                  hash(object, "sha256")};
        if (o.bytes == 0) wrong("an object has no bytes");
        if (!out.objects.empty() && out.objects.back().level >= o.level)
            wrong("objects are not in ascending order of level");
        out.objects.push_back(o);
    }
    return out;
}

void check_levels_of(const ManifestChunk& chunk, const std::vector<ManifestLevel>& levels) {
    for (const ManifestObject& o : chunk.objects) {
        if (std::ranges::find(levels, o.level, &ManifestLevel::level) == levels.end())
            wrong(fmt::format("level {} of an object is not listed", o.level));
    }
}

// Takes chunks out of a document while it is parsed, so that only one at a time is there as JSON.
class ChunkTaker {
  public:
    bool operator()(int depth, Json::parse_event_t event, const Json& parsed) {
        using Event = Json::parse_event_t;
        if (!gate_(depth, event, parsed)) return false;
        if (depth == 1 && event == Event::key) {
            in_chunks_ = parsed == "chunks";
            if (in_chunks_ && !chunks.empty()) wrong("'chunks' is there twice");
        }
        if (!in_chunks_) return true;
        const bool begins =
            event == Event::value || event == Event::array_start || event == Event::object_start;
        if (begins &&
            ((depth == 1 && event != Event::array_start) || (depth == 2 && event != Event::object_start)))
            wrong("'chunks' is not a list of objects");
        if (depth != 2 || event != Event::object_end) return true;
        if (chunks.size() == ManifestLimits::kChunks)
            wrong(fmt::format("more than {} 'chunks'", ManifestLimits::kChunks));
        chunks.push_back(chunk(parsed));
        gate_.forget();
        return false;
    }

    std::vector<ManifestChunk> chunks;

  private:
    JsonGate gate_{kKnownKeys, kMostContainers, kMostValues};
    bool in_chunks_ = false;
};

Manifest parse(const Json& json, std::vector<ManifestChunk> chunks) {
    if (number(json, "kvcast_manifest", UINT64_MAX) != kManifestVersion)
        wrong(fmt::format("version {}, this library reads {}", json["kvcast_manifest"].dump(),
                          kManifestVersion));
    Manifest out;
    out.model = text(json, "model");
    if (out.model.size() > ChunkLimits::kModelBytes) wrong("'model' is too long");
    out.layout = layout(json);
    out.base_position = number(json, "base_position", ChunkLimits::kPosition);
    if (json.contains("calibration")) {
        const Json& c = json["calibration"];
        out.calibration = {hash(c, "id"), number(c, "bytes", ManifestLimits::kObjectBytes)};
        if (out.calibration->bytes == 0) wrong("a calibration has no bytes");
    }
    out.levels = levels(json);
    list(json, "chunks", 0, 0);  // they were taken out
    if (chunks.empty()) wrong("'chunks' is a list of none");
    for (const ManifestChunk& c : chunks) check_levels_of(c, out.levels);
    out.chunks = std::move(chunks);
    out.created = time(json, "created");
    if (json.contains("expires")) out.expires = time(json, "expires");
    if (json.contains("session")) out.session = text(json, "session");
    const bool klt =
        std::ranges::find(out.levels, Profile::kKlt, &ManifestLevel::profile) != out.levels.end();
    if (klt && !out.calibration) wrong("levels of the klt profile, and no calibration");
    return out;
}

}  // namespace

std::size_t Manifest::tokens() const {
    std::size_t total = 0;
    for (const ManifestChunk& c : chunks) total += c.tokens;
    return total;
}

std::string write_manifest(const Manifest& m) {
    std::vector<std::uint8_t> layout_bytes;
    ByteWriter out(layout_bytes);
    write_layout(m.layout, out);
    Json json = {{"kvcast_manifest", kManifestVersion},
                 {"model", m.model},
                 {"layout", base64_encode(layout_bytes)},
                 {"base_position", m.base_position},
                 {"created", format_time(m.created)}};
    if (m.calibration)
        json["calibration"] = {{"id", to_hex(m.calibration->id)}, {"bytes", m.calibration->bytes}};
    if (m.expires) json["expires"] = format_time(*m.expires);
    if (!m.session.empty()) json["session"] = m.session;
    for (const ManifestLevel& l : m.levels) {
        Json entry = {{"level", l.level}, {"profile", profile_name(l.profile)}};
        if (l.kl) entry["kl"] = *l.kl;
        json["levels"].push_back(std::move(entry));
    }
    for (const ManifestChunk& c : m.chunks) {
        Json entry = {{"chain", to_hex(c.chain)}, {"tokens", c.tokens}, {"objects", Json::array()}};
        if (!c.token_ids.empty()) entry["token_ids"] = c.token_ids;
        for (const ManifestObject& o : c.objects)
            entry["objects"].push_back(
                {{"level", o.level}, {"bytes", o.bytes}, {"sha256", to_hex(o.sha256)}});
        json["chunks"].push_back(std::move(entry));
    }
    return json.dump() + "\n";
}

Result<Manifest> read_manifest(std::string_view json) {
    if (json.size() > ManifestLimits::kBytes) {
        return Status(ErrorCode::kBadManifest, fmt::format("manifest: {} bytes, at most {} are read",
                                                           json.size(), ManifestLimits::kBytes));
    }
    try {
        ChunkTaker taker;
        const Json parsed = Json::parse(json, std::ref(taker), false);
        if (parsed.is_discarded()) wrong("not JSON");
        return parse(parsed, std::move(taker.chunks));
    } catch (const Wrong& w) {
        return Status(ErrorCode::kBadManifest, "manifest: " + w.what);
    } catch (const JsonRefused& r) {
        return Status(ErrorCode::kBadManifest, std::string("manifest: ") + r.what);
    }
}

Result<std::size_t> confirm_chain(const Manifest& manifest, std::string_view salt,
                                  std::span<const std::int32_t> token_ids) {
    const Hash layout = layout_hash(manifest.layout);
    Hash parent = {};
    std::size_t first = 0;
    for (std::size_t i = 0; i < manifest.chunks.size(); ++i) {
        const ManifestChunk& c = manifest.chunks[i];
        std::span<const std::int32_t> ids = c.token_ids;
        if (!token_ids.empty()) {
            if (token_ids.size() < first + c.tokens) return i;
            ids = token_ids.subspan(first, c.tokens);
        }
        if (ids.empty()) {
            return Status(ErrorCode::kBadArgument,
                          "the manifest keeps the token ids back, and the caller gave none");
        }
        parent = chain_hash(parent, salt, layout, manifest.model, ids);
        if (parent != c.chain) {
            if (i != 0 && !token_ids.empty()) return i;
            return Status(ErrorCode::kForeign,
                          fmt::format("chunk {} is not of these tokens, or of another salt", i));
        }
        first += c.tokens;
    }
    return manifest.chunks.size();
}

std::int64_t system_seconds() {
    const auto now = std::chrono::system_clock::now().time_since_epoch();
    return std::chrono::duration_cast<std::chrono::seconds>(now).count();
}

std::string format_time(std::int64_t seconds) {
    using namespace std::chrono;
    const sys_seconds at{std::chrono::seconds(seconds)};
    const auto day = floor<days>(at);
    const year_month_day date(day);
    const hh_mm_ss clock(at - day);
    return fmt::format("{:04}-{:02}-{:02}T{:02}:{:02}:{:02}Z", static_cast<int>(date.year()),
                       static_cast<unsigned>(date.month()), static_cast<unsigned>(date.day()),
                       clock.hours().count(), clock.minutes().count(), clock.seconds().count());
}

std::optional<std::int64_t> parse_time(std::string_view text) {
    constexpr std::string_view shape = "dddd-dd-ddTdd:dd:ddZ";
    if (text.size() != shape.size()) return std::nullopt;
    int parts[6] = {};
    std::size_t part = 0;
    for (std::size_t i = 0; i < shape.size(); ++i) {
        if (shape[i] == 'd') {
            if (text[i] < '0' || text[i] > '9') return std::nullopt;
            parts[part] = parts[part] * 10 + (text[i] - '0');
        } else {
            if (text[i] != shape[i]) return std::nullopt;
            ++part;
        }
    }
    using namespace std::chrono;
    const year_month_day date{year{parts[0]}, month{static_cast<unsigned>(parts[1])},
                              day{static_cast<unsigned>(parts[2])}};
    if (!date.ok() || parts[3] > 23 || parts[4] > 59 || parts[5] > 59) return std::nullopt;
    return duration_cast<seconds>(
               (sys_days{date} + hours{parts[3]} + minutes{parts[4]} + seconds{parts[5]}).time_since_epoch())
        .count();
}

}  // namespace kvcast::streamer
