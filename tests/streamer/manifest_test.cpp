// Manifests say what they mean, and nothing else passes as one.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "codec/format/chain.h"
#include "streamer/encoding.h"
#include "streamer/manifest.h"
#include "streamer/signature.h"
#include "streamer/store.h"
#include "tests/codec/synthetic.h"
#include "tests/streamer/keys.h"

namespace kvcast::test {
namespace {

using namespace streamer;
using testing::HasSubstr;
using Json = nlohmann::json;

Manifest sample() {
    Manifest m;
    m.model = "m";
    m.layout = make_layout(2, {{1, 8}, {1, 8}}, Dtype::kBf16, RopePairing::kHalf);
    m.base_position = 7;
    m.calibration = {sha256({}), 1000};
    m.levels = {{0, Profile::kLossless, 0.0}, {3, Profile::kKlt, 0.0125}, {4, Profile::kKlt, std::nullopt}};
    m.created = 1'800'000'000;
    m.expires = m.created + 60;
    m.session = "night";
    Hash parent = {};
    for (std::int32_t i = 0; i < 3; ++i) {
        ManifestChunk c;
        c.tokens = 2;
        c.token_ids = {10 * i, 10 * i + 1};
        c.chain = parent = chain_hash(parent, "salt", layout_hash(m.layout), m.model, c.token_ids);
        c.objects = {{0, 500, {}}, {3, 50, {}}};
        m.chunks.push_back(c);
    }
    return m;
}

TEST(Manifest, ComesBackAsItWasWritten) {
    const Manifest m = sample();
    const Result<Manifest> back = read_manifest(write_manifest(m));
    ASSERT_TRUE(back.ok()) << back.status().message();
    EXPECT_EQ(back.value(), m);
    EXPECT_EQ(m.tokens(), 6u);
}

// The sentence with which a changed manifest is refused; empty where it is not.
std::string refusal(const std::function<void(Json&)>& change) {
    Json json = Json::parse(write_manifest(sample()));
    change(json);
    const Result<Manifest> m = read_manifest(json.dump());
    if (m.ok()) return "";
    EXPECT_EQ(m.status().code(), ErrorCode::kBadManifest);
    return m.status().message();
}

std::string repeated(std::size_t times, const std::string& text) {
    std::string out;
    for (std::size_t i = 0; i < times; ++i) out += text;
    return out;
}

// A byte of JSON may ask for 50 of memory.
TEST(Manifest, NothingIsBuiltOfWhatNobodyAsksFor) {
    const std::string good = write_manifest(sample());
    const auto with = [&](const std::string& field) { return "{" + field + "," + good.substr(1); };
    const auto of = [](const std::string& document) { return read_manifest(document).status().message(); };
    const std::string many = "[" + repeated(100'000, "[],") + "1]",
                      numbers = "[" + repeated(100'000, "1,") + "1]";
    EXPECT_EQ(of(with(R"("unknown":)" + many)), "");
    EXPECT_EQ(of(with(R"("unknown":{"chunks":)" + many + R"(,"model":[{"level":7}]})")), "");
    EXPECT_THAT(of(with(R"("levels":)" + many)), HasSubstr("longer list"));
    EXPECT_THAT(of(with(R"("levels":)" + numbers)), HasSubstr("more values"));
    EXPECT_THAT(of(with(R"("chunks":)" + many)), HasSubstr("list of objects"));
    EXPECT_THAT(of(with(R"("chunks":[{"token_ids":)" + many + "}]")), HasSubstr("longer list"));
    EXPECT_THAT(of(with(R"("chunks":[{"token_ids":)" + numbers + "}]")), HasSubstr("more values"));
    EXPECT_THAT(of(with(R"("chunks":7)")), HasSubstr("list of objects"));
    EXPECT_THAT(of(with(R"("chunks":[{"kl":[)" + repeated(60'000, "0,") + "{}]}]")),
                HasSubstr("longer list"));
    EXPECT_THAT(of(repeated(100'000, "[")), HasSubstr("too deeply"));
    EXPECT_THAT(of(with(R"("unknown":)" + repeated(100'000, "[") + repeated(100'000, "]"))),
                HasSubstr("too deeply"));
    EXPECT_EQ(open_manifest(repeated(100'000, "["), {}).status().code(), ErrorCode::kBadManifest);
    EXPECT_EQ(open_manifest(R"({"signatures":)" + many + "}", {}).status().code(), ErrorCode::kBadManifest);
    EXPECT_TRUE(open_manifest(with(R"("unknown":)" + many), {}).ok());
}

TEST(Manifest, ChunksAreThereOnce) {
    const Json json = Json::parse(write_manifest(sample()));
    const std::string chunks = "\"chunks\":" + json["chunks"].dump();
    EXPECT_THAT(read_manifest("{" + chunks + "," + json.dump().substr(1)).status().message(),
                HasSubstr("twice"));
}

TEST(Manifest, EveryMissingFieldIsNamed) {
    for (const char* name :
         {"kvcast_manifest", "model", "layout", "base_position", "levels", "chunks", "created"})
        EXPECT_THAT(refusal([&](Json& j) { j.erase(name); }), HasSubstr(name));
    for (const char* name : {"chain", "tokens", "objects"})
        EXPECT_THAT(refusal([&](Json& j) { j["chunks"][1].erase(name); }), HasSubstr(name));
    for (const char* name : {"level", "bytes", "sha256"})
        EXPECT_THAT(refusal([&](Json& j) { j["chunks"][1]["objects"][0].erase(name); }), HasSubstr(name));
}

TEST(Manifest, EveryValueOfAnotherTypeIsRefused) {
    const Json good = Json::parse(write_manifest(sample()));
    const Json wrong[] = {nullptr, -1, 1.5, "x", Json::array(), Json::object(), true, 1e300};
    std::size_t tried = 0;
    const Json flat = good.flatten();
    for (const auto& [path, value] : flat.items()) {
        for (const Json& w : wrong) {
            if (w.type() == value.type()) continue;
            if (path == "/levels/0/kl" || path == "/levels/1/kl") continue;  // any number will do
            Json changed = good;
            changed[Json::json_pointer(path)] = w;
            EXPECT_FALSE(read_manifest(changed.dump()).ok()) << path << " = " << w;
            ++tried;
        }
    }
    EXPECT_GT(tried, 150u);
}

TEST(Manifest, WhatContradictsItselfIsRefused) {
    EXPECT_THAT(refusal([](Json& j) { j["kvcast_manifest"] = 2; }), HasSubstr("version 2"));
    EXPECT_THAT(refusal([](Json& j) { j["levels"][1]["level"] = 0; }), HasSubstr("klt"));
    EXPECT_THAT(refusal([](Json& j) { std::swap(j["levels"][1], j["levels"][2]); }), HasSubstr("ascending"));
    EXPECT_THAT(refusal([](Json& j) { j["levels"][1]["kl"] = -0.1; }), HasSubstr("kl"));
    EXPECT_THAT(refusal([](Json& j) { j.erase("calibration"); }), HasSubstr("calibration"));
    EXPECT_THAT(refusal([](Json& j) { j["calibration"]["bytes"] = 0; }), HasSubstr("no bytes"));
    EXPECT_THAT(refusal([](Json& j) { j["chunks"] = Json::array(); }), HasSubstr("chunks"));
    EXPECT_THAT(refusal([](Json& j) { j["chunks"][0]["tokens"] = 0; }), HasSubstr("token"));
    EXPECT_THAT(refusal([](Json& j) { j["chunks"][0]["tokens"] = 3; }), HasSubstr("token_ids"));
    EXPECT_THAT(refusal([](Json& j) { j["chunks"][0]["token_ids"][0] = 1ull << 31; }), HasSubstr("token id"));
    EXPECT_THAT(refusal([](Json& j) { j["chunks"][0]["objects"][1]["level"] = 5; }), HasSubstr("not listed"));
    EXPECT_THAT(refusal([](Json& j) { j["chunks"][0]["objects"][0]["bytes"] = 0; }), HasSubstr("no bytes"));
    EXPECT_THAT(refusal([](Json& j) { j["chunks"][0]["objects"][0]["bytes"] = UINT64_MAX; }),
                HasSubstr("bytes"));
    EXPECT_THAT(refusal([](Json& j) { j["chunks"][0]["chain"] = std::string(64, 'G'); }), HasSubstr("chain"));
    EXPECT_THAT(refusal([](Json& j) { j["layout"] = "AAAA"; }), HasSubstr("layout"));
    EXPECT_THAT(refusal([](Json& j) { j["expires"] = "2026-02-30T00:00:00Z"; }), HasSubstr("expires"));
    EXPECT_FALSE(read_manifest("").ok());
    EXPECT_FALSE(read_manifest("[1]").ok());
    EXPECT_FALSE(read_manifest(std::string(100'000, '[')).ok());
}

TEST(Manifest, TimesAreOfOneForm) {
    EXPECT_EQ(format_time(0), "1970-01-01T00:00:00Z");
    EXPECT_EQ(format_time(1'800'000'000), "2027-01-15T08:00:00Z");
    EXPECT_EQ(parse_time("2027-01-15T08:00:00Z"), 1'800'000'000);
    for (const char* bad : {"", "2027-01-15", "2027-01-15T08:00:00", "2027-13-15T08:00:00Z",
                            "2027-01-15T24:00:00Z", "2027-01-15t08:00:00Z", "+027-01-15T08:00:00Z"})
        EXPECT_FALSE(parse_time(bad)) << bad;
}

TEST(Chain, ConfirmsTheTokensThatItIsOf) {
    const Manifest m = sample();
    const std::vector<std::int32_t> ids = {0, 1, 10, 11, 20, 21};
    EXPECT_EQ(confirm_chain(m, "salt", {}).value(), 3u);
    EXPECT_EQ(confirm_chain(m, "salt", ids).value(), 3u);
    EXPECT_EQ(confirm_chain(m, "salt", std::span(ids).first(5)).value(), 2u);
    const std::vector<std::int32_t> fork = {0, 1, 10, 12, 20, 21};
    EXPECT_EQ(confirm_chain(m, "salt", fork).value(), 1u);
    const std::vector<std::int32_t> other = {1, 1, 10, 11, 20, 21};
    EXPECT_EQ(confirm_chain(m, "salt", other).status().code(), ErrorCode::kForeign);
    EXPECT_EQ(confirm_chain(m, "", {}).status().code(), ErrorCode::kForeign);
}

TEST(Chain, NeedsTokensFromOneSide) {
    Manifest m = sample();
    for (ManifestChunk& c : m.chunks) c.token_ids.clear();
    EXPECT_EQ(confirm_chain(m, "salt", {}).status().code(), ErrorCode::kBadArgument);
    const std::vector<std::int32_t> ids = {0, 1, 10, 11};
    EXPECT_EQ(confirm_chain(m, "salt", ids).value(), 2u);
}

TEST(Signature, OpensWithTheKeyThatSigned) {
    const std::string json = write_manifest(sample());
    const std::string signed_json = sign_manifest(json, private_key(1));
    const PublicKey keys[] = {public_key(2), public_key(1)};
    const Result<std::string> opened = open_manifest(signed_json, keys);
    ASSERT_TRUE(opened.ok()) << opened.status().message();
    EXPECT_EQ(opened.value(), json);
    EXPECT_EQ(open_manifest(signed_json, {}).value(), json);  // who trusts nobody in particular may read it
    EXPECT_EQ(open_manifest(json, {}).value(), json);
    EXPECT_EQ(private_key(1).id(), public_key(1).id());
}

TEST(Signature, AnythingElseIsRefused) {
    const std::string json = write_manifest(sample());
    const std::string signed_json = sign_manifest(json, private_key(1));
    const PublicKey trusted[] = {public_key(1)};
    const PublicKey other[] = {public_key(2)};
    EXPECT_EQ(open_manifest(json, trusted).status().code(), ErrorCode::kUnsigned);
    EXPECT_EQ(open_manifest(signed_json, other).status().code(), ErrorCode::kBadSignature);
    for (std::size_t at = 0; at < signed_json.size(); at += 7) {
        std::string changed = signed_json;
        changed[at] = changed[at] == 'A' ? 'B' : 'A';
        const Result<std::string> opened = open_manifest(changed, trusted);
        EXPECT_TRUE(!opened.ok() || opened.value() == json) << at;  // the key id is a hint that nobody trusts
    }
    Json envelope = Json::parse(signed_json);
    envelope["signatures"] = Json::array();
    EXPECT_EQ(open_manifest(envelope.dump(), trusted).status().code(), ErrorCode::kBadSignature);
    envelope = Json::parse(signed_json);
    envelope["payloadType"] = "text/plain";
    EXPECT_FALSE(open_manifest(envelope.dump(), trusted).ok());
    EXPECT_FALSE(open_manifest("no json", trusted).ok());
}

TEST(Signature, KeysOfAnotherKindAreRefused) {
    EXPECT_FALSE(PublicKey::from_pem("").ok());
    EXPECT_FALSE(PublicKey::from_pem("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n").ok());
    EXPECT_FALSE(PrivateKey::from_pem(kPublicPem[0]).ok());
}

TEST(Base64, IsCanonical) {
    for (std::size_t n = 0; n < 10; ++n) {
        const std::vector<std::uint8_t> bytes(n, 0xa5);
        EXPECT_EQ(base64_decode(base64_encode(bytes)), bytes);
    }
    for (const char* bad : {"A", "AA", "AAA", "A===", "AB==", "AAB=", "A A=", "AAAA\n", "=AAA", "AA=A"})
        EXPECT_FALSE(base64_decode(bad)) << bad;
}

TEST(StoreNames, FollowFromContent) {
    Manifest m = sample();
    EXPECT_EQ(object_name(m.chain(), {3, 5, sha256({})}), to_hex(m.chain()) + "/3-e3b0c44298fc1c14.kvc");
    const std::string plain_session = manifest_name(m);
    m.session.clear();
    EXPECT_EQ(manifest_name(m), "manifests/" + to_hex(m.chain()) + ".json");
    EXPECT_NE(plain_session, manifest_name(m));
    const std::string pointer = pointer_to(plain_session);
    EXPECT_LE(pointer.size(), kPointerBytes);
    EXPECT_EQ(manifest_of_pointer({reinterpret_cast<const std::uint8_t*>(pointer.data()), pointer.size()}),
              plain_session);
    const std::string evil = "../../" + std::string(60, 'a');
    EXPECT_FALSE(manifest_of_pointer({reinterpret_cast<const std::uint8_t*>(evil.data()), evil.size()}));
    EXPECT_EQ(root_of_manifest("http://h/a/manifests/x.json?y=1/2"), "http://h/a");
    EXPECT_EQ(join_url("http://h/", "a/b"), "http://h/a/b");
}

}  // namespace
}  // namespace kvcast::test
