// Publications are whole or not there, shared content is stored once, and collection takes only what nobody
// needs.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/inotify.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <filesystem>
#include <functional>
#include <set>
#include <thread>

#include "codec/format/chain.h"
#include "streamer/publisher.h"
#include "streamer/store.h"
#include "tests/streamer/keys.h"
#include "tests/streamer/publication.h"

namespace kvcast::test {
namespace {

using namespace streamer;
using testing::HasSubstr;

// A store that cannot give one of its objects at the moment.
class Failing final : public Destination {
  public:
    Failing(Destination& store, std::string lost) : store_(store), lost_(std::move(lost)) {}

    const std::string& root() const override { return store_.root(); }
    Result<std::optional<StoredObject>> find(const std::string& name) override { return store_.find(name); }
    Status put(const std::string& name, std::span<const std::uint8_t> bytes) override {
        return store_.put(name, bytes);
    }
    Result<std::vector<std::uint8_t>> get(const std::string& name) override {
        if (name == lost_) return Status(ErrorCode::kHttpStatus, name + ": HTTP status 503");
        return store_.get(name);
    }
    Status remove(const std::string& name) override { return store_.remove(name); }
    Result<std::vector<StoredObject>> list() override { return store_.list(); }

  private:
    Destination& store_;
    const std::string lost_;
};

class StoreTest : public testing::Test {
  protected:
    StoreTest() : store(std::move(folder_destination(folder / "store").value())) {
        small.levels = {2, 6};
        small.now = system_seconds();
    }

    std::set<std::string> names() {
        std::set<std::string> out;
        const auto all = store->list();
        for (const StoredObject& o : all.value()) out.insert(o.name);
        return out;
    }
    static std::set<std::string> named_by(const Published& p) {
        std::set<std::string> out = {p.name};
        for (const ManifestChunk& c : p.manifest.chunks) {
            out.insert(pointer_name(c.chain));
            for (const ManifestObject& o : c.objects) out.insert(object_name(c.chain, o));
        }
        if (p.manifest.calibration) out.insert(calibration_name(p.manifest.calibration->id));
        return out;
    }
    Collection gc(std::int64_t later = 0, std::optional<std::string> session = {}, bool dry = false) {
        const Result<Collection> c =
            collect(*store, {system_seconds() + later, std::move(session), kGraceSeconds, dry});
        EXPECT_TRUE(c.ok()) << c.status().message();
        return c.ok() ? c.value() : Collection();
    }
    std::string target_of_pointer(const Hash& chain) {
        return manifest_of_pointer(store->get(pointer_name(chain)).value()).value_or("");
    }
    Manifest stored(const std::string& name) {
        const auto bytes = store->get(name).value();
        return read_manifest(
                   open_manifest({reinterpret_cast<const char*>(bytes.data()), bytes.size()}, {}).value())
            .value();
    }

    tools::ScratchDirectory folder;
    std::unique_ptr<Destination> store;
    PublicationOptions small;
};

TEST_F(StoreTest, APublicationIsWhatItsManifestNames) {
    small.klt = true;
    small.levels = {0, 1, 3};
    const Published p = publish(*store, small);
    EXPECT_EQ(names(), named_by(p));
    EXPECT_EQ(stored(p.name), p.manifest);
    for (const ManifestChunk& c : p.manifest.chunks) {
        for (const ManifestObject& o : c.objects) {
            const auto object = store->get(object_name(c.chain, o)).value();
            EXPECT_EQ(object.size(), o.bytes);
            EXPECT_EQ(sha256(object), o.sha256);
        }
        const auto pointer = store->get(pointer_name(c.chain)).value();
        EXPECT_EQ(manifest_of_pointer(pointer), p.name);
    }
}

TEST_F(StoreTest, PublishingAgainWritesNoObjectAgain) {
    const Published first = publish(*store, small);
    const Published second = publish(*store, small);
    EXPECT_EQ(first.bytes.objects_written, 8u);
    EXPECT_EQ(second.bytes.objects_written, 0u);
    EXPECT_EQ(second.bytes.objects_reused, 8u);
    EXPECT_EQ(second.bytes.reused, first.bytes.written);
    EXPECT_EQ(second.name, first.name);
}

TEST_F(StoreTest, ASharedPrefixIsStoredOnce) {
    small.tokens = 128;
    const Published prefix = publish(*store, small);
    small.tokens = 256;
    const Published whole = publish(*store, small);
    EXPECT_EQ(whole.bytes.objects_reused, 4u);
    EXPECT_EQ(whole.bytes.objects_written, 4u);
    EXPECT_NE(whole.name, prefix.name);
}

TEST_F(StoreTest, ASaltKeepsTenantsApart) {
    publish(*store, small);
    small.salt = "tenant";
    EXPECT_EQ(publish(*store, small).bytes.objects_reused, 0u);
}

TEST_F(StoreTest, ADamagedObjectIsWrittenAgain) {
    const Published p = publish(*store, small);
    const std::string name = object_name(p.manifest.chunks[0].chain, p.manifest.chunks[0].objects[0]);
    ASSERT_TRUE(store->put(name, {}).ok());
    EXPECT_EQ(publish(*store, small).bytes.objects_written, 1u);
}

TEST_F(StoreTest, NoManifestIsWrittenWhereAnObjectIsMissing) {
    const Published p = publish(*store, small);
    ASSERT_TRUE(store->remove(p.name).ok());
    ASSERT_TRUE(store->remove(object_name(p.manifest.chunks[1].chain, p.manifest.chunks[1].objects[1])).ok());
    auto publisher = Publisher::open(*store, system_seconds());
    EXPECT_EQ(publisher.value().finish(p.manifest, nullptr).status().code(), ErrorCode::kObjectMismatch);
    EXPECT_FALSE(names().contains(p.name));
}

TEST_F(StoreTest, NoManifestIsWrittenThatNoReaderAccepts) {
    const Published p = publish(*store, small);
    const auto before = names();
    const auto refused = [&](const char* why, const std::function<void(Manifest&)>& change) {
        SCOPED_TRACE(why);
        Manifest wrong = p.manifest;
        change(wrong);
        auto publisher = Publisher::open(*store, system_seconds());
        const Status s = publisher.value().finish(wrong, nullptr).status();
        EXPECT_EQ(s.code(), ErrorCode::kBadArgument);
        EXPECT_THAT(s.message(), HasSubstr(why));
        EXPECT_EQ(names(), before);
        EXPECT_EQ(stored(p.name), p.manifest);
    };
    refused("token id", [](Manifest& m) { m.chunks[1].token_ids[3] = -1; });
    refused("bytes, at most", [](Manifest& m) { m.session.assign(ManifestLimits::kBytes, 'x'); });
    refused("model", [](Manifest& m) { m.model += '\xff'; });
    refused("session", [](Manifest& m) { m.session += "\xc0\x80"; });
    refused("created", [](Manifest& m) { m.created = std::int64_t{1} << 40; });
}

// A prefix is shared: engines publish it at the same time, in threads of one process too.
TEST_F(StoreTest, ThreadsMayPutTheSameAtTheSameTime) {
    const std::vector<std::uint8_t> bytes(100'000, 7);
    std::atomic<std::size_t> failures = 0;
    std::vector<std::thread> threads;
    for (int i = 0; i < 4; ++i) {
        threads.emplace_back([&] {
            const auto own = std::move(folder_destination(folder / "store").value());
            for (int round = 0; round < 25; ++round) failures += !own->put("manifests/same.json", bytes).ok();
        });
    }
    for (std::thread& t : threads) t.join();
    EXPECT_EQ(failures, 0u);
    EXPECT_EQ(store->get("manifests/same.json").value(), bytes);
    EXPECT_EQ(names().size(), 1u);
}

TEST_F(StoreTest, ProcessesMayPutTheSameAtTheSameTime) {
    const std::vector<std::uint8_t> bytes(100'000, 7);
    std::vector<pid_t> children;
    for (int i = 0; i < 4; ++i) {
        const pid_t child = ::fork();
        ASSERT_GE(child, 0);
        if (child == 0) {
            bool good = true;
            for (int round = 0; round < 25; ++round) {
                for (const char* name : {"manifests/one.json", "manifests/other.json"})
                    good = store->put(name, bytes).ok() && store->get(name).value() == bytes && good;
            }
            ::_exit(good ? 0 : 1);
        }
        children.push_back(child);
    }
    for (const pid_t child : children) {
        int status = -1;
        ASSERT_EQ(::waitpid(child, &status, 0), child);
        EXPECT_EQ(status, 0);
    }
    EXPECT_EQ(names(), std::set<std::string>({"manifests/one.json", "manifests/other.json"}));
}

// Names of a process' id and a count can be foreseen, and processes of two containers may have the same.
TEST_F(StoreTest, ALinkThatWaitsForATemporaryFileIsNotFollowed) {
    std::filesystem::create_directory(folder / "store/manifests");
    for (std::uint64_t put = 0; put < 4096; ++put) {
        const std::uint64_t writer = static_cast<std::uint64_t>(::getpid()) << 32 | put;
        std::string temporary = folder / "store/manifests/a.json.";
        temporary.append(std::to_string(writer)).append(".part");
        std::filesystem::create_symlink(folder / "elsewhere", temporary);
    }
    const std::vector<std::uint8_t> bytes(10, 7);
    ASSERT_TRUE(store->put("manifests/a.json", bytes).ok());
    EXPECT_EQ(store->get("manifests/a.json").value(), bytes);
    EXPECT_FALSE(std::filesystem::is_symlink(folder / "store/manifests/a.json"));
    EXPECT_FALSE(std::filesystem::exists(folder / "elsewhere"));
}

TEST_F(StoreTest, NothingPartialIsLeft) {
    publish(*store, small);
    for (const std::string& name : names()) EXPECT_THAT(name, Not(HasSubstr(".part")));
}

TEST_F(StoreTest, CollectionKeepsWhatLives) {
    small.ttl = 3600;
    const Published p = publish(*store, small);
    const auto before = names();
    const Collection c = gc();
    EXPECT_EQ(c.manifests_kept, 1u);
    EXPECT_EQ(c.objects_kept, 8u);
    EXPECT_EQ(c.objects_removed, 0u);
    EXPECT_EQ(names(), before);
}

TEST_F(StoreTest, CollectionRemovesWhatExpired) {
    small.ttl = 3600;
    publish(*store, small);
    const Collection c = gc(7200);
    EXPECT_EQ(c.manifests_removed, 1u);
    EXPECT_EQ(c.objects_removed, 8u);
    EXPECT_TRUE(names().empty());
    EXPECT_FALSE(std::filesystem::exists(folder / "store/manifests"));
}

TEST_F(StoreTest, CollectionKeepsWhatALivingManifestShares) {
    small.ttl = 3600;
    const Published dying = publish(*store, small);
    small.ttl.reset();
    small.session = "other";
    small.tokens = 128;
    const Published living = publish(*store, small);
    gc(7200);
    EXPECT_EQ(names(), named_by(living));
    for (const ManifestChunk& c : living.manifest.chunks)
        EXPECT_EQ(manifest_of_pointer(store->get(pointer_name(c.chain)).value()), living.name);
}

TEST_F(StoreTest, CollectionRemovesASession) {
    const Published kept = publish(*store, small);
    small.session = "night";
    small.seed = 2;
    publish(*store, small);
    EXPECT_EQ(gc(0, "night").manifests_removed, 1u);
    EXPECT_EQ(gc(7200, "night").objects_removed, 8u);  // once nobody can be about to name them
    EXPECT_EQ(names(), named_by(kept));
}

TEST_F(StoreTest, YoungObjectsWithoutAManifestAreSpared) {
    const Published p = publish(*store, small);
    ASSERT_TRUE(store->remove(p.name).ok());
    EXPECT_EQ(gc().objects_young, 8u);
    EXPECT_EQ(gc(7200).objects_removed, 8u);
}

TEST_F(StoreTest, ADryRunRemovesNothing) {
    small.ttl = 10;
    publish(*store, small);
    const auto before = names();
    EXPECT_EQ(gc(7200, {}, true).objects_removed, 8u);
    EXPECT_EQ(names(), before);
}

TEST_F(StoreTest, AnUnreadableManifestStopsCollection) {
    small.ttl = 10;
    publish(*store, small);
    const std::string bad = "manifests/" + std::string(64, 'a') + ".json";
    ASSERT_TRUE(store->put(bad, {}).ok());
    const auto before = names();
    const Result<Collection> c = collect(*store, {system_seconds() + 7200, {}, kGraceSeconds, false});
    EXPECT_THAT(c.status().message(), HasSubstr("nothing was removed"));
    EXPECT_EQ(names(), before);
}

// ELOOP stands for whatever a file system may fail with, since it fails for every user.
TEST_F(StoreTest, AFileThatCannotBeLookedAtStopsCollection) {
    small.ttl = 10;
    publish(*store, small);
    const auto before = names();
    const std::string loop = folder / ("store/manifests/" + std::string(64, 'a') + ".json");
    std::filesystem::create_symlink(loop, loop);
    EXPECT_THAT(store->list().status().message(), HasSubstr(loop));
    const Result<Collection> c = collect(*store, {system_seconds() + 7200, {}, kGraceSeconds, false});
    EXPECT_EQ(c.status().code(), ErrorCode::kNetwork);
    std::filesystem::remove(loop);
    EXPECT_EQ(names(), before);
}

// A link to nowhere looks like a name whose file has gone since.
TEST_F(StoreTest, AFileThatVanishesWhileItIsListedIsNotThere) {
    const Published p = publish(*store, small);
    std::filesystem::create_symlink(folder / "nowhere", folder / "store/manifests/gone.json");
    EXPECT_EQ(names(), named_by(p));
}

TEST_F(StoreTest, WhatIsNotThereIsToldFromWhatCannotBeRead) {
    const Published p = publish(*store, small);
    EXPECT_EQ(store->get("manifests/none.json").status().code(), ErrorCode::kNotStored);
    EXPECT_EQ(store->get("none/manifest").status().code(), ErrorCode::kNotStored);
    EXPECT_EQ(store->get("manifests").status().code(), ErrorCode::kNetwork);
}

TEST_F(StoreTest, APointerThatCannotBeReadIsLeftAlone) {
    small.ttl = 3600;
    const Published p = publish(*store, small);
    const std::string pointer = pointer_name(p.manifest.chain());
    Failing failing(*store, pointer);
    for (const std::int64_t later : {0, 7200}) {
        const Result<Collection> c = collect(failing, {system_seconds() + later, {}, kGraceSeconds, false});
        EXPECT_EQ(c.status().code(), ErrorCode::kHttpStatus) << later;
        EXPECT_TRUE(names().contains(pointer)) << later;
    }
    gc(7200);  // another time it can be read
    EXPECT_TRUE(names().empty());
}

TEST_F(StoreTest, PointersThatAnInterruptedCollectionLeftAreRepaired) {
    small.session = "brief";
    const Published dead = publish(*store, small);
    small.session.clear();
    const Published living = publish(*store, small);
    ASSERT_EQ(target_of_pointer(living.manifest.chain()), dead.name);
    ASSERT_TRUE(store->remove(dead.name).ok());
    gc();
    for (const ManifestChunk& c : living.manifest.chunks) EXPECT_EQ(target_of_pointer(c.chain), living.name);
}

// What put() writes to, seen while it does.
TEST_F(StoreTest, TheCollectorKnowsTemporaryFilesByTheirNames) {
    const std::string chain(64, 'c');
    std::filesystem::create_directory(folder / ("store/" + chain));
    const int watcher = ::inotify_init1(IN_NONBLOCK | IN_CLOEXEC);
    ASSERT_GE(::inotify_add_watch(watcher, (folder / ("store/" + chain)).c_str(), IN_CREATE), 0);
    ASSERT_TRUE(store->put(chain + "/2-0123456789abcdef.kvc", {}).ok());
    alignas(inotify_event) char events[4096] = {};
    ASSERT_GT(::read(watcher, events, sizeof events), 0);
    ::close(watcher);
    const std::string temporary = chain + "/" + reinterpret_cast<const inotify_event*>(events)->name;
    EXPECT_THAT(temporary, testing::EndsWith(".part"));
    tools::store(folder / ("store/" + temporary), "");
    EXPECT_TRUE(names().contains(temporary));
    EXPECT_EQ(gc(7200).objects_removed, 2u);
    EXPECT_TRUE(names().empty());
}

TEST_F(StoreTest, WhatAKilledPublisherLeftIsCollectedOnceItIsOld) {
    const Published p = publish(*store, small);
    const ManifestChunk& c = p.manifest.chunks[0];
    const std::string parts[] = {object_name(c.chain, c.objects[0]) + ".17.part", p.name + ".1234.part",
                                 pointer_name(c.chain) + ".5.part"};
    for (const std::string& name : parts) ASSERT_TRUE(store->put(name, {}).ok());
    EXPECT_EQ(gc().objects_young, 3u);
    EXPECT_EQ(gc(7200).objects_removed, 3u);
    EXPECT_EQ(names(), named_by(p));
}

TEST_F(StoreTest, ForeignFilesAreLeftAlone) {
    ASSERT_TRUE(store->put("index.html", {}).ok());
    ASSERT_TRUE(store->put("calibrations/notes.txt", {}).ok());
    ASSERT_TRUE(store->put("photos/1.kvc", {}).ok());
    ASSERT_TRUE(store->put("film.1.part", {}).ok());
    ASSERT_TRUE(store->put("manifests/film.part", {}).ok());
    gc(7200);
    EXPECT_EQ(names().size(), 5u);
}

TEST_F(StoreTest, APointerStaysWithTheLongerLivedManifest) {
    const Published forever = publish(*store, small);
    small.session = "brief";
    small.ttl = 60;
    publish(*store, small);
    EXPECT_EQ(manifest_of_pointer(store->get(pointer_name(forever.manifest.chain())).value()), forever.name);
}

TEST_F(StoreTest, AManifestThatCannotBeReadKeepsItsPointers) {
    const Published forever = publish(*store, small);
    Manifest brief = forever.manifest;
    brief.session = "brief";
    brief.expires = brief.created + 60;
    Failing failing(*store, forever.name);
    auto publisher = Publisher::open(failing, system_seconds());
    EXPECT_EQ(publisher.value().finish(brief, nullptr).status().code(), ErrorCode::kHttpStatus);
    EXPECT_EQ(target_of_pointer(brief.chain()), forever.name);
}

TEST_F(StoreTest, AManifestThatIsGoneKeepsNoPointers) {
    const Published forever = publish(*store, small);
    ASSERT_TRUE(store->remove(forever.name).ok());
    small.session = "brief";
    small.ttl = 60;
    const Published brief = publish(*store, small);
    EXPECT_EQ(target_of_pointer(brief.manifest.chain()), brief.name);
}

TEST_F(StoreTest, CollectionWaitsForPublishers) {
    auto publisher = Publisher::open(*store, system_seconds());
    const auto second = std::move(folder_destination(folder / "store").value());
    std::atomic<bool> collected = false;
    std::thread collector([&] {
        EXPECT_TRUE(collect(*second, {system_seconds(), {}, 0, false}).ok());
        collected = true;
    });
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    EXPECT_FALSE(collected);
    publisher = Status(ErrorCode::kCancelled, "drop the lock");
    collector.join();
    EXPECT_TRUE(collected);
}

TEST_F(StoreTest, SignedPublicationsAreCollectedToo) {
    const PrivateKey key = private_key(1);
    small.key = &key;
    small.ttl = 10;
    publish(*store, small);
    gc(7200);
    EXPECT_TRUE(names().empty());
}

}  // namespace
}  // namespace kvcast::test
