// Writes a publication: objects first, the manifest last, so that whoever sees the manifest finds all that it
// names. STORE.md, section 4.
#pragma once

#include <map>
#include <optional>
#include <span>
#include <string>

#include "streamer/destination.h"
#include "streamer/manifest.h"
#include "streamer/signature.h"

namespace kvcast::streamer {

// Objects that no manifest names are left alone until they are this old: they may belong to a publication
// whose manifest is still to come.
inline constexpr std::int64_t kGraceSeconds = 3600;

struct PublishedBytes {
    std::uint64_t written = 0;
    std::uint64_t reused = 0;  // were there already
    std::size_t objects_written = 0;
    std::size_t objects_reused = 0;
};

// Calls in this order: open(), then objects and the calibration in any order, then finish() once. One thread
// at a time.
class Publisher {
  public:
    // `now`: seconds since 1970. Holds the destination's shared lock until destroyed.
    static Result<Publisher> open(Destination& destination, std::int64_t now);

    // What is there already under the same name (which holds its hash) is not written again.
    Result<ManifestObject> put_object(const Hash& chain, unsigned level,
                                      std::span<const std::uint8_t> object);
    Result<ManifestCalibration> put_calibration(std::span<const std::uint8_t> file);

    // The stored publication with the most leading chunks of these identities, which are a context's in
    // order: one that has not expired, and that `key` has signed where it is given. Nothing where there is
    // none, or where it cannot be read for whatever reason. What it says of objects is not looked at.
    std::optional<Manifest> find_prefix(std::span<const Hash> chains, const PrivateKey* key);
    // For a chunk of a stored publication, instead of put_object(): whether all its objects are there, by
    // name and size. They are renewed as put_object() does it; those that are for it are read, and one that
    // does not hash to what it should, or cannot be read, counts as not there.
    Result<bool> keep_chunk(const ManifestChunk& chunk);

    // Checks that readers will accept the manifest (else kBadArgument) and that every object it names is
    // there, writes the manifest (signed where a key is given) and then the chunks' pointers. Returns the
    // manifest's name.
    Result<std::string> finish(const Manifest& manifest, const PrivateKey* key);

    const PublishedBytes& bytes() const { return bytes_; }

  private:
    Publisher(Destination& destination, std::int64_t now, std::shared_ptr<void> lock)
        : destination_(&destination), now_(now), lock_(std::move(lock)) {}

    // Whether a collector might take it before our manifest is there.
    bool is_old(const StoredObject& stored) const { return now_ - stored.modified > kGraceSeconds / 2; }
    Status put_once(const std::string& name, std::span<const std::uint8_t> bytes);
    Status check_all_there(const Manifest& manifest);
    Status put_pointer(const std::string& name, const std::string& manifest_name, const Manifest& manifest);
    Result<bool> outlives(const std::string& other_name, const Manifest& manifest);
    Result<bool> lives_longer(const std::string& other_name, const Manifest& manifest);

    Destination* destination_;
    std::int64_t now_;
    std::shared_ptr<void> lock_;
    PublishedBytes bytes_;
    std::map<std::string, bool> outlives_;  // by manifest: whether other pointers may keep naming it
};

struct Collection {
    std::size_t manifests_removed = 0;
    std::size_t objects_removed = 0;
    std::uint64_t bytes_removed = 0;
    std::size_t manifests_kept = 0;
    std::size_t objects_kept = 0;
    std::size_t objects_young = 0;  // unnamed, and not old enough
};

struct CollectOptions {
    std::int64_t now = 0;
    std::optional<std::string> session;  // publications with this tag are removed whatever their expiry
    std::int64_t grace_seconds = kGraceSeconds;
    bool dry_run = false;
};

// Removes expired manifests, those of a session, and then every object that no other manifest names. Removes
// nothing if the store cannot be listed to its end or any manifest cannot be read, since what is named cannot
// be known. Stops at a pointer that cannot be read; what was removed by then was to go.
Result<Collection> collect(Destination& destination, const CollectOptions& options);

}  // namespace kvcast::streamer
