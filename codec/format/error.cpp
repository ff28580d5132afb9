#include "codec/format/error.h"

#include <exception>
#include <new>
#include <system_error>

namespace kvcast {

const char* error_name(ErrorCode code) {
    switch (code) {
        case ErrorCode::kOk:
            return "ok";
        case ErrorCode::kOutOfMemory:
            return "out-of-memory";
        case ErrorCode::kSystem:
            return "system";
        case ErrorCode::kTruncated:
            return "truncated";
        case ErrorCode::kBadMagic:
            return "bad-magic";
        case ErrorCode::kUnsupportedVersion:
            return "unsupported-version";
        case ErrorCode::kUnsupportedProfile:
            return "unsupported-profile";
        case ErrorCode::kHeaderChecksum:
            return "header-checksum";
        case ErrorCode::kBadHeader:
            return "bad-header";
        case ErrorCode::kLimitExceeded:
            return "limit-exceeded";
        case ErrorCode::kBlockChecksum:
            return "block-checksum";
        case ErrorCode::kCorruptBlock:
            return "corrupt-block";
        case ErrorCode::kMissingCalibration:
            return "missing-calibration";
        case ErrorCode::kWrongCalibration:
            return "wrong-calibration";
        case ErrorCode::kNotConsecutive:
            return "not-consecutive";
        case ErrorCode::kBrokenChain:
            return "broken-chain";
        case ErrorCode::kBadArgument:
            return "bad-argument";
        case ErrorCode::kBufferTooSmall:
            return "buffer-too-small";
        case ErrorCode::kNetwork:
            return "network";
        case ErrorCode::kTls:
            return "tls";
        case ErrorCode::kHttpStatus:
            return "http-status";
        case ErrorCode::kProtocol:
            return "protocol";
        case ErrorCode::kTimeout:
            return "timeout";
        case ErrorCode::kObjectMismatch:
            return "object-mismatch";
        case ErrorCode::kBadManifest:
            return "bad-manifest";
        case ErrorCode::kUnsigned:
            return "unsigned";
        case ErrorCode::kBadSignature:
            return "bad-signature";
        case ErrorCode::kExpired:
            return "expired";
        case ErrorCode::kForeign:
            return "foreign";
        case ErrorCode::kNotStored:
            return "not-stored";
        case ErrorCode::kCancelled:
            return "cancelled";
        case ErrorCode::kThrown:
            return "thrown";
        case ErrorCode::kNoDevice:
            return "no-device";
        case ErrorCode::kDevice:
            return "device";
    }
    return "unknown";
}

Status status_of_exception() {
    try {
        throw;
    } catch (const std::bad_alloc&) {
        return {ErrorCode::kOutOfMemory, "out of memory"};
    } catch (const std::system_error& e) {
        return {ErrorCode::kSystem, e.what()};
    } catch (const std::exception& e) {
        return {ErrorCode::kThrown, e.what()};
    } catch (...) {
        return {ErrorCode::kThrown, "an exception of a type of its own"};
    }
}

}  // namespace kvcast
