// What every command-line tool does the same way: exit codes, one sentence on failure, version.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <functional>
#include <string>

#include "codec/format/error.h"

namespace kvcast::tools {

enum ExitCode : int { kExitOk = 0, kExitFailure = 1, kExitUsage = 2, kExitDamaged = 3 };

inline constexpr const char* kExitCodes =
    "Exit codes: 0 success, 1 failure (files, arguments that do not fit), 2 usage, 3 damaged or foreign "
    "input.";

// A failure that was found in the bytes of an input file; exits with kExitDamaged.
class DamagedInput : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

// Parses the arguments and runs the tool; every exception becomes one sentence on stderr and an exit code.
int run_tool(CLI::App& app, int argc, char** argv, const std::function<void()>& body);

// Throws DamagedInput, or Error where the caller's argument or the device is at fault.
[[noreturn]] void raise(const std::string& file, std::uint64_t offset, const Status& status);

// The option --device: where to encode or decode.
void declare_device(CLI::App& app, std::string& device);

// "A-B" or "A", inclusive, as [first, end).
struct Range {
    std::size_t first = 0;
    std::size_t end = 0;
};
Range parse_range(const std::string& text, std::size_t size, const std::string& what);

}  // namespace kvcast::tools
