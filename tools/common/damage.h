// Failures of the codec as exceptions of the tools. Apart from cli.h, whose CLI11 takes a compiler long.
#pragma once

#include <cstdint>
#include <string>

#include "codec/format/error.h"
#include "tools/common/file.h"

namespace kvcast::tools {

// Whether a code blames the bytes that were read, rather than an argument, the network or the device.
bool is_damage(ErrorCode code);

// Throws DamagedInput where is_damage(), else Error.
[[noreturn]] void raise(const std::string& message, ErrorCode code);
[[noreturn]] void raise(const std::string& file, std::uint64_t offset, const Status& status);

}  // namespace kvcast::tools
