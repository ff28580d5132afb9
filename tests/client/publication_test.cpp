// What cannot become a publication is refused before anything of it is stored.
#include "tools/client/publication.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>

#include "streamer/store.h"
#include "tests/codec/synthetic.h"
#include "tests/tools/scratch.h"

namespace kvcast::client {
namespace {

using testing::HasSubstr;

class PublishTest : public testing::Test {
  protected:
    PublishTest() {
        context.layout = &cache.layout;
        context.model = "a model";
        context.token_ids = cache.ids;
        context.planes = rows;
        options.levels = {2, 5};
        options.chunk_tokens = 32;
        options.now = 1'800'000'000;
    }

    Result<Published> publish() {
        SerialExecutor serial;
        return client::publish(*store, context, options, serial);
    }

    tools::ScratchDirectory folder;
    std::unique_ptr<streamer::Destination> store =
        std::move(streamer::folder_destination(folder.path()).value());
    test::Cache cache =
        test::make_cache(test::make_layout(2, {{2, 16}, {2, 16}}, Dtype::kBf16, RopePairing::kHalf), 64,
                         test::Content::kGaussian);
    std::vector<PlaneRows> rows = cache.rows(0);
    Context context;
    PublishOptions options;
};

TEST_F(PublishTest, StoresAContext) {
    ASSERT_TRUE(publish().ok());
    EXPECT_EQ(store->list().value().size(), 7u);  // two chunks of two levels, two pointers, the manifest
    options.session = "caf\xc3\xa9 \xe2\x82\xac \xf0\x9f\x98\x80";
    EXPECT_TRUE(publish().ok());
}

// Of the first chunk's object of a level.
class PublishedHeader : public PublishTest {
  protected:
    ChunkHeader header(unsigned level) {
        const auto published = publish();
        EXPECT_TRUE(published.ok()) << published.status().message();
        const streamer::ManifestChunk& chunk = published.value().manifest.chunks.front();
        const auto o = std::ranges::find(chunk.objects, level, &streamer::ManifestObject::level);
        return read_header(store->get(streamer::object_name(chunk.chain, *o)).value()).value();
    }
};

TEST_F(PublishedHeader, HasTheStepsOfItsLayers) {
    const double flat = header(5).planes.front().scale.mantissa;
    options.layer_steps = {1.5, 1, 1, 1};
    EXPECT_NE(header(5).planes.front().scale.mantissa, flat);
    options.layer_steps = {1.5, 1};
    EXPECT_EQ(publish().status().code(), ErrorCode::kBadArgument);
}

TEST_F(PublishedHeader, HasAsManyBlocksAsItsReadersWant) {
    EXPECT_EQ(header(5).block_bytes.size(), 2u) << "a layer's four heads are few values";
    options.block_heads = 1;
    EXPECT_EQ(header(5).block_bytes.size(), 8u);
}

TEST_F(PublishTest, RefusesTokenIdsThatNoManifestHolds) {
    for (const bool with_tokens : {true, false}) {
        options.with_tokens = with_tokens;
        cache.ids[40] = -7;
        const Status s = publish().status();
        EXPECT_EQ(s.code(), ErrorCode::kBadArgument);
        EXPECT_THAT(s.message(), HasSubstr("token id -7 at 40"));
        EXPECT_EQ(folder.entries(), 0u);
    }
}

TEST_F(PublishTest, RefusesTextThatIsNotUtf8) {
    // A lone byte, a sequence that breaks off, two that are longer than they need to be, a surrogate, and a
    // number beyond Unicode's last.
    for (const char* bad : {"\xff", "a\xc3", "\xe2\x82", "\xc0\x80", "\xe0\x80\x80", "\xed\xa0\x80",
                            "\xf4\x90\x80\x80", "\x80"}) {
        for (const bool model : {true, false}) {
            context.model = model ? bad : "a model";
            options.session = model ? "" : bad;
            const Status s = publish().status();
            EXPECT_EQ(s.code(), ErrorCode::kBadArgument);
            EXPECT_THAT(s.message(), HasSubstr(model ? "model" : "session"));
            EXPECT_EQ(folder.entries(), 0u);
        }
    }
}

}  // namespace
}  // namespace kvcast::client
