#include "tools/common/safetensors.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <thread>

#include "tests/tools/scratch.h"

namespace kvcast::tools {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::Pair;
using testing::SizeIs;
using testing::StartsWith;

// A file of a header as given and `data_bytes` zeros.
std::string file_of(std::string_view json, std::size_t data_bytes = 0) {
    std::string file(8, '\0');
    for (std::size_t i = 0; i < 8; ++i) file[i] = static_cast<char>(json.size() >> (8 * i));
    return file.append(json).append(data_bytes, '\0');
}

std::string tensor(std::string_view type, std::string_view shape, std::string_view offsets) {
    return fmt::format(R"({{"dtype":"{}","shape":{},"data_offsets":{}}})", type, shape, offsets);
}

// A file of one tensor named k.
std::string one(std::string_view type, std::string_view shape, std::string_view offsets,
                std::size_t data_bytes) {
    return file_of(fmt::format(R"({{"k":{}}})", tensor(type, shape, offsets)), data_bytes);
}

// Why a file is refused as damaged; empty where it is not. On the heap and no longer than it is, for the
// sanitizers to watch.
std::string refusal(const std::string& file) {
    const std::vector<char> exact(file.begin(), file.end());
    try {
        SafetensorsReader(std::as_bytes(std::span(exact)), "x");
    } catch (const DamagedInput& damage) {
        return damage.what();
    }
    return "";
}

TEST(SafetensorsReader, GivesTensorsInTheOrderOfTheHeader) {
    const std::string file = file_of(fmt::format(R"({{"v":{},"k":{}}}  )", tensor("BF16", "[2,3]", "[4,16]"),
                                                 tensor("F32", "[]", "[0,4]")),
                                     16);
    const SafetensorsReader reader(bytes_of(file), "x");
    ASSERT_THAT(reader.tensors(), SizeIs(2));
    const TensorView& v = reader.tensors()[0];
    EXPECT_EQ(v.name, "v");
    EXPECT_EQ(v.type, TensorType::kBf16);
    EXPECT_EQ(v.type_name, "BF16");
    EXPECT_THAT(v.shape, ElementsAre(2, 3));
    EXPECT_EQ(v.data.data(), bytes_of(file).data() + file.size() - 12);
    EXPECT_THAT(reader.tensors()[1].shape, ElementsAre());
    EXPECT_EQ(reader.at("k").data.size(), 4u);
}

TEST(SafetensorsReader, GivesTheMetadata) {
    const std::string file = file_of(R"({"__metadata__":{"format":"pt","a\u00e9":""}})");
    const SafetensorsReader reader(bytes_of(file), "x");
    EXPECT_THAT(reader.metadata(), ElementsAre(Pair("a\u00e9", ""), Pair("format", "pt")));
    EXPECT_TRUE(reader.tensors().empty());
}

TEST(SafetensorsReader, FindsATensorByName) {
    const std::string file = one("U8", "[1]", "[0,1]", 1);
    const SafetensorsReader reader(bytes_of(file), "x");
    EXPECT_EQ(reader.find("k"), &reader.tensors()[0]);
    EXPECT_EQ(reader.find("j"), nullptr);
    EXPECT_EQ(reader.find("l"), nullptr);
    EXPECT_EQ(error_of([&] { reader.at("v"); }), "x: expected a tensor 'v', found 'k'");
}

TEST(SafetensorsReader, KeepsATypeItDoesNotKnow) {
    const std::string file = one("F8_E4M3", "[3]", "[0,3]", 3);
    const SafetensorsReader reader(bytes_of(file), "x");
    EXPECT_EQ(reader.at("k").type, TensorType::kOther);
    EXPECT_EQ(reader.at("k").type_name, "F8_E4M3");
}

TEST(SafetensorsReader, ReadsAFileByPath) {
    const ScratchDirectory scratch;
    store(scratch / "in", one("U8", "[2]", "[0,2]", 2));
    EXPECT_EQ(SafetensorsReader(scratch / "in").at("k").data.size(), 2u);
    EXPECT_THAT(error_of([] { SafetensorsReader("no/such"); }), StartsWith("cannot open no/such: "));
}

TEST(SafetensorsReader, RefusesAFileWithoutAWholeHeader) {
    EXPECT_EQ(refusal(""), "x: is empty, expected a safetensors file");
    EXPECT_EQ(refusal("abc"), "x: expected an 8-byte header length, found a file of 3 bytes");
    EXPECT_EQ(refusal(file_of("{}").substr(0, 9)),
              "x: expected a safetensors header of at most 1 bytes, found a length of 2");
    EXPECT_THAT(refusal(std::string(20, '\xFF')), HasSubstr("found a length of 18446744073709551615"));
    EXPECT_THAT(refusal(file_of("")), HasSubstr("begins with '{'"));
    EXPECT_THAT(refusal(file_of(" {}")), HasSubstr("begins with '{'"));
}

TEST(SafetensorsReader, RefusesAHeaderThatIsNotJson) {
    EXPECT_EQ(refusal(file_of("{\"k\"")), "x: the header is not valid JSON at its byte 5");
    EXPECT_THAT(refusal(file_of("{} {}")), HasSubstr("not valid JSON"));
    EXPECT_THAT(refusal(file_of(std::string("{}\0x", 4))), HasSubstr("not valid JSON at its byte 3"));
    EXPECT_THAT(refusal(file_of("{\"\xFF\":{}}")), HasSubstr("not valid JSON"));
    EXPECT_THAT(refusal(one("U8", "[1e999]", "[0,1]", 1)), HasSubstr("not valid JSON"));
}

TEST(SafetensorsReader, RefusesDeepNestingWithoutDescendingIntoIt) {
    const std::string deep(5'000'000, '[');
    EXPECT_THAT(refusal(file_of("{\"k\":" + deep)),
                HasSubstr("tensor 'k': expected an object, found an array"));
    EXPECT_THAT(refusal(one("U8", deep, "[0,1]", 1)), HasSubstr("unsigned integer in shape, found an array"));
}

TEST(SafetensorsReader, RefusesValuesOfTheWrongKind) {
    EXPECT_EQ(refusal(file_of(R"({"__metadata__":{"a":1}})")),
              "x: __metadata__: expected a string as value, found a number");
    EXPECT_THAT(refusal(file_of(R"({"__metadata__":null})")), HasSubstr("found null"));
    EXPECT_THAT(refusal(file_of(R"({"k":true})")), HasSubstr("found a boolean"));
    EXPECT_THAT(refusal(file_of(R"({"k":{"dtype":{}}})")), HasSubstr("expected a string as dtype"));
    EXPECT_THAT(refusal(one("U8", "\"1\"", "[0,1]", 1)),
                HasSubstr("expected an array as shape, found a string"));
    EXPECT_THAT(refusal(one("U8", "[-1]", "[0,1]", 1)), HasSubstr("found a negative number"));
    EXPECT_THAT(refusal(one("U8", "[1.5]", "[0,1]", 1)), HasSubstr("found '1.5'"));
    EXPECT_THAT(refusal(one("U8", "[18446744073709551616]", "[0,1]", 1)),
                HasSubstr("'18446744073709551616'"));
}

TEST(SafetensorsReader, RefusesMissingAndUnknownFields) {
    EXPECT_EQ(refusal(file_of(R"({"k":{}})")), "x: tensor 'k' has no dtype");
    EXPECT_EQ(refusal(file_of(R"({"k":{"dtype":"U8"}})")), "x: tensor 'k' has no shape");
    EXPECT_EQ(refusal(file_of(R"({"k":{"dtype":"U8","shape":[]}})")), "x: tensor 'k' has no data_offsets");
    EXPECT_EQ(refusal(one("U8", "[1]", "[0]", 1)), "x: tensor 'k' has 1 data_offsets, expected 2");
    EXPECT_THAT(refusal(one("U8", "[1]", "[0,1,2]", 1)), HasSubstr("at most 2 numbers"));
    EXPECT_THAT(refusal(file_of(R"({"k":{"stride":1}})")), HasSubstr("found 'stride'"));
}

TEST(SafetensorsReader, RefusesWhateverAppearsTwice) {
    const std::string k = tensor("U8", "[1]", "[0,1]");
    EXPECT_EQ(refusal(file_of(fmt::format(R"({{"k":{},"k":{}}})", k, k), 1)), "x: tensor 'k' appears twice");
    EXPECT_THAT(refusal(file_of(R"({"k":{"dtype":"U8","dtype":"U8"}})")), HasSubstr("'dtype' appears twice"));
    EXPECT_THAT(refusal(file_of(R"({"__metadata__":{"a":"","a":""}})")), HasSubstr("'a' appears twice"));
    EXPECT_THAT(refusal(file_of(R"({"__metadata__":{},"__metadata__":{}})")), HasSubstr("appears twice"));
}

TEST(SafetensorsReader, RefusesDataOfAnotherSizeThanTheShape) {
    EXPECT_EQ(refusal(one("BF16", "[2,3]", "[0,11]", 12)),
              "x: tensor 'k' has 11 bytes of data, its shape [2, 3] of BF16 needs 12");
    EXPECT_EQ(refusal(one("BF16", "[2,3]", "[0,12]", 12)), "");
    EXPECT_EQ(refusal(one("BF16", "[2,0]", "[0,0]", 0)), "");
}

TEST(SafetensorsReader, RefusesOffsetsOutsideTheData) {
    EXPECT_EQ(refusal(one("U8", "[4]", "[0,4]", 3)),
              "x: tensor 'k' lies at bytes 0 to 4, expected a range within 3 bytes of data");
    EXPECT_THAT(refusal(one("U8", "[1]", "[2,1]", 3)), HasSubstr("bytes 2 to 1"));
    EXPECT_THAT(refusal(one("U8", "[0]", "[4,4]", 3)), HasSubstr("bytes 4 to 4"));
    EXPECT_THAT(refusal(one("U8", "[1]", "[18446744073709551615,18446744073709551615]", 3)),
                HasSubstr("within 3"));
}

TEST(SafetensorsReader, RefusesOverlappingTensors) {
    const std::string json =
        fmt::format(R"({{"a":{},"b":{}}})", tensor("U8", "[2]", "[1,3]"), tensor("U8", "[2]", "[0,2]"));
    EXPECT_EQ(refusal(file_of(json, 3)), "x: tensor 'a' overlaps tensor 'b'");
}

TEST(SafetensorsReader, RefusesShapesThatOverflowEvenBesideAZero) {
    const std::string big = "4611686018427387904";
    EXPECT_THAT(refusal(one("U8", fmt::format("[{},4]", big), "[0,0]", 0)),
                HasSubstr("shape that overflows"));
    EXPECT_THAT(refusal(one("F32", fmt::format("[{}]", big), "[0,0]", 0)), HasSubstr("shape that overflows"));
    EXPECT_THAT(refusal(one("X", fmt::format("[0,{},4]", big), "[0,0]", 0)),
                HasSubstr("shape that overflows"));
    std::string many = "[1";
    for (int i = 0; i < 64; ++i) many += ",1";
    EXPECT_THAT(refusal(one("U8", many + "]", "[0,1]", 1)), HasSubstr("at most 64 numbers"));
}

TEST(SafetensorsReader, SpellsOutControlBytesOfANameAndCutsItShort) {
    EXPECT_EQ(refusal(file_of(R"({"\u001b[31m":{}})")), "x: tensor '\\x1b[31m' has no dtype");
    const std::string name(1000, 'n');
    EXPECT_EQ(refusal(file_of("{\"" + name + "\":{}}")),
              "x: tensor '" + name.substr(0, 80) + "...' has no dtype");
}

TEST(SafetensorsWriter, WritesWhatTheReaderReads) {
    const ScratchDirectory scratch;
    SafetensorsWriter writer(scratch / "out",
                             {{"a\"b", TensorType::kU8, {3}}, {"k", TensorType::kF32, {2, 1}}},
                             {{"format", "pt"}});
    writer.write(1, 4, bytes_of("wxyz"));
    writer.write(0, 0, bytes_of("abc"));
    writer.write(1, 0, bytes_of("stuv"));
    writer.commit();
    const SafetensorsReader reader(scratch / "out");
    ASSERT_THAT(reader.tensors(), SizeIs(2));
    EXPECT_EQ(text_of(reader.at("a\"b").data), "abc");
    EXPECT_EQ(text_of(reader.at("k").data), "stuvwxyz");
    EXPECT_THAT(reader.at("k").shape, ElementsAre(2, 1));
    EXPECT_THAT(reader.metadata(), ElementsAre(Pair("format", "pt")));
    EXPECT_EQ(reader.tensors()[0].name, "a\"b");
}

TEST(SafetensorsWriter, AlignsTensorsWithoutHoles) {
    const ScratchDirectory scratch;
    SafetensorsWriter writer(
        scratch / "out",
        {{"u8", TensorType::kU8, {3}}, {"bf16", TensorType::kBf16, {5}}, {"i64", TensorType::kI64, {1}}}, {});
    writer.commit();
    const MappedFile file(scratch / "out");
    const SafetensorsReader reader(file.bytes(), "out");
    const auto offset = [&](const char* name) { return reader.at(name).data.data() - file.bytes().data(); };
    EXPECT_EQ(offset("i64") % 8, 0);
    EXPECT_EQ(offset("bf16"), offset("i64") + 8);
    EXPECT_EQ(offset("u8"), offset("bf16") + 10);
    EXPECT_EQ(file.bytes().size(), static_cast<std::size_t>(offset("u8") + 3));
}

TEST(SafetensorsWriter, LeavesNothingBehindWhenNotCommitted) {
    const ScratchDirectory scratch;
    { SafetensorsWriter(scratch / "out", {{"k", TensorType::kU8, {1}}}, {}).write(0, 0, bytes_of("x")); }
    EXPECT_EQ(scratch.entries(), 0u);
}

TEST(SafetensorsWriter, WritesAFileOfNoTensors) {
    const ScratchDirectory scratch;
    SafetensorsWriter(scratch / "out", {}, {}).commit();
    EXPECT_EQ(contents(scratch / "out"), std::string("\x08\0\0\0\0\0\0\0{}      ", 16));
}

TEST(SafetensorsWriter, RefusesBytesOutsideATensor) {
    const ScratchDirectory scratch;
    SafetensorsWriter writer(scratch / "out", {{"k", TensorType::kU8, {4}}}, {});
    EXPECT_THAT(error_of([&] { writer.write(0, 2, bytes_of("abc")); }),
                HasSubstr("tensor 'k' holds 4 bytes, 3 at offset 2 do not fit"));
    EXPECT_NE(error_of([&] { writer.write(0, SIZE_MAX, bytes_of("a")); }), "");
    EXPECT_THAT(error_of([&] { writer.write(1, 0, {}); }),
                HasSubstr("expected one of 1 tensors, found index 1"));
}

TEST(SafetensorsWriter, RefusesTensorsThatTheFormatCannotHold) {
    const ScratchDirectory scratch;
    const auto why = [&](std::vector<TensorSpec> tensors) {
        return error_of([&] { SafetensorsWriter(scratch / "out", std::move(tensors), {}); });
    };
    const std::size_t big = std::size_t{1} << 61;
    EXPECT_THAT(why({{"k", TensorType::kU8, {1}}, {"k", TensorType::kU8, {1}}}), HasSubstr("appears twice"));
    EXPECT_THAT(why({{"__metadata__", TensorType::kU8, {1}}}), HasSubstr("keeps for metadata"));
    EXPECT_THAT(why({{"k", TensorType::kOther, {1}}}), HasSubstr("no known element type"));
    EXPECT_THAT(why({{"k", TensorType::kF32, {big, 2}}}), HasSubstr("shape that overflows"));
    EXPECT_THAT(why({{"a", TensorType::kU8, {big}}, {"b", TensorType::kU8, {big, 2}}}),
                HasSubstr("takes the data past"));
    EXPECT_THAT(why({{"\xFF", TensorType::kU8, {1}}}), HasSubstr("not valid UTF-8"));
    EXPECT_EQ(scratch.entries(), 0u);
}

TEST(SafetensorsWriter, FindsAtOnceThatTheOutputCannotHoldTheFile) {
    const ScratchDirectory scratch;
    const std::vector<TensorSpec> huge = {{"k", TensorType::kU8, {std::size_t{1} << 61}}};
    EXPECT_THAT(error_of([&] { SafetensorsWriter(scratch / "out", huge, {}); }),
                HasSubstr("cannot reserve space"));
    EXPECT_EQ(scratch.entries(), 0u);
    EXPECT_THAT(error_of([] { SafetensorsWriter("-", {}, {}); }), HasSubstr("standard output"));
    EXPECT_THAT(error_of([] { SafetensorsWriter("/dev/full", {}, {}); }),
                HasSubstr("No space left on device"));
}

TEST(SafetensorsWriter, TakesDisjointRangesFromManyThreads) {
    const ScratchDirectory scratch;
    constexpr std::size_t kThreads = 4;
    constexpr std::size_t kPart = 100'000;
    SafetensorsWriter writer(scratch / "out", {{"k", TensorType::kU8, {kThreads * kPart}}}, {});
    std::vector<std::thread> threads;
    for (std::size_t t = 0; t < kThreads; ++t) {
        threads.emplace_back([&writer, t] {
            writer.write(0, t * kPart, bytes_of(std::string(kPart, static_cast<char>('a' + t))));
        });
    }
    for (std::thread& thread : threads) thread.join();
    writer.commit();
    const std::string all = text_of(SafetensorsReader(scratch / "out").at("k").data);
    for (std::size_t t = 0; t < kThreads; ++t) {
        EXPECT_EQ(all.find_first_not_of(static_cast<char>('a' + t), t * kPart),
                  t + 1 < kThreads ? (t + 1) * kPart : all.npos);
    }
}

}  // namespace
}  // namespace kvcast::tools
