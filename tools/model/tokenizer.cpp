#include "tools/model/tokenizer.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <charconv>
#include <filesystem>

#include "tools/common/file.h"

extern char** environ;

namespace kvcast::model {
namespace {

using tools::Error;

constexpr const char* kScript =
    "import sys\n"
    "from tokenizers import Tokenizer\n"
    "text = open(sys.argv[2], encoding='utf-8').read()\n"
    "ids = Tokenizer.from_file(sys.argv[1]).encode(text, add_special_tokens=False).ids\n"
    "print(*ids, 'end')\n";

// Standard output of python3 running the script; what it says on standard error is dropped.
std::string run_script(const std::string& tokenizer, const std::string& path) {
    int ends[2];
    if (::pipe2(ends, O_CLOEXEC) != 0) throw Error("cannot open a pipe");
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
    posix_spawn_file_actions_addopen(&actions, STDERR_FILENO, "/dev/null", O_WRONLY, 0);
    std::array<std::string, 5> words = {"python3", "-c", kScript, tokenizer, path};
    std::array<char*, 6> argv = {};
    for (std::size_t i = 0; i < words.size(); ++i) argv[i] = words[i].data();
    pid_t child = -1;
    const int failed = ::posix_spawnp(&child, "python3", &actions, nullptr, argv.data(), environ);
    posix_spawn_file_actions_destroy(&actions);
    ::close(ends[1]);
    std::string out;
    std::array<char, 4096> buffer;
    for (ssize_t n = 0; failed == 0 && (n = ::read(ends[0], buffer.data(), buffer.size())) > 0;)
        out.append(buffer.data(), static_cast<std::size_t>(n));
    ::close(ends[0]);
    int status = 0;
    if (failed == 0) ::waitpid(child, &status, 0);
    return out;
}

}  // namespace

TokenIds tokenize_file(const std::string& folder, const std::string& path) {
    const std::string tokenizer = folder + "/tokenizer.json";
    if (!std::filesystem::exists(tokenizer))
        throw Error(fmt::format("{}: not there, so text cannot be tokenised; give token ids", tokenizer));
    { const tools::MappedFile readable(path); }
    const std::string out = run_script(tokenizer, path);
    TokenIds ids;
    const char* at = out.data();
    const char* const stop = at + out.size();
    for (std::int32_t id = 0;;) {
        const auto [next, error] = std::from_chars(at, stop, id);
        if (error != std::errc()) break;
        ids.push_back(id);
        at = next + 1;
    }
    // Anything but a whole list means that the tokenizer did not get to its end.
    if (std::string_view(at, static_cast<std::size_t>(stop - at)) != "end\n") {
        throw Error(
            fmt::format("{}: no tokenizer is at hand: python3 with the package `tokenizers` (pip install "
                        "tokenizers) reads UTF-8 text; or give token ids",
                        path));
    }
    if (ids.empty()) throw Error(fmt::format("{}: no tokens in it", path));
    return ids;
}

}  // namespace kvcast::model
