// What every command-line tool does the same way: exit codes, one sentence on failure, version.
#pragma once

#include <CLI/CLI.hpp>
#include <functional>
#include <string>

#include "tools/common/damage.h"

namespace kvcast::tools {

enum ExitCode : int { kExitOk = 0, kExitFailure = 1, kExitUsage = 2, kExitDamaged = 3 };

// A sentence without its end, which tools that have more codes go on with.
inline constexpr const char* kExitCodes =
    "Exit codes: 0 success, 1 failure (files, arguments that do not fit), 2 usage, 3 damaged or foreign "
    "input";

// Parses the arguments and runs the tool; every exception becomes one sentence on stderr and an exit code.
// --help ends with kExitCodes, or with the footer that the app has.
int run_tool(CLI::App& app, int argc, char** argv, const std::function<void()>& body);

// The option --device: where to encode or decode.
void declare_device(CLI::App& app, std::string& device);

// What encoders may be told about: delta's steps (see layer_steps.h), and what decoders can do side by side.
void declare_coding(CLI::App& app, std::string& layer_steps, std::size_t& block_heads,
                    std::size_t& run_layers);

// Of numbers that are measured: finite and above 0.
const CLI::Validator& positive_number();

// "A-B" or "A", inclusive, as [first, end).
struct Range {
    std::size_t first = 0;
    std::size_t end = 0;
};
Range parse_range(const std::string& text, std::size_t size, const std::string& what);

}  // namespace kvcast::tools
