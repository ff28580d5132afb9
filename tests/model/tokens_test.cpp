#include "tools/model/tokens.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/tools/scratch.h"
#include "tools/model/tokenizer.h"

namespace kvcast::model {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using tools::error_of;
using tools::ScratchDirectory;

class Tokens : public testing::Test {
  protected:
    std::string file(std::string_view text) {
        tools::store(scratch / "t.json", text);
        return scratch / "t.json";
    }
    std::string refusal(std::string_view text, const std::string& name = "") {
        return error_of([&] { read_tokens(file(text), name); });
    }

    ScratchDirectory scratch;
};

TEST_F(Tokens, AreReadFromArraysAndObjects) {
    EXPECT_THAT(read_tokens(file("[1, 2, 2147483647]"), ""), ElementsAre(1, 2, 2147483647));
    EXPECT_THAT(read_tokens(file(R"({"a": [4]})"), ""), ElementsAre(4));
    EXPECT_THAT(read_tokens(file(R"({"a": [4], "b": [5, 6]})"), "b"), ElementsAre(5, 6));
    const auto sets = read_token_sets(file(R"({"a": [4], "b": [5, 6]})"));
    EXPECT_EQ(sets.size(), 2u);
    EXPECT_THAT(sets.at("b"), ElementsAre(5, 6));
}

TEST_F(Tokens, AreReadRaw) {
    EXPECT_THAT(read_tokens(file(std::string_view("\1\0\0\0\2\1\0\0", 8)), "", TokenFileKind::kRaw),
                ElementsAre(1, 258));
    EXPECT_THAT(error_of([&] { read_tokens(file("12345"), "", TokenFileKind::kRaw); }),
                HasSubstr("multiple of 4"));
}

TEST_F(Tokens, AreRefusedWithAReason) {
    EXPECT_THAT(refusal("[1, -2]"), HasSubstr("token 1"));
    EXPECT_THAT(refusal("[1.5]"), HasSubstr("token 0"));
    EXPECT_THAT(refusal("[2147483648]"), HasSubstr("2147483648"));
    EXPECT_THAT(refusal("[\"x\"]"), HasSubstr("string"));
    EXPECT_THAT(refusal("[]"), HasSubstr("no token"));
    EXPECT_THAT(refusal("{"), HasSubstr("t.json"));
    EXPECT_THAT(refusal("7"), HasSubstr("array or object"));
    EXPECT_THAT(refusal(R"({"a": 1})"), HasSubstr("number"));
    EXPECT_THAT(refusal(R"({"a": [1], "b": [2]})"), HasSubstr("--name"));
    EXPECT_THAT(refusal(R"({"a": [1], "b": [2]})", "c"), HasSubstr("'c'"));
    EXPECT_THAT(refusal(std::string(100000, '[')), HasSubstr("t.json"));
    EXPECT_THAT(error_of([&] { read_token_sets(file("[1]")); }), HasSubstr("object"));
    EXPECT_THAT(error_of([&] { read_tokens(scratch / "none", ""); }), HasSubstr("none"));
}

TEST_F(Tokens, TextWithoutATokenizerIsRefusedWithAReason) {
    EXPECT_THAT(error_of([&] { tokenize_file(scratch.path(), file("hello")); }), HasSubstr("tokenizer.json"));
    tools::store(scratch / "tokenizer.json", "{}");
    EXPECT_THAT(error_of([&] { tokenize_file(scratch.path(), file("hello")); }),
                HasSubstr("no tokenizer is at hand"));
    EXPECT_THAT(error_of([&] { tokenize_file(scratch.path(), scratch / "none"); }), HasSubstr("none"));
}

}  // namespace
}  // namespace kvcast::model
