// Servers that are written to: nothing is concluded from half an answer, and silence is all that ends an
// exchange.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>

#include "streamer/http/http_destination.h"
#include "tests/streamer/fault_server.h"
#include "tests/tools/scratch.h"

namespace kvcast::test {
namespace {

using namespace streamer;
using std::chrono::milliseconds;
using testing::HasSubstr;

class DestinationTest : public testing::Test {
  protected:
    std::unique_ptr<Destination> plain(Duration patience = kPatience) {
        return std::move(http_destination(server.url("kv"), {}, process_variables, patience).value());
    }
    std::unique_ptr<Destination> s3() {
        const auto variables = [this](const char* name) -> const char* {
            return std::string(name).starts_with("AWS_ENDPOINT") ? endpoint.c_str() : "key";
        };
        return std::move(http_destination("s3://bucket/kv", {}, variables).value());
    }
    // What the listing says where it goes on with a token: one object, and the next token.
    void page(const std::string& token, const std::string& object, const std::string& rest) {
        const std::string continued = token.empty() ? "" : "continuation-token=" + token + "&";
        tools::store(folder / ("bucket?" + continued + "list-type=2&prefix=kv%2F"),
                     "<ListBucketResult><Contents><Key>kv/" + object +
                         "</Key><LastModified>2026-11-21T05:00:00.000Z</LastModified><Size>5</Size>"
                         "</Contents>" +
                         rest + "</ListBucketResult>");
    }
    static std::string next(const std::string& token) {
        return "<IsTruncated>true</IsTruncated><NextContinuationToken>" + token + "</NextContinuationToken>";
    }

    tools::ScratchDirectory folder;
    FaultServer server{folder.path()};
    const std::string endpoint = server.url("");
};

TEST_F(DestinationTest, AListingIsReadToItsEnd) {
    page("", "a", next("t"));
    page("t", "b", next("u"));
    page("u", "c", "<IsTruncated>false</IsTruncated>");
    const auto all = s3()->list();
    ASSERT_TRUE(all.ok()) << all.status().message();
    ASSERT_EQ(all.value().size(), 3u);
    EXPECT_EQ(all.value()[2].name, "c");
    EXPECT_EQ(all.value()[2].bytes, 5u);
}

TEST_F(DestinationTest, AListingThatBreaksOffIsRefused) {
    page("", "a", next("t"));
    for (const std::string& rest : {std::string("<IsTruncated>true</IsTruncated>"), next("")}) {
        page("t", "b", rest);
        const Status s = s3()->list().status();
        EXPECT_EQ(s.code(), ErrorCode::kProtocol);
        EXPECT_THAT(s.message(), HasSubstr("NextContinuationToken"));
    }
}

TEST_F(DestinationTest, AListingThatGoesInCirclesIsRefused) {
    page("", "a", next("t"));
    page("t", "b", next("u"));
    for (const char* again : {"u", "t"}) {
        page("u", "c", next(again));
        const Status s = s3()->list().status();
        EXPECT_EQ(s.code(), ErrorCode::kProtocol);
        EXPECT_THAT(s.message(), HasSubstr(std::string("'") + again + "'"));
    }
}

TEST_F(DestinationTest, WhatIsNotThereIsToldFromWhatCannotBeHad) {
    EXPECT_EQ(plain()->get("none").status().code(), ErrorCode::kNotStored);
    server.fault(R"({"match": "none", "fault": "status", "status": 403})");
    EXPECT_EQ(plain()->get("none").status().code(), ErrorCode::kHttpStatus);
}

TEST_F(DestinationTest, AServerThatCannotBeListedSaysWhatCan) {
    const Status s = plain()->list().status();
    EXPECT_EQ(s.code(), ErrorCode::kBadArgument);
    EXPECT_THAT(s.message(), AllOf(HasSubstr(server.url("kv")), HasSubstr("a folder or s3://")));
}

// Of more bytes than sockets hold: what waits there counts as sent.
TEST_F(DestinationTest, AnUploadMayTakeLongerThanThePatience) {
    server.fault(R"({"match": "slow", "fault": "slow-read", "rate": 6e6})");
    const std::vector<std::uint8_t> bytes(std::size_t{32} << 20, 7);
    const Time start = Clock::now();
    const Status s = plain(milliseconds(2000))->put("slow", bytes);
    EXPECT_TRUE(s.ok()) << s.message();
    EXPECT_GT(Clock::now() - start, milliseconds(4000));
    EXPECT_EQ(server.count("slow"), 1u);
    EXPECT_EQ(std::filesystem::file_size(folder / "kv/slow"), bytes.size());
}

TEST_F(DestinationTest, AnAnswerMayTakeLongerThanThePatience) {
    std::filesystem::create_directory(folder / "kv");
    tools::store(folder / "kv/slow", std::string(100'000, 'x'));
    server.fault(R"({"match": "slow", "fault": "pace", "rate": 25e3})");
    const auto got = plain(milliseconds(1200))->get("slow");
    ASSERT_TRUE(got.ok()) << got.status().message();
    EXPECT_EQ(got.value().size(), 100'000u);
    EXPECT_EQ(server.count("slow"), 1u);
}

TEST_F(DestinationTest, AServerThatFallsSilentIsGivenUpAfterThePatience) {
    server.fault(R"({"match": "deaf", "fault": "never-reads"})");
    const std::vector<std::uint8_t> bytes(1000, 7);
    const Time start = Clock::now();
    EXPECT_EQ(plain(milliseconds(300))->put("deaf", bytes).code(), ErrorCode::kTimeout);
    const std::size_t requests = server.count("deaf");
    EXPECT_GT(requests, 1u);
    EXPECT_GE(Clock::now() - start, requests * milliseconds(300));
    EXPECT_LT(Clock::now() - start, std::chrono::seconds(20));
}

}  // namespace
}  // namespace kvcast::test
