#include "tools/common/cli.h"

#include <fmt/format.h>

#include <cerrno>
#include <charconv>
#include <cstdio>
#include <new>
#include <system_error>

#include "codec/format/layout.h"
#include "tools/common/file.h"

namespace kvcast::tools {
namespace {

int fail(const CLI::App& app, int code, const std::string& message) {
    fmt::print(stderr, "{}: {}\n", app.get_name(), message);
    return code;
}

// What was printed waits in a buffer, and may not find its way out of it. An earlier failure is remembered,
// its reason is not.
void flush_output() {
    errno = 0;
    if (std::fflush(stdout) == 0 && std::ferror(stdout) == 0) return;
    throw Error(fmt::format("cannot write standard output: {}",
                            errno == 0 ? "not all of it was taken" : std::generic_category().message(errno)));
}

int parse_failed(const CLI::App& app, const CLI::ParseError& e) {
    if (app.exit(e) != 0) return kExitUsage;
    try {
        flush_output();
    } catch (const Error& error) {
        return fail(app, kExitFailure, error.what());
    }
    return kExitOk;
}

}  // namespace

int run_tool(CLI::App& app, int argc, char** argv, const std::function<void()>& body) {
    app.set_version_flag("--version", std::string("kvcast ") + KVCAST_VERSION);
    if (app.get_footer().empty()) app.footer(std::string(kExitCodes) + ".");
    try {
        app.parse(argc, argv);
    } catch (const CLI::ParseError& e) {
        return parse_failed(app, e);
    }
    try {
        body();
        flush_output();
        return kExitOk;
    } catch (const DamagedInput& e) {
        return fail(app, kExitDamaged, e.what());
    } catch (const std::system_error& e) {
        // fmt's, of a buffer that did not get out while it was filled.
        return fail(app, kExitFailure,
                    std::ferror(stdout) != 0
                        ? fmt::format("cannot write standard output: {}", e.code().message())
                        : e.what());
    } catch (const std::bad_alloc&) {
        return fail(app, kExitFailure, "out of memory");
    } catch (const std::exception& e) {
        return fail(app, kExitFailure, e.what());
    }
}

void declare_device(CLI::App& app, std::string& device) {
    app.add_option("--device", device, "cpu, or cuda: the current NVIDIA GPU; the same bytes from both")
        ->check(CLI::IsMember({"cpu", "cuda"}))
        ->capture_default_str();
}

void declare_coding(CLI::App& app, std::string& layer_steps, std::size_t& block_heads,
                    std::size_t& run_layers) {
    app.add_option(
           "--layer-steps", layer_steps,
           "delta: flat, thirds, or a JSON file {\"k\": [...], \"v\": [...]} of step multipliers per layer")
        ->capture_default_str();
    app.add_option("--block-heads", block_heads,
                   "heads per block: 1 lets a GPU decode most side by side; 0 chooses")
        ->check(CLI::Range(std::size_t{0}, 2 * LayoutLimits::kHeads))
        ->capture_default_str();
    app.add_option("--run-layers", run_layers,
                   "klt: layers that share coder states; 1 suits GPUs, and costs 1 %")
        ->check(CLI::Range(std::size_t{1}, std::size_t{4096}))
        ->capture_default_str();
}

const CLI::Validator& positive_number() {
    static const CLI::Validator validator(
        [](const std::string& text) {
            constexpr double kMost = 1e12;
            double value = 0;
            const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
            const bool whole = error == std::errc() && end == text.data() + text.size();
            return whole && value > 0 && value <= kMost ? std::string()
                                                        : fmt::format("'{}' is not a positive number", text);
        },
        "POSITIVE");
    return validator;
}

Range parse_range(const std::string& text, std::size_t size, const std::string& what) {
    if (text.empty()) return {0, size};
    std::size_t first = 0;
    const char* const stop = text.data() + text.size();
    auto [at, error] = std::from_chars(text.data(), stop, first);
    std::size_t last = first;
    if (error == std::errc() && at != stop && *at == '-') {
        const auto second = std::from_chars(at + 1, stop, last);
        at = second.ptr;
        error = second.ec;
    }
    if (error != std::errc() || at != stop)
        throw Error(fmt::format("--{} is '{}', expected A or A-B", what, text));
    if (first > last) throw Error(fmt::format("--{} is {}, which ends before it begins", what, text));
    if (last >= size) {
        throw Error(fmt::format("--{} is {}, the file has {} 0-{}", what, text, what, size - 1));
    }
    return {first, last + 1};
}

}  // namespace kvcast::tools
