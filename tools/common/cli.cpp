#include "tools/common/cli.h"

#include <fmt/format.h>

#include <charconv>
#include <cstdio>
#include <new>

#include "tools/common/file.h"

namespace kvcast::tools {
namespace {

int fail(const CLI::App& app, int code, const std::string& message) {
    fmt::print(stderr, "{}: {}\n", app.get_name(), message);
    return code;
}

}  // namespace

int run_tool(CLI::App& app, int argc, char** argv, const std::function<void()>& body) {
    app.set_version_flag("--version", std::string("kvcast ") + KVCAST_VERSION);
    app.footer(kExitCodes);
    try {
        app.parse(argc, argv);
    } catch (const CLI::ParseError& e) {
        const int code = app.exit(e);
        return code == 0 ? kExitOk : kExitUsage;
    }
    try {
        body();
        return kExitOk;
    } catch (const DamagedInput& e) {
        return fail(app, kExitDamaged, e.what());
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
    if (first > last || last >= size) {
        throw Error(fmt::format("--{} is {}, the file has {} 0-{}", what, text, what, size - 1));
    }
    return {first, last + 1};
}

}  // namespace kvcast::tools
