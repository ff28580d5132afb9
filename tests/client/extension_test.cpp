// What continues a stored context takes over its chunks instead of encoding them again.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <functional>

#include "codec/decoder.h"
#include "streamer/http/http_destination.h"
#include "streamer/store.h"
#include "streamer/verify.h"
#include "tests/codec/synthetic.h"
#include "tests/codec/synthetic_calibration.h"
#include "tests/streamer/fault_server.h"
#include "tests/streamer/keys.h"
#include "tests/tools/scratch.h"
#include "tools/client/publication.h"

namespace kvcast::client {
namespace {

using namespace streamer;
namespace fs = std::filesystem;

constexpr std::size_t kChunk = 32;
constexpr std::size_t kTurn = 3 * kChunk + 16;  // the last chunk of the first turn is a part of one
constexpr std::size_t kAll = 5 * kChunk;

// A store without locks, which can refuse to be read.
class Unlocked final : public Destination {
  public:
    explicit Unlocked(Destination& store) : store_(store) {}

    const std::string& root() const override { return store_.root(); }
    Result<std::optional<StoredObject>> find(const std::string& name) override { return store_.find(name); }
    Status put(const std::string& name, std::span<const std::uint8_t> bytes) override {
        return store_.put(name, bytes);
    }
    Result<std::vector<std::uint8_t>> get(const std::string& name) override {
        if (refuses(name)) return Status(ErrorCode::kHttpStatus, name + ": HTTP status 403");
        return store_.get(name);
    }
    Status remove(const std::string& name) override { return store_.remove(name); }
    Result<std::vector<StoredObject>> list() override { return store_.list(); }

    std::function<bool(const std::string& name)> refuses = [](const std::string&) { return false; };

  private:
    Destination& store_;
};

class ExtensionTest : public testing::Test {
  protected:
    ExtensionTest() {
        options.levels = {0, 5};
        options.chunk_tokens = kChunk;
        options.now = system_seconds();
        options.extend = true;
    }

    Context context(const test::Cache& from, std::size_t tokens, std::vector<PlaneRows>& rows) const {
        rows = from.rows(0);
        Context c;
        c.layout = &cache.layout;
        c.model = "a model";
        c.salt = salt;
        c.token_ids = std::span(cache.ids).first(tokens);
        c.base_position = base_position;
        c.planes = rows;
        return c;
    }
    Published publish(Destination& to, const test::Cache& from, std::size_t tokens) {
        std::vector<PlaneRows> rows;
        SerialExecutor serial;
        auto published = client::publish(to, context(from, tokens, rows), options, serial);
        EXPECT_TRUE(published.ok()) << published.status().message();
        return published.ok() ? std::move(published.value()) : Published();
    }
    // The first turn, from the planes that were computed; and all, from planes whose prefix is worse.
    Published first() { return publish(*store, cache, kTurn); }
    Published second() { return publish(*store, worse, kAll); }

    // The second publication has the first one's leading chunks, and others behind them.
    static void expect_taken_over(const Published& old, const Published& whole, std::size_t chunks) {
        EXPECT_EQ(whole.chunks_taken_over, chunks);
        EXPECT_EQ(whole.tokens_taken_over, chunks * kChunk);
        ASSERT_EQ(whole.manifest.tokens(), kAll);
        for (std::size_t i = 0; i < 3; ++i)
            EXPECT_EQ(whole.manifest.chunks[i] == old.manifest.chunks[i], i < chunks) << i;
    }

    // What a chunk's lossless object decodes to is what these planes have.
    void expect_values(const Manifest& m, std::size_t chunk, const test::Cache& of) {
        const ManifestObject& o = m.chunks[chunk].objects.front();
        ASSERT_EQ(o.level, 0u);
        const auto object = store->get(object_name(m.chunks[chunk].chain, o)).value();
        ASSERT_TRUE(verify_object(object, m, chunk, o).ok());
        const auto decoder = ChunkDecoder::open(object, {});
        ASSERT_TRUE(decoder.ok());
        std::vector<std::vector<std::uint8_t>> planes;
        std::vector<PlaneBuffer> buffers;
        for (std::size_t i = 0; i < of.planes.size(); ++i) planes.emplace_back(kChunk * of.row_bytes(i % 2));
        for (std::size_t i = 0; i < planes.size(); ++i)
            buffers.push_back({reinterpret_cast<std::byte*>(planes[i].data()), of.row_bytes(i % 2)});
        SerialExecutor serial;
        std::vector<DecodeWorkspace> workspaces(1);
        ASSERT_TRUE(decoder.value().decode(buffers, serial, workspaces).ok());
        for (std::size_t i = 0; i < planes.size(); ++i) {
            const std::size_t bytes = planes[i].size();
            const auto expected = std::span(of.planes[i]).subspan(chunk * bytes, bytes);
            EXPECT_TRUE(std::ranges::equal(planes[i], expected)) << "chunk " << chunk << ", plane " << i;
        }
    }

    std::string file(const std::string& name) const { return folder / ("store/" + name); }
    static std::string name_of(const Published& p, std::size_t chunk, std::size_t object) {
        const ManifestChunk& c = p.manifest.chunks[chunk];
        return object_name(c.chain, c.objects[object]);
    }
    void age(const std::string& name, std::chrono::seconds by) {
        fs::last_write_time(file(name), fs::file_time_type::clock::now() - by);
    }
    void age_objects(const Published& p, std::chrono::seconds by) {
        for (std::size_t i = 0; i < p.manifest.chunks.size(); ++i) {
            for (std::size_t o = 0; o < p.manifest.chunks[i].objects.size(); ++o) age(name_of(p, i, o), by);
        }
    }
    std::int64_t age_of(const std::string& name) {
        return system_seconds() - store->find(name).value().value().modified;
    }
    void clear() {
        fs::remove_all(folder / "store");
        fs::create_directory(folder / "store");
    }
    void change(const Published& p, const std::function<void(Manifest&)>& how) {
        Manifest m = p.manifest;
        how(m);
        tools::store(file(p.name), write_manifest(m));
    }

    tools::ScratchDirectory folder;
    std::unique_ptr<Destination> store = std::move(folder_destination(folder / "store").value());
    const test::Cache cache = make(1);
    const test::Cache worse = make(2);
    std::string salt;
    std::uint64_t base_position = 0;
    PublishOptions options;

  private:
    static test::Cache make(std::uint64_t seed) {
        return test::make_cache(test::make_layout(2, {{2, 16}, {2, 16}}, Dtype::kBf16, RopePairing::kHalf),
                                kAll, test::Content::kGaussian, seed);
    }
};

TEST_F(ExtensionTest, WithoutItAllIsEncodedAsItIsGiven) {
    options.extend = false;
    const Published old = first();
    expect_taken_over(old, second(), 0);
}

TEST_F(ExtensionTest, WhereNothingIsStoredAllIsEncoded) {
    const Published p = first();
    EXPECT_EQ(p.chunks_taken_over, 0u);
    EXPECT_EQ(p.tokens_taken_over, 0u);
    EXPECT_EQ(p.bytes.objects_written, 8u);
}

TEST_F(ExtensionTest, WholeChunksAreTakenOverAndOthersAreNot) {
    const Published old = first();
    const Published whole = second();
    expect_taken_over(old, whole, 3);
    for (std::size_t i = 0; i < 5; ++i) expect_values(whole.manifest, i, i < 3 ? cache : worse);
    EXPECT_EQ(whole.bytes.objects_reused, 6u);
    EXPECT_EQ(whole.bytes.objects_written, 4u);
    EXPECT_EQ(confirm_chain(whole.manifest, "", {}).value(), 5u);
}

TEST_F(ExtensionTest, TheSameContextIsTakenOverToItsEnd) {
    const Published old = first();
    const Published again = publish(*store, worse, kTurn);
    EXPECT_EQ(again.chunks_taken_over, 4u);
    EXPECT_EQ(again.tokens_taken_over, kTurn);
    EXPECT_EQ(again.manifest, old.manifest);
    EXPECT_EQ(again.bytes.objects_written, 0u);
}

TEST_F(ExtensionTest, AShorterContextIsTakenOverToItsEnd) {
    const Published old = first();
    EXPECT_EQ(publish(*store, worse, 2 * kChunk).chunks_taken_over, 2u);
}

TEST_F(ExtensionTest, EveryTurnTakesOverTheOneBefore) {
    for (std::size_t turn = 1; turn <= 5; ++turn) {
        const Published p = publish(*store, turn == 1 ? cache : worse, turn * kChunk);
        EXPECT_EQ(p.chunks_taken_over, turn - 1);
        expect_values(p.manifest, 0, cache);
    }
}

TEST_F(ExtensionTest, EveryChunkIsTold) {
    first();
    std::vector<std::size_t> told;
    options.on_chunk = [&](std::size_t tokens) {
        told.push_back(tokens);
        return told.size() != 7;
    };
    second();
    EXPECT_EQ(told, std::vector<std::size_t>(5, kChunk));
    std::vector<PlaneRows> rows;
    SerialExecutor serial;
    const auto cancelled = client::publish(*store, context(worse, kAll, rows), options, serial);
    EXPECT_EQ(cancelled.status().code(), ErrorCode::kCancelled);
    EXPECT_EQ(told.size(), 7u);
}

TEST_F(ExtensionTest, LevelsThatWereNotStoredAreNotTakenOver) {
    const Published old = first();
    options.levels = {0, 4, 5};
    EXPECT_EQ(second().chunks_taken_over, 0u);
}

TEST_F(ExtensionTest, SomeOfTheStoredLevelsWillDo) {
    const Published old = first();
    options.levels = {5};
    const Published whole = second();
    EXPECT_EQ(whole.chunks_taken_over, 3u);
    ASSERT_EQ(whole.manifest.chunks[2].objects.size(), 1u);
    EXPECT_EQ(whole.manifest.chunks[2].objects[0], old.manifest.chunks[2].objects[1]);
}

TEST_F(ExtensionTest, AnotherExpectedCostIsAnotherLevel) {
    options.delta_kl = {{5, 0.1 / 3}};
    const Published old = first();
    expect_taken_over(old, second(), 3);
    options.delta_kl = {{5, 0.02}};
    EXPECT_EQ(publish(*store, worse, kTurn).chunks_taken_over, 0u);
}

TEST_F(ExtensionTest, AnotherCalibrationEncodesAnew) {
    std::vector<std::vector<std::uint8_t>> files;
    for (const std::uint64_t seed : {1, 2}) {
        test::CalibrationShape shape = {{1, 1}};
        shape.seed = seed;
        files.push_back(test::calibration_bytes(test::make_calibration_data(cache.layout, shape)));
    }
    const auto use = [&](const std::vector<std::uint8_t>& calibration) {
        options.calibration_file = calibration;
        options.calibration = Calibration::read(calibration).value();
    };
    options.levels = {0, 2};
    use(files[0]);
    const Published old = first();
    expect_taken_over(old, second(), 3);
    use(files[1]);
    EXPECT_EQ(second().chunks_taken_over, 0u);
    options.calibration = nullptr;
    options.calibration_file = {};
    EXPECT_EQ(second().chunks_taken_over, 0u) << "delta is not klt";
    options.levels = {0};
    EXPECT_EQ(second().chunks_taken_over, 5u) << "lossless needs none";
}

TEST_F(ExtensionTest, ContextsOfAnotherIdentityAreNotTakenOver) {
    first();
    salt = "tenant";
    EXPECT_EQ(second().chunks_taken_over, 0u);
    salt.clear();
    base_position = 7;
    EXPECT_EQ(second().chunks_taken_over, 0u);
    base_position = 0;
    options.chunk_tokens = 16;
    EXPECT_EQ(second().chunks_taken_over, 0u);
}

TEST_F(ExtensionTest, WhatDoesNotHoldAsAManifestIsNotUsed) {
    options.ttl = 3600;
    const Published old = first();
    const auto unused = [&](const char* why) {
        SCOPED_TRACE(why);
        expect_taken_over(old, second(), 0);
        clear();
        first();
    };
    tools::store(file(old.name), "{");
    unused("no JSON");
    change(old, [](Manifest& m) { m.chunks.resize(1), m.chunks[0].objects.clear(); });
    unused("no objects");
    fs::remove(file(old.name));
    unused("gone");
    tools::store(file(pointer_name(old.manifest.chunks[2].chain)), "../../etc/passwd\n");
    tools::store(file(pointer_name(old.manifest.chunks[1].chain)), "");
    tools::store(file(pointer_name(old.manifest.chunks[0].chain)), "nothing");
    unused("pointers to nowhere");
    options.now += 3600;
    unused("expired");
}

// The prefix that a manifest has ends where it does not hold.
TEST_F(ExtensionTest, AManifestThatLiesIsNotBelieved) {
    const Published old = first();
    const auto ends_before = [&](std::size_t chunk, const char* why,
                                 const std::function<void(Manifest&)>& lie) {
        SCOPED_TRACE(why);
        change(old, lie);
        expect_taken_over(old, second(), chunk);
        clear();
        first();
    };
    ends_before(1, "size", [](Manifest& m) { ++m.chunks[1].objects[0].bytes; });
    ends_before(2, "hash", [](Manifest& m) { m.chunks[2].objects[1].sha256[0] ^= 1; });
    ends_before(1, "tokens", [](Manifest& m) { m.chunks[1].tokens = 1, m.chunks[1].token_ids = {5}; });
    ends_before(0, "identity", [](Manifest& m) { m.chunks[0].chain[3] ^= 1; });
    ends_before(2, "level left out", [](Manifest& m) { m.chunks[2].objects.pop_back(); });
    ends_before(0, "position", [](Manifest& m) { m.base_position = 1; });
    ends_before(0, "profile", [](Manifest& m) {
        m.levels[1].profile = Profile::kKlt;
        m.calibration = {{}, 1};
    });
    // Token ids are the publisher's own.
    change(old, [](Manifest& m) { m.chunks[0].token_ids[0] ^= 1; });
    expect_taken_over(old, second(), 3);
}

TEST_F(ExtensionTest, TakingOverEndsAtAnObjectThatIsGone) {
    const Published old = first();
    ASSERT_TRUE(store->remove(name_of(old, 1, 1)).ok());
    const Published whole = second();
    expect_taken_over(old, whole, 1);
    EXPECT_EQ(whole.bytes.objects_reused, 2u);
    EXPECT_EQ(whole.bytes.objects_written, 8u);
}

TEST_F(ExtensionTest, OldObjectsAreRenewed) {
    const Published old = first();
    age_objects(old, std::chrono::hours(2));
    expect_taken_over(old, second(), 3);
    for (std::size_t i = 0; i < 3; ++i) {
        for (std::size_t o = 0; o < 2; ++o) EXPECT_LT(age_of(name_of(old, i, o)), 60);
    }
    EXPECT_GT(age_of(name_of(old, 3, 0)), 3600) << "nobody wanted it";
}

TEST_F(ExtensionTest, AnOldObjectOfOtherBytesIsNotRenewed) {
    const Published old = first();
    const std::string damaged = name_of(old, 2, 0);
    tools::store(file(damaged), std::string(fs::file_size(file(damaged)), 'x'));
    age_objects(old, std::chrono::hours(2));
    expect_taken_over(old, second(), 2);
}

// In a store without locks a collector may run beside the publisher, and find the first turn expired.
TEST_F(ExtensionTest, ACollectionMeanwhileTakesNothingThatWasTakenOver) {
    options.ttl = 60;
    const Published old = first();
    age_objects(old, std::chrono::hours(2));
    Unlocked unlocked(*store);
    options.ttl.reset();
    std::size_t told = 0;
    options.on_chunk = [&](std::size_t) {
        if (++told == 4) {
            EXPECT_EQ(collect(unlocked, {options.now + 61, {}, kGraceSeconds, false}).value().objects_removed,
                      2u)
                << "of the chunk that is not taken over";
        }
        return true;
    };
    const Published whole = publish(unlocked, worse, kAll);
    expect_taken_over(old, whole, 3);
    EXPECT_EQ(whole.bytes.objects_written, 4u);
}

TEST_F(ExtensionTest, ACollectionOfTheOldManifestKeepsWhatTheNewOneNeeds) {
    options.ttl = 60;
    const Published old = first();
    options.ttl.reset();
    const Published whole = second();
    const Collection c = collect(*store, {options.now + 7200, {}, kGraceSeconds, false}).value();
    EXPECT_EQ(c.manifests_removed, 1u);
    EXPECT_EQ(c.objects_removed, 2u);
    for (std::size_t i = 0; i < 5; ++i) expect_values(whole.manifest, i, i < 3 ? cache : worse);
    expect_taken_over(old, publish(*store, worse, kAll), 5);
}

TEST_F(ExtensionTest, AKeyTakesOverWhatItSigned) {
    const PrivateKey one = test::private_key(1), other = test::private_key(2);
    const auto taken_over = [&](const PrivateKey* before, const PrivateKey* now) {
        clear();
        options.key = before;
        first();
        options.key = now;
        return second().chunks_taken_over;
    };
    EXPECT_EQ(taken_over(&one, &one), 3u);
    EXPECT_EQ(taken_over(&other, &one), 0u);
    EXPECT_EQ(taken_over(nullptr, &one), 0u);
    EXPECT_EQ(taken_over(&one, nullptr), 3u);
}

TEST_F(ExtensionTest, ASignedManifestThatWasChangedIsNotUsed) {
    const PrivateKey key = test::private_key(1);
    options.key = &key;
    const Published old = first();
    Manifest lie = old.manifest;
    lie.chunks[0].objects[0].sha256[31] ^= 1;  // its name has the first 16 digits only
    tools::store(file(old.name), sign_manifest(write_manifest(lie), test::private_key(2)));
    EXPECT_EQ(second().chunks_taken_over, 0u);
}

TEST_F(ExtensionTest, AStoreThatCannotBeReadIsWrittenToAsEver) {
    const Published old = first();
    for (const std::string& suffix : {std::string("/manifest"), old.name}) {
        Unlocked refusing(*store);
        refusing.refuses = [&](const std::string& name) { return name.ends_with(suffix); };
        options.on_chunk = [&](std::size_t) {
            refusing.refuses = [](const std::string&) { return false; };
            return true;
        };
        EXPECT_EQ(publish(refusing, worse, kAll).chunks_taken_over, 0u) << suffix;
        clear();
        options.on_chunk = nullptr;
        first();
    }
    // Old objects are read to be renewed.
    age_objects(old, std::chrono::hours(2));
    Unlocked refusing(*store);
    refusing.refuses = [](const std::string& name) { return name.ends_with(".kvc"); };
    EXPECT_EQ(publish(refusing, worse, kAll).chunks_taken_over, 0u);
}

TEST_F(ExtensionTest, AServerThatTakesPutIsExtendedToo) {
    const test::FaultServer server(folder.path());
    const auto http = std::move(http_destination(server.url("store"), {}, process_variables).value());
    for (const int hours : {0, 2}) {
        clear();
        const Published old = publish(*http, cache, kTurn);
        age_objects(old, std::chrono::hours(hours));
        const Published whole = publish(*http, worse, kAll);
        expect_taken_over(old, whole, 3);
        EXPECT_EQ(whole.bytes.objects_written, 4u);
        expect_values(whole.manifest, 2, cache);
        EXPECT_LT(age_of(name_of(old, 0, 0)), 60);
    }
}

}  // namespace
}  // namespace kvcast::client
