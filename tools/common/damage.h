// Failures of the codec as exceptions of the tools. Apart from cli.h, whose CLI11 takes a compiler long.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "codec/format/error.h"

namespace kvcast::tools {

// A failure that was found in the bytes of an input file; exits with kExitDamaged.
class DamagedInput : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

// Throws DamagedInput, or Error where the caller's argument or the device is at fault.
[[noreturn]] void raise(const std::string& file, std::uint64_t offset, const Status& status);

}  // namespace kvcast::tools
