#include "tools/common/damage.h"

#include <fmt/format.h>

#include "tools/common/file.h"

namespace kvcast::tools {

void raise(const std::string& file, std::uint64_t offset, const Status& status) {
    const std::string where = offset == 0 ? file : fmt::format("{}, chunk at byte {}", file, offset);
    const std::string message =
        fmt::format("{}: {} ({})", where, status.message(), error_name(status.code()));
    switch (status.code()) {
        case ErrorCode::kBadArgument:
        case ErrorCode::kNoDevice:
        case ErrorCode::kDevice:
            throw Error(message);
        default:
            throw DamagedInput(message);
    }
}

}  // namespace kvcast::tools
