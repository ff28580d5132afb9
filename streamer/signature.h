// Signed manifests: a DSSE envelope (Dead Simple Signing Envelope 1.0) with Ed25519 (RFC 8032). STORE.md,
// section 3. What is signed are the payload's bytes, so that no two JSON libraries have to agree.
//
// Keys are PEM: a private one as `openssl genpkey -algorithm ed25519` writes it, a public one as
// `openssl pkey -pubout` does. Thread-safe.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "codec/format/error.h"
#include "codec/format/layout.h"

namespace kvcast::streamer {

// SHA-256 of the 32 bytes of a public key, in hexadecimal: the name of a key, not a proof of anything.
using KeyId = std::string;

class PublicKey {
  public:
    static Result<PublicKey> from_pem(std::string_view pem);
    const KeyId& id() const { return id_; }
    bool verify(std::span<const std::uint8_t> message, std::span<const std::uint8_t> signature) const;

  private:
    friend class PrivateKey;
    std::shared_ptr<void> key_;
    KeyId id_;
};

class PrivateKey {
  public:
    static Result<PrivateKey> from_pem(std::string_view pem);
    const KeyId& id() const { return id_; }
    PublicKey public_key() const;
    std::vector<std::uint8_t> sign(std::span<const std::uint8_t> message) const;

  private:
    std::shared_ptr<void> key_;
    KeyId id_;
};

std::string sign_manifest(const std::string& manifest_json, const PrivateKey& key);

// The manifest inside a document: the document itself, or an envelope's payload. With trusted keys, only an
// envelope with a good signature of one of them is opened: kUnsigned, kBadSignature; kBadManifest where the
// document is neither.
Result<std::string> open_manifest(std::string_view document, std::span<const PublicKey> trusted);

}  // namespace kvcast::streamer
