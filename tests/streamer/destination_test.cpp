// Servers that are written to: nothing is concluded from half an answer.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "streamer/http/http_destination.h"
#include "tests/streamer/fault_server.h"
#include "tests/tools/scratch.h"

namespace kvcast::test {
namespace {

using namespace streamer;
using testing::HasSubstr;

class DestinationTest : public testing::Test {
  protected:
    std::unique_ptr<Destination> plain() {
        return std::move(http_destination(server.url("kv"), {}, process_variables).value());
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

}  // namespace
}  // namespace kvcast::test
