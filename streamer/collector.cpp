#include <fmt/format.h>

#include <map>
#include <set>

#include "codec/format/chain.h"
#include "streamer/publisher.h"
#include "streamer/store.h"

namespace kvcast::streamer {
namespace {

bool is_manifest(const std::string& name) {
    return name.starts_with("manifests/") && name.ends_with(".json");
}

// Only what a publisher writes is ever removed: a store may share its folder with other files.
bool is_ours(const std::string& name) {
    if (name.starts_with("calibrations/")) return name.ends_with(".kvcal");
    return name.size() > 65 && name[64] == '/' && hash_from_hex(std::string_view(name).substr(0, 64)) &&
           (name.ends_with(".kvc") || name.ends_with("/manifest"));
}

// What a publisher that was killed was writing: its target's name and ".NUMBER.part". Only folders have them.
bool is_partial(std::string_view name) {
    constexpr std::string_view kSuffix = ".part";
    if (!name.ends_with(kSuffix)) return false;
    name.remove_suffix(kSuffix.size());
    const std::size_t last = name.find_last_not_of("0123456789");
    if (last == std::string_view::npos || last + 1 == name.size() || name[last] != '.') return false;
    const std::string target(name.substr(0, last));
    return is_ours(target) || is_manifest(target);
}

Result<Manifest> read_stored(Destination& destination, const std::string& name) {
    Result<std::vector<std::uint8_t>> document = destination.get(name);
    if (!document.ok()) return document.status();
    const auto& bytes = document.value();
    Result<std::string> json = open_manifest({reinterpret_cast<const char*>(bytes.data()), bytes.size()}, {});
    if (!json.ok()) return json.status();
    return read_manifest(json.value());
}

// What living manifests name.
struct Living {
    std::set<std::string> manifests;
    std::set<std::string> objects;
    std::map<std::string, std::string> pointers;  // name -> what it should say

    void add(const std::string& name, const Manifest& m) {
        manifests.insert(name);
        for (const ManifestChunk& c : m.chunks) {
            for (const ManifestObject& o : c.objects) objects.insert(object_name(c.chain, o));
            pointers.emplace(pointer_name(c.chain), pointer_to(manifest_name(m)));
        }
        if (m.calibration) objects.insert(calibration_name(m.calibration->id));
    }
};

class Collector {
  public:
    Collector(Destination& destination, const CollectOptions& options)
        : destination_(destination), options_(options) {}

    Result<Collection> run() {
        const Result<std::shared_ptr<void>> lock = destination_.lock(true);
        if (!lock.ok()) return lock.status();
        Result<std::vector<StoredObject>> all = destination_.list();
        if (!all.ok()) return all.status();
        Status s = sort_manifests(all.value());
        // Manifests go first: nobody begins to read what is about to vanish.
        for (auto it = dead_.begin(); s.ok() && it != dead_.end(); ++it) s = remove({*it, 0, 0});
        for (auto it = all.value().begin(); s.ok() && it != all.value().end(); ++it) s = visit(*it);
        if (!s.ok()) return s;
        return result_;
    }

  private:
    Status sort_manifests(const std::vector<StoredObject>& all) {
        for (const StoredObject& o : all) {
            if (!is_manifest(o.name)) continue;
            const Result<Manifest> manifest = read_stored(destination_, o.name);
            if (!manifest.ok()) {
                return {manifest.status().code(),
                        fmt::format("{}: {}; nothing was removed", o.name, manifest.status().message())};
            }
            const Manifest& m = manifest.value();
            const bool expired = m.expires && *m.expires <= options_.now;
            if (expired || (options_.session && m.session == *options_.session)) {
                dead_.insert(o.name);
            } else {
                living_.add(o.name, m);
                ++result_.manifests_kept;
            }
        }
        result_.manifests_removed = dead_.size();
        return {};
    }

    Status visit(const StoredObject& object) {
        if (!is_ours(object.name) && !is_partial(object.name)) return {};
        if (object.name.ends_with("/manifest")) return visit_pointer(object);
        if (living_.objects.contains(object.name)) {
            ++result_.objects_kept;
            return {};
        }
        // A publisher may have touched it since it was listed.
        Result<std::optional<StoredObject>> now = destination_.find(object.name);
        if (!now.ok()) return now.status();
        if (!now.value()) return {};
        if (options_.now - now.value()->modified < options_.grace_seconds) {
            ++result_.objects_young;
            return {};
        }
        ++result_.objects_removed;
        result_.bytes_removed += object.bytes;
        return remove(object);
    }

    // Stays while it leads to a manifest, is led to a living one, or goes.
    Status visit_pointer(const StoredObject& object) {
        const Result<std::vector<std::uint8_t>> present = destination_.get(object.name);
        if (!present.ok() && present.status().code() != ErrorCode::kNotStored) return present.status();
        if (const auto target = present.ok() ? manifest_of_pointer(present.value()) : std::nullopt) {
            const Result<bool> there = is_there(*target);
            if (!there.ok()) return there.status();
            if (there.value()) return {};
        }
        const auto wanted = living_.pointers.find(object.name);
        if (wanted == living_.pointers.end()) return remove(object);
        if (options_.dry_run) return {};
        const std::string& text = wanted->second;
        return destination_.put(object.name,
                                {reinterpret_cast<const std::uint8_t*>(text.data()), text.size()});
    }

    Result<bool> is_there(const std::string& manifest) {
        if (living_.manifests.contains(manifest)) return true;
        if (dead_.contains(manifest)) return false;
        // One that was not listed is that of a publication just finished.
        const Result<std::optional<StoredObject>> found = destination_.find(manifest);
        if (!found.ok()) return found.status();
        return found.value().has_value();
    }

    Status remove(const StoredObject& object) {
        return options_.dry_run ? Status() : destination_.remove(object.name);
    }

    Destination& destination_;
    const CollectOptions& options_;
    std::set<std::string> dead_;
    Living living_;
    Collection result_;
};

}  // namespace

Result<Collection> collect(Destination& destination, const CollectOptions& options) {
    return Collector(destination, options).run();
}

}  // namespace kvcast::streamer
