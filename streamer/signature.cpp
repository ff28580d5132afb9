#include "streamer/signature.h"

#include <fmt/format.h>
#include <openssl/bio.h>
#include <openssl/evp.h>
#include <openssl/pem.h>

#include <array>

#include "codec/format/chain.h"
#include "streamer/encoding.h"
#include "streamer/json_gate.h"
#include "streamer/manifest.h"

namespace kvcast::streamer {
namespace {

constexpr std::string_view kPayloadType = "application/vnd.kvcast.manifest+json";
constexpr std::size_t kSignatureBytes = 64;
constexpr std::size_t kMostSignatures = 16;

EVP_PKEY* pkey(const std::shared_ptr<void>& key) {
    return static_cast<EVP_PKEY*>(key.get());
}

using Bio = std::unique_ptr<BIO, decltype(&BIO_free)>;
using Digest = std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)>;

Bio reader(std::string_view pem) {
    return {BIO_new_mem_buf(pem.data(), static_cast<int>(pem.size())), BIO_free};
}

// A password that is asked for is never there.
int no_password(char*, int, int, void*) {
    return 0;
}

Status check(EVP_PKEY* key, const char* what) {
    if (key != nullptr && EVP_PKEY_id(key) == EVP_PKEY_ED25519) return {};
    return {ErrorCode::kBadArgument, fmt::format("not a PEM file of {} Ed25519 key", what)};
}

KeyId id_of(EVP_PKEY* key) {
    std::array<std::uint8_t, 32> raw;
    std::size_t length = raw.size();
    EVP_PKEY_get_raw_public_key(key, raw.data(), &length);
    return to_hex(sha256(raw));
}

// DSSE's pre-authentication encoding.
std::vector<std::uint8_t> signed_bytes(std::string_view payload) {
    const std::string text =
        fmt::format("DSSEv1 {} {} {} {}", kPayloadType.size(), kPayloadType, payload.size(), payload);
    return {text.begin(), text.end()};
}

Status bad_envelope(const char* what) {
    return {ErrorCode::kBadManifest, fmt::format("signed manifest: {}", what)};
}

Status check_signatures(const nlohmann::json& envelope, std::string_view payload,
                        std::span<const PublicKey> trusted) {
    const auto signatures = envelope.find("signatures");
    if (signatures == envelope.end() || !signatures->is_array() || signatures->size() > kMostSignatures)
        return bad_envelope("'signatures' is not a list of at most 16");
    const std::vector<std::uint8_t> message = signed_bytes(payload);
    for (const auto& entry : *signatures) {
        if (!entry.is_object() || !entry.contains("sig") || !entry["sig"].is_string())
            return bad_envelope("a signature has no 'sig'");
        const auto signature = base64_decode(entry["sig"].get_ref<const std::string&>());
        if (!signature || signature->size() != kSignatureBytes) continue;
        for (const PublicKey& key : trusted) {
            if (key.verify(message, *signature)) return {};
        }
    }
    return {ErrorCode::kBadSignature, "the manifest carries no good signature of a trusted key"};
}

// Discarded where the document is not JSON, or too much of it. Of a manifest that is none, nothing is built.
nlohmann::json parse_envelope(std::string_view document) {
    static constexpr std::string_view kKeys[] = {"payloadType", "payload", "signatures", "sig"};
    constexpr std::size_t kMostContainers = 2 * kMostSignatures, kMostValues = 8 * kMostSignatures;
    try {
        return nlohmann::json::parse(document, JsonGate(kKeys, kMostContainers, kMostValues), false);
    } catch (const JsonRefused&) {
        return nlohmann::json::value_t::discarded;
    }
}

}  // namespace

Result<PublicKey> PublicKey::from_pem(std::string_view pem) {
    EVP_PKEY* key = PEM_read_bio_PUBKEY(reader(pem).get(), nullptr, no_password, nullptr);
    PublicKey out;
    out.key_ = {key, [](void* p) { EVP_PKEY_free(static_cast<EVP_PKEY*>(p)); }};
    if (Status s = check(key, "a public"); !s.ok()) return s;
    out.id_ = id_of(key);
    return out;
}

bool PublicKey::verify(std::span<const std::uint8_t> message, std::span<const std::uint8_t> signature) const {
    const Digest digest(EVP_MD_CTX_new(), EVP_MD_CTX_free);
    return EVP_DigestVerifyInit(digest.get(), nullptr, nullptr, nullptr, pkey(key_)) == 1 &&
           EVP_DigestVerify(digest.get(), signature.data(), signature.size(), message.data(),
                            message.size()) == 1;
}

Result<PrivateKey> PrivateKey::from_pem(std::string_view pem) {
    EVP_PKEY* key = PEM_read_bio_PrivateKey(reader(pem).get(), nullptr, no_password, nullptr);
    PrivateKey out;
    out.key_ = {key, [](void* p) { EVP_PKEY_free(static_cast<EVP_PKEY*>(p)); }};
    if (Status s = check(key, "a private"); !s.ok()) return s;
    out.id_ = id_of(key);
    return out;
}

PublicKey PrivateKey::public_key() const {
    PublicKey out;
    out.key_ = key_;
    out.id_ = id_;
    return out;
}

std::vector<std::uint8_t> PrivateKey::sign(std::span<const std::uint8_t> message) const {
    const Digest digest(EVP_MD_CTX_new(), EVP_MD_CTX_free);
    std::vector<std::uint8_t> out(kSignatureBytes);
    std::size_t length = out.size();
    EVP_DigestSignInit(digest.get(), nullptr, nullptr, nullptr, pkey(key_));
    EVP_DigestSign(digest.get(), out.data(), &length, message.data(), message.size());
    return out;
}

std::string sign_manifest(const std::string& manifest_json, const PrivateKey& key) {
    const std::vector<std::uint8_t> payload(manifest_json.begin(), manifest_json.end());
    const nlohmann::json envelope = {
        {"payloadType", kPayloadType},
        {"payload", base64_encode(payload)},
        {"signatures",
         {{{"keyid", key.id()}, {"sig", base64_encode(key.sign(signed_bytes(manifest_json)))}}}}};
    return envelope.dump() + "\n";
}

Result<std::string> open_manifest(std::string_view document, std::span<const PublicKey> trusted) {
    if (document.size() > 2 * ManifestLimits::kBytes) return bad_envelope("too long");
    const auto json = parse_envelope(document);
    if (json.is_discarded() || !json.is_object())
        return Status(ErrorCode::kBadManifest, "manifest: not JSON");
    if (!json.contains("payloadType")) {
        if (!trusted.empty())
            return Status(ErrorCode::kUnsigned, "the manifest is not signed, and a trusted key was given");
        return std::string(document);
    }
    if (json["payloadType"] != kPayloadType) return bad_envelope("the payload is no manifest");
    if (!json.contains("payload") || !json["payload"].is_string())
        return bad_envelope("'payload' is missing");
    const auto bytes = base64_decode(json["payload"].get_ref<const std::string&>());
    if (!bytes) return bad_envelope("'payload' is not base64");
    std::string payload(bytes->begin(), bytes->end());
    if (!trusted.empty()) {
        if (Status s = check_signatures(json, payload, trusted); !s.ok()) return s;
    }
    return payload;
}

}  // namespace kvcast::streamer
