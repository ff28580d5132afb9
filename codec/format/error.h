// Errors of the codec: a pinned code, and one sentence that says what was expected and what was found.
//
// Codes are part of the interface: a number, once published, keeps its meaning. Gaps leave room for
// neighbours.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <variant>

namespace kvcast {

enum class ErrorCode : std::uint16_t {
    kOk = 0,
    // The machine.
    kOutOfMemory = 1,
    kSystem = 3,  // no thread, or no file descriptor, to be had
    // The bytes are not a chunk object that this library reads.
    kTruncated = 10,
    kBadMagic = 11,
    kUnsupportedVersion = 12,
    kUnsupportedProfile = 13,
    // The header is damaged or contradicts itself.
    kHeaderChecksum = 20,
    kBadHeader = 21,
    kLimitExceeded = 22,
    // A block is damaged.
    kBlockChecksum = 30,
    kCorruptBlock = 31,
    // The calibration that a chunk names is not at hand.
    kMissingCalibration = 40,
    kWrongCalibration = 41,
    // Chunks of one file that do not belong together.
    kNotConsecutive = 50,
    kBrokenChain = 51,
    // The caller's arguments.
    kBadArgument = 60,
    kBufferTooSmall = 61,
    // Fetching from a store.
    kNetwork = 100,         // no connection, a broken one, or no name: may work another time
    kTls = 101,             // a certificate that is not trusted, expired, or another host's
    kHttpStatus = 102,      // an answer other than the object
    kProtocol = 103,        // HTTP that contradicts itself
    kTimeout = 104,         // silence for longer than was allowed
    kObjectMismatch = 105,  // not the size or the hash that the manifest promises
    // Manifests.
    kBadManifest = 110,
    kUnsigned = 111,
    kBadSignature = 112,
    kExpired = 113,
    kForeign = 114,    // of another model, layout, or other tokens
    kNotStored = 115,  // no part of the context is in the store, or no such object
    kCancelled = 120,
    kThrown = 121,  // a callback, or a codec, threw an exception
    // Devices.
    kNoDevice = 130,  // none in this machine, or none that this build can use
    kDevice = 131,    // it failed, or its memory is used up
};

// The code's name as FORMAT.md and the tools spell it, for example "block-checksum".
const char* error_name(ErrorCode code);

// Success, or a code with its sentence. Cheap to return: success allocates nothing.
class [[nodiscard]] Status {
  public:
    Status() = default;
    Status(ErrorCode code, std::string message) : code_(code), message_(std::move(message)) {}

    bool ok() const { return code_ == ErrorCode::kOk; }
    ErrorCode code() const { return code_; }
    const std::string& message() const { return message_; }

  private:
    ErrorCode code_ = ErrorCode::kOk;
    std::string message_;
};

// Of the exception that is being handled: kOutOfMemory, kSystem, or kThrown with what it says.
Status status_of_exception();

// A value, or the status that explains why there is none.
template <typename T>
class [[nodiscard]] Result {
  public:
    Result(T value) : content_(std::move(value)) {}         // NOLINT: a value is a result
    Result(Status status) : content_(std::move(status)) {}  // NOLINT: so is a failure

    bool ok() const { return content_.index() == 0; }
    T& value() { return std::get<0>(content_); }
    const T& value() const { return std::get<0>(content_); }
    Status status() const { return ok() ? Status() : std::get<1>(content_); }

  private:
    std::variant<T, Status> content_;
};

}  // namespace kvcast
