// What the tools take as arguments, and which failures they tell apart.
#include "tools/stream/options.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>

#include "streamer/http/location.h"
#include "tests/tools/scratch.h"
#include "tools/common/cli.h"
#include "tools/common/kv_cache.h"

namespace kvcast::tools {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

template <typename Call>
bool blames_the_input(Call call) {
    try {
        call();
    } catch (const DamagedInput&) {
        return true;
    } catch (const Error&) {
    }
    return false;
}

// Runs a tool of one option --value, and says how it ended.
template <typename Value = double>
int run_with(const std::string& value, const std::function<void()>& body,
             const CLI::Validator& validator = positive_number()) {
    Value taken = {};
    CLI::App app("a test", "tool");
    app.add_option("--value", taken)->check(validator);
    std::string name = "tool", option = "--value=" + value;
    char* argv[] = {name.data(), option.data(), nullptr};
    return run_tool(app, 2, argv, body);
}

TEST(PositiveNumber, IsFiniteAndAboveZero) {
    for (const char* good : {"1", "0.5", "1e6", "4000"}) EXPECT_EQ(run_with(good, [] {}), kExitOk) << good;
    for (const char* bad : {"0", "-1", "nan", "inf", "1e400", "1e300", "ten", "1x", ""})
        EXPECT_EQ(run_with(bad, [] {}), kExitUsage) << bad;
}

TEST(DeclareCoding, TakesNumbersThatALayoutMayHave) {
    const auto ends_with = [](std::string option) {
        std::string steps, name = "tool";
        std::size_t heads = 0, layers = 1;
        CLI::App app("a test", "tool");
        declare_coding(app, steps, heads, layers);
        char* argv[] = {name.data(), option.data(), nullptr};
        return run_tool(app, 2, argv, [] {});
    };
    for (const char* good :
         {"--block-heads=0", "--block-heads=1", "--run-layers=4096", "--layer-steps=thirds"})
        EXPECT_EQ(ends_with(good), kExitOk) << good;
    for (const char* bad :
         {"--block-heads=-1", "--block-heads=99999999999", "--run-layers=0", "--run-layers=-1"})
        EXPECT_EQ(ends_with(bad), kExitUsage) << bad;
}

TEST(RunTool, TellsDamageFromOtherFailures) {
    EXPECT_EQ(run_with("1", [] { throw DamagedInput("damaged"); }), kExitDamaged);
    EXPECT_EQ(run_with("1", [] { throw Error("missing"); }), kExitFailure);
}

TEST(RunTool, ShowsItsExitCodesOrATools) {
    const auto help = [](const std::string& own) {
        CLI::App app("a test", "tool");
        if (!own.empty()) app.footer(own);
        std::string name = "tool";
        char* argv[] = {name.data(), nullptr};
        EXPECT_EQ(run_tool(app, 1, argv, [] {}), kExitOk);
        return app.help();
    };
    EXPECT_THAT(help(""), HasSubstr(kExitCodes));
    EXPECT_THAT(help("Exit codes: 4 tired."), HasSubstr("Exit codes: 4 tired."));
}

TEST(Raise, BlamesTheInputForDamageOnly) {
    for (const ErrorCode code : {ErrorCode::kTruncated, ErrorCode::kBlockChecksum, ErrorCode::kBadManifest,
                                 ErrorCode::kBadSignature, ErrorCode::kForeign})
        EXPECT_TRUE(blames_the_input([&] { raise("x", code); })) << error_name(code);
    for (const ErrorCode code : {ErrorCode::kMissingCalibration, ErrorCode::kWrongCalibration,
                                 ErrorCode::kBadArgument, ErrorCode::kHttpStatus, ErrorCode::kNoDevice})
        EXPECT_FALSE(blames_the_input([&] { raise("x", code); })) << error_name(code);
}

TEST(ParseRange, SaysThatARangeEndsBeforeItBegins) {
    EXPECT_EQ(error_of([] { parse_range("5-3", 30, "layers"); }),
              "--layers is 5-3, which ends before it begins");
    EXPECT_EQ(error_of([] { parse_range("3-30", 30, "layers"); }),
              "--layers is 3-30, the file has layers 0-29");
}

TEST(LevelList, HasNoEmptyPieces) {
    const auto code = [](const char* text) {
        return run_with<std::string>(
            text, [] {}, level_list());
    };
    for (const char* good : {"all", "0", "0,2-5", "7,0"}) EXPECT_EQ(code(good), kExitOk) << good;
    for (const char* bad : {"", ",", "0,", ",0", "0,,2"}) EXPECT_EQ(code(bad), kExitUsage) << bad;
}

TEST(ParseDuration, NeedsAUnit) {
    EXPECT_EQ(parse_duration("--ttl", "0s"), 0);
    EXPECT_EQ(parse_duration("--ttl", "90s"), 90);
    EXPECT_EQ(parse_duration("--ttl", "15m"), 900);
    EXPECT_EQ(parse_duration("--ttl", "12h"), 43200);
    EXPECT_EQ(parse_duration("--ttl", "7d"), 604800);
    for (const std::string bad : {"12", "0", "", "s", "-1s", "1.5h", "1w", "99999999999999d"}) {
        EXPECT_EQ(error_of([&] { parse_duration("--ttl", bad); }),
                  "--ttl is '" + bad + "', expected a time like 90s, 15m, 12h or 7d");
    }
}

TEST(CheckDestination, TakesFoldersAndStores) {
    for (const char* good :
         {"store", "/a/b?c", "http://host", "http://host:80/a", "https://host/a", "s3://bucket/prefix"})
        EXPECT_EQ(error_of([&] { require(streamer::check_destination(good)); }), "") << good;
}

TEST(CheckDestination, RefusesUrlsThatNothingCanBeWrittenTo) {
    for (const char* bad : {"http://", "https:///a", "http://:80/", "http://?x", "http://h/s?x=1",
                            "http://h/#f", "s3://", "s3://b/c?d"})
        EXPECT_THAT(error_of([&] { require(streamer::check_destination(bad)); }), HasSubstr(bad)) << bad;
    for (const char* bad : {"file:///a", "ftp://h/a", "httpx://a", "://a"})
        EXPECT_THAT(error_of([&] { require(streamer::check_destination(bad)); }),
                    HasSubstr("is not supported"))
            << bad;
}

TEST(ReadTokenIds, TakesAnArrayAndNothingElse) {
    const ScratchDirectory scratch;
    store(scratch / "ids", "[1, 0, 2147483647]");
    EXPECT_THAT(read_token_ids(scratch / "ids"), ElementsAre(1, 0, 2147483647));
    for (const char* bad : {"", "[]", "[1.5]", "[-1]", "[2147483648]", "{\"a\": [1]}", "[\"a\"]", "[1"}) {
        store(scratch / "ids", bad);
        EXPECT_TRUE(blames_the_input([&] { read_token_ids(scratch / "ids"); })) << bad;
    }
    EXPECT_FALSE(blames_the_input([&] { read_token_ids(scratch / "missing"); }));
}

TEST(RequireFinite, NamesTheFileAndTheTensor) {
    Layout layout;
    layout.layers = 1;
    layout.planes = {{1, 2}, {1, 2}};
    layout.dtype = Dtype::kF32;
    KvCache cache = {layout, "model", 0, {1, 2}, {}};
    for (int p = 0; p < 2; ++p) cache.planes.emplace_back(2 * cache.row_bytes(0));
    EXPECT_EQ(error_of([&] { require_finite(cache, "kv"); }), "");
    set_plane(cache, 1, {0, 1, std::numeric_limits<float>::quiet_NaN(), 3});
    EXPECT_EQ(error_of([&] { require_finite(cache, "kv"); }),
              "kv: tensor 'v' holds nan, expected finite values");
    set_plane(cache, 0, {0, std::numeric_limits<float>::infinity(), 0, 0});
    EXPECT_EQ(error_of([&] { require_finite(cache, "kv"); }),
              "kv: tensor 'k' holds inf, expected finite values");
}

}  // namespace
}  // namespace kvcast::tools
