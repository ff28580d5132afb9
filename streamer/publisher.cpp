#include "streamer/publisher.h"

#include <fmt/format.h>

#include "codec/format/chain.h"
#include "streamer/encoding.h"
#include "streamer/store.h"

namespace kvcast::streamer {
namespace {

// What the manifest is as a file. One that no reader accepts would stop every later collection, too.
Result<std::string> readable_document(const Manifest& m) {
    for (const auto& [name, text] : {std::pair("model", &m.model), std::pair("session", &m.session)}) {
        if (!is_utf8(*text))
            return Status(ErrorCode::kBadArgument, fmt::format("manifest: '{}' is not UTF-8", name));
    }
    std::string document = write_manifest(m);
    const Result<Manifest> back = read_manifest(document);
    if (back.ok()) return document;
    return Status(ErrorCode::kBadArgument, "no reader would accept the " + back.status().message());
}

Result<Manifest> read_stored(std::span<const std::uint8_t> document, std::span<const PublicKey> trusted) {
    const Result<std::string> json =
        open_manifest({reinterpret_cast<const char*>(document.data()), document.size()}, trusted);
    if (!json.ok()) return json.status();
    return read_manifest(json.value());
}

}  // namespace

Result<Publisher> Publisher::open(Destination& destination, std::int64_t now) {
    Result<std::shared_ptr<void>> lock = destination.lock(false);
    if (!lock.ok()) return lock.status();
    return Publisher(destination, now, std::move(lock.value()));
}

Status Publisher::put_once(const std::string& name, std::span<const std::uint8_t> bytes) {
    Result<std::optional<StoredObject>> found = destination_->find(name);
    if (!found.ok()) return found.status();
    const auto& stored = found.value();
    if (!stored || stored->bytes != bytes.size()) {
        ++bytes_.objects_written;
        bytes_.written += bytes.size();
        return destination_->put(name, bytes);
    }
    ++bytes_.objects_reused;
    bytes_.reused += bytes.size();
    // An old object that no living manifest names may be collected before ours is written.
    if (is_old(*stored)) return destination_->refresh(name, bytes);
    return {};
}

Result<ManifestObject> Publisher::put_object(const Hash& chain, unsigned level,
                                             std::span<const std::uint8_t> object) {
    const ManifestObject entry = {level, object.size(), sha256(object)};
    if (Status s = put_once(object_name(chain, entry), object); !s.ok()) return s;
    return entry;
}

Result<ManifestCalibration> Publisher::put_calibration(std::span<const std::uint8_t> file) {
    const ManifestCalibration entry = {sha256(file), file.size()};
    if (Status s = put_once(calibration_name(entry.id), file); !s.ok()) return s;
    return entry;
}

// A store that has a chunk's pointer has those of all chunks before it: bisection.
std::optional<Manifest> Publisher::find_prefix(std::span<const Hash> chains, const PrivateKey* key) {
    std::string found;
    for (std::size_t known = 0, unknown = chains.size(); known < unknown;) {
        const std::size_t probed = (known + unknown) / 2;
        const auto pointer = destination_->get(pointer_name(chains[probed]));
        if (!pointer.ok() && pointer.status().code() != ErrorCode::kNotStored) return std::nullopt;
        auto name = pointer.ok() ? manifest_of_pointer(pointer.value()) : std::nullopt;
        if (name) {
            known = probed + 1;
            found = std::move(*name);
        } else {
            unknown = probed;
        }
    }
    if (found.empty()) return std::nullopt;
    const auto document = destination_->get(found);
    if (!document.ok()) return std::nullopt;
    std::vector<PublicKey> trusted;
    if (key != nullptr) trusted.push_back(key->public_key());
    Result<Manifest> manifest = read_stored(document.value(), trusted);
    if (!manifest.ok()) return std::nullopt;
    const auto& expires = manifest.value().expires;
    if (expires && *expires <= now_) return std::nullopt;
    return std::move(manifest.value());
}

Result<bool> Publisher::keep_chunk(const ManifestChunk& chunk) {
    std::uint64_t bytes = 0;
    for (const ManifestObject& o : chunk.objects) {
        const std::string name = object_name(chunk.chain, o);
        const Result<std::optional<StoredObject>> found = destination_->find(name);
        if (!found.ok()) return found.status();
        if (!found.value() || found.value()->bytes != o.bytes) return false;
        bytes += o.bytes;
        if (!is_old(*found.value())) continue;
        const Result<std::vector<std::uint8_t>> object = destination_->get(name);
        if (!object.ok() || sha256(object.value()) != o.sha256) return false;
        if (Status s = destination_->refresh(name, object.value()); !s.ok()) return s;
    }
    bytes_.objects_reused += chunk.objects.size();
    bytes_.reused += bytes;
    return true;
}

Status Publisher::check_all_there(const Manifest& manifest) {
    const auto check = [&](const std::string& name, std::uint64_t bytes) -> Status {
        Result<std::optional<StoredObject>> found = destination_->find(name);
        if (!found.ok()) return found.status();
        if (found.value() && found.value()->bytes == bytes) return {};
        return {ErrorCode::kObjectMismatch, fmt::format("{}: not in the store after it was written", name)};
    };
    for (const ManifestChunk& c : manifest.chunks) {
        for (const ManifestObject& o : c.objects) {
            if (Status s = check(object_name(c.chain, o), o.bytes); !s.ok()) return s;
        }
    }
    if (!manifest.calibration) return {};
    return check(calibration_name(manifest.calibration->id), manifest.calibration->bytes);
}

Result<std::string> Publisher::finish(const Manifest& manifest, const PrivateKey* key) {
    Result<std::string> readable = readable_document(manifest);
    if (!readable.ok()) return readable.status();
    if (Status s = check_all_there(manifest); !s.ok()) return s;
    const std::string name = manifest_name(manifest);
    std::string document = std::move(readable.value());
    if (key != nullptr) document = sign_manifest(document, *key);
    Status s =
        destination_->put(name, {reinterpret_cast<const std::uint8_t*>(document.data()), document.size()});
    for (std::size_t i = 0; s.ok() && i < manifest.chunks.size(); ++i)
        s = put_pointer(pointer_name(manifest.chunks[i].chain), name, manifest);
    if (!s.ok()) return s;
    return name;
}

Status Publisher::put_pointer(const std::string& name, const std::string& target, const Manifest& manifest) {
    const Result<std::vector<std::uint8_t>> present = destination_->get(name);
    if (!present.ok() && present.status().code() != ErrorCode::kNotStored) return present.status();
    const auto other = present.ok() ? manifest_of_pointer(present.value()) : std::nullopt;
    if (other == target) return {};
    if (other) {
        const Result<bool> stays = outlives(*other, manifest);
        if (!stays.ok()) return stays.status();
        if (stays.value()) return {};
    }
    const std::string pointer = pointer_to(target);
    return destination_->put(name, {reinterpret_cast<const std::uint8_t*>(pointer.data()), pointer.size()});
}

// As lives_longer(), which is asked once of each manifest.
Result<bool> Publisher::outlives(const std::string& other_name, const Manifest& manifest) {
    const auto known = outlives_.find(other_name);
    if (known != outlives_.end()) return known->second;
    Result<bool> longer = lives_longer(other_name, manifest);
    if (longer.ok()) outlives_.emplace(other_name, longer.value());
    return longer;
}

// Whether another manifest is there, and lives longer than ours. One that cannot be had at the moment may be,
// and its pointers must not be led to ours.
Result<bool> Publisher::lives_longer(const std::string& other_name, const Manifest& manifest) {
    const Result<std::vector<std::uint8_t>> document = destination_->get(other_name);
    if (document.status().code() == ErrorCode::kNotStored) return false;
    if (!document.ok()) return document.status();
    const Result<Manifest> other = read_stored(document.value(), {});
    if (!other.ok()) return false;  // no reader takes it either
    const auto& expires = other.value().expires;
    return !expires || (manifest.expires && *expires > *manifest.expires);
}

}  // namespace kvcast::streamer
