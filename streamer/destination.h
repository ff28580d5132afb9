// Where a publication is written: a folder that some server serves, or a server that takes PUT.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "codec/format/error.h"

namespace kvcast::streamer {

struct StoredObject {
    std::string name;
    std::uint64_t bytes = 0;
    std::int64_t modified = 0;  // seconds since 1970; 0: the store does not say
};

// Names are relative to the root. Calls block. One thread at a time.
class Destination {
  public:
    virtual ~Destination() = default;

    virtual const std::string& root() const = 0;  // as the user wrote it
    // Nothing where there is no such object.
    virtual Result<std::optional<StoredObject>> find(const std::string& name) = 0;
    // Readers see the old object or the new one, never a part. Replaces.
    virtual Status put(const std::string& name, std::span<const std::uint8_t> bytes) = 0;
    // As put() of what is there already: the object's age starts anew.
    virtual Status refresh(const std::string& name, std::span<const std::uint8_t> bytes) {
        return put(name, bytes);
    }
    // kNotStored where there is no such object, as opposed to one that cannot be had at the moment.
    virtual Result<std::vector<std::uint8_t>> get(const std::string& name) = 0;
    // Removing what is not there succeeds.
    virtual Status remove(const std::string& name) = 0;
    // Everything in the store; kBadArgument where the server cannot say.
    virtual Result<std::vector<StoredObject>> list() = 0;
    // Keeps collectors (exclusive) and publishers (shared) apart until the lock is dropped; null where the
    // store has no locks.
    virtual Result<std::shared_ptr<void>> lock(bool exclusive) {
        (void)exclusive;
        return std::shared_ptr<void>();
    }
};

// A folder, made where it is missing. Files appear by rename, after their bytes are on disk.
Result<std::unique_ptr<Destination>> folder_destination(const std::string& path);

}  // namespace kvcast::streamer
