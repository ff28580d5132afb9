// A folder that is of no use costs a download, and nothing else.
#include "tools/client/calibration_cache.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>

#include "codec/format/chain.h"
#include "tests/codec/synthetic.h"
#include "tests/codec/synthetic_calibration.h"
#include "tests/tools/scratch.h"

namespace kvcast::client {
namespace {

std::vector<std::uint8_t> calibration() {
    const Layout layout = test::make_layout(2, {{1, 16}, {1, 16}}, Dtype::kBf16, RopePairing::kHalf);
    return test::calibration_bytes(test::make_calibration_data(layout, {{1, 1}}));
}

TEST(CalibrationCache, KeepsWhatItIsGiven) {
    const tools::ScratchDirectory folder;
    const auto file = calibration();
    CalibrationCache first(folder / "cache"), second(folder / "cache");
    EXPECT_FALSE(second.has(sha256(file)));
    EXPECT_TRUE(first.add(file).ok());
    EXPECT_TRUE(second.has(sha256(file)));
    EXPECT_EQ(second.last()->id(), sha256(file));
}

TEST(CalibrationCache, TakesADamagedFileForNone) {
    const tools::ScratchDirectory folder;
    const auto file = calibration();
    for (const std::uintmax_t bytes : {file.size() - 1, std::size_t{0}}) {
        EXPECT_TRUE(CalibrationCache(folder / "cache").add(file).ok());
        const auto path = std::filesystem::directory_iterator(folder / "cache")->path();
        std::filesystem::resize_file(path, bytes);
        EXPECT_FALSE(CalibrationCache(folder / "cache").has(sha256(file)));
        EXPECT_FALSE(std::filesystem::exists(path));
    }
}

TEST(CalibrationCache, KeepsTheFrontOfOneThatIsStillToCome) {
    const tools::ScratchDirectory folder;
    const auto file = calibration();
    const Hash id = sha256(file);
    const auto front = std::vector(file.begin(), file.begin() + 100);
    for (const std::string& path : {folder / "cache", std::string()}) {
        CalibrationCache cache(path);
        EXPECT_THAT(cache.begun(id), testing::IsEmpty());
        cache.keep_begun(id, front);
        EXPECT_EQ(cache.begun(id), front);
        EXPECT_FALSE(cache.has(id));
        EXPECT_THAT(cache.begun(Hash{1}), testing::IsEmpty());
        if (!path.empty()) {
            EXPECT_EQ(CalibrationCache(path).begun(id), front);
        }
        if (!path.empty()) {
            cache.keep_begun(id, std::vector(front.begin(), front.begin() + 50));
            EXPECT_EQ(cache.begun(id), front) << "another session had brought more";
        }
        cache.keep_begun(id, {});
        EXPECT_THAT(cache.begun(id), testing::IsEmpty());
        cache.keep_begun(id, front);
        EXPECT_TRUE(cache.add(file).ok());
        EXPECT_THAT(cache.begun(id), testing::IsEmpty()) << "it is there whole";
    }
}

TEST(CalibrationCache, KeepsFewOfThoseThatNeverCome) {
    const tools::ScratchDirectory folder;
    CalibrationCache cache(folder / "cache");
    const std::vector<std::uint8_t> front(10);
    for (std::uint8_t i = 0; i < 20; ++i) cache.keep_begun(Hash{i}, front);
    EXPECT_THAT(cache.begun(Hash{0}), testing::IsEmpty());
    const std::filesystem::directory_iterator files(folder / "cache");
    EXPECT_LE(std::distance(begin(files), end(files)), 4);
}

TEST(CalibrationCache, DoesWithoutAFolderThatCannotBeReached) {
    const tools::ScratchDirectory folder;
    const std::string loop = folder / "loop";
    std::filesystem::create_symlink(loop, loop);
    const auto file = calibration();
    for (const std::string& path : {loop, folder / "a" + std::string(300, 'b'), std::string()}) {
        CalibrationCache cache(path);
        EXPECT_FALSE(cache.has(sha256(file)));
        EXPECT_TRUE(cache.add(file).ok());
        EXPECT_TRUE(cache.has(sha256(file)));  // in memory
    }
}

}  // namespace
}  // namespace kvcast::client
