// A link is remembered by its server, for a while, and nothing that is in the file can hurt.
#include <gtest/gtest.h>

#include "tests/tools/scratch.h"
#include "tools/client/link_memory.h"

namespace kvcast::client {
namespace {

using streamer::NetworkPrior;

TEST(LinkMemory, IsPerServer) {
    const tools::ScratchDirectory folder;
    const std::string cache = folder / "cache";
    EXPECT_FALSE(remembered_link(cache, "http://a:1/x"));
    remember_link(cache, "http://a:1/x", {5e6, 0.03, 0.7});
    const auto link = remembered_link(cache, "http://a:1/another/manifest.json");
    ASSERT_TRUE(link);
    EXPECT_DOUBLE_EQ(link->bytes_per_second, 5e6);
    EXPECT_DOUBLE_EQ(link->first_byte, 0.03);
    EXPECT_DOUBLE_EQ(link->doubt, 0.7);
    for (const char* other : {"http://a:2/x", "https://a:1/x", "http://b:1/x"})
        EXPECT_FALSE(remembered_link(cache, other)) << other;
    remember_link(cache, "http://a:1", {6e6, 0.03, 0.7});
    EXPECT_DOUBLE_EQ(remembered_link(cache, "http://a:1/x")->bytes_per_second, 6e6);
}

TEST(LinkMemory, IsDoubtedWhenItIsOld) {
    const tools::ScratchDirectory folder;
    remember_link(folder.path(), "http://a/x", {5e6, 0.03, 0.5});
    for (const auto& entry : std::filesystem::directory_iterator(folder.path())) {
        std::filesystem::last_write_time(entry, entry.last_write_time() - std::chrono::hours(2));
    }
    const auto link = remembered_link(folder.path(), "http://a/x");
    EXPECT_DOUBLE_EQ(link->doubt, NetworkPrior{}.doubt);
    EXPECT_DOUBLE_EQ(link->bytes_per_second, NetworkPrior{}.bytes_per_second);  // 5 MB/s were long ago
}

TEST(LinkMemory, DamageIsForgotten) {
    const tools::ScratchDirectory folder;
    for (const char* bad :
         {"", "x", "1 2", "-1 0.1 0.5", "0 0.1 0.5", "1 0 0.5", "1 0.1 -1", "inf 1 1", "nan 1 1"}) {
        remember_link(folder.path(), "http://a/x", {5e6, 0.03, 0.5});
        for (const auto& entry : std::filesystem::directory_iterator(folder.path()))
            tools::store(entry.path(), bad);
        EXPECT_FALSE(remembered_link(folder.path(), "http://a/x")) << bad;
    }
}

TEST(LinkMemory, WithoutAFolderNothingIsKept) {
    remember_link("", "http://a/x", {});
    EXPECT_FALSE(remembered_link("", "http://a/x"));
    remember_link("/dev/null/no", "http://a/x", {});
    EXPECT_FALSE(remembered_link("/dev/null/no", "http://a/x"));
}

}  // namespace
}  // namespace kvcast::client
