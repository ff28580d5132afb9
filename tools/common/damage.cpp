#include "tools/common/damage.h"

#include <fmt/format.h>

namespace kvcast::tools {

bool is_damage(ErrorCode code) {
    switch (code) {
        case ErrorCode::kOk:
        case ErrorCode::kMissingCalibration:
        case ErrorCode::kWrongCalibration:
        case ErrorCode::kBadArgument:
        case ErrorCode::kBufferTooSmall:
        case ErrorCode::kNetwork:
        case ErrorCode::kTls:
        case ErrorCode::kHttpStatus:
        case ErrorCode::kProtocol:
        case ErrorCode::kTimeout:
        case ErrorCode::kExpired:
        case ErrorCode::kNotStored:
        case ErrorCode::kCancelled:
        case ErrorCode::kNoDevice:
        case ErrorCode::kDevice:
            return false;
        default:
            return true;
    }
}

void raise(const std::string& message, ErrorCode code) {
    if (is_damage(code)) throw DamagedInput(message);
    throw Error(message);
}

void raise(const std::string& file, std::uint64_t offset, const Status& status) {
    const std::string where = offset == 0 ? file : fmt::format("{}, chunk at byte {}", file, offset);
    raise(fmt::format("{}: {} ({})", where, status.message(), error_name(status.code())), status.code());
}

}  // namespace kvcast::tools
