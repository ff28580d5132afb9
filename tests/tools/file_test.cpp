#include "tools/common/file.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <unistd.h>

#include <csignal>
#include <thread>
#include <utility>

#include "tests/tools/scratch.h"

namespace kvcast::tools {
namespace {

using testing::EndsWith;
using testing::HasSubstr;

// Puts a file in the place of a standard stream for as long as it lives.
class Redirect {
  public:
    Redirect(int stream, const std::string& path, int flags) : stream_(stream), saved_(::dup(stream)) {
        std::fflush(nullptr);
        const int fd = ::open(path.c_str(), flags | O_CLOEXEC, 0600);
        EXPECT_GE(::dup2(fd, stream), 0);
        ::close(fd);
    }
    ~Redirect() {
        std::fflush(nullptr);
        ::dup2(saved_, stream_);
        ::close(saved_);
    }
    Redirect(const Redirect&) = delete;
    Redirect& operator=(const Redirect&) = delete;

  private:
    int stream_;
    int saved_;
};

// Interrupts system calls every millisecond: the handler is installed without SA_RESTART.
class Interruptions {
  public:
    Interruptions() {
        struct sigaction action = {};
        action.sa_handler = [](int) {};
        ::sigaction(SIGALRM, &action, &before_);
        set_interval(1000);
    }
    ~Interruptions() {
        set_interval(0);
        ::sigaction(SIGALRM, &before_, nullptr);
    }
    Interruptions(const Interruptions&) = delete;
    Interruptions& operator=(const Interruptions&) = delete;

  private:
    static void set_interval(suseconds_t microseconds) {
        const struct itimerval timer = {{0, microseconds}, {0, microseconds}};
        ::setitimer(ITIMER_REAL, &timer, nullptr);
    }

    struct sigaction before_ = {};
};

TEST(MappedFile, HoldsTheWholeFile) {
    const ScratchDirectory scratch;
    store(scratch / "in", "some bytes");
    EXPECT_EQ(text_of(MappedFile(scratch / "in").bytes()), "some bytes");
}

TEST(MappedFile, HoldsNothingOfAnEmptyFile) {
    const ScratchDirectory scratch;
    store(scratch / "in", "");
    EXPECT_TRUE(MappedFile(scratch / "in").bytes().empty());
}

TEST(MappedFile, NamesTheFileThatIsMissing) {
    EXPECT_EQ(error_of([] { MappedFile("no/such"); }), "cannot open no/such: No such file or directory");
    EXPECT_EQ(error_of([] { MappedFile(""); }), "cannot open '': No such file or directory");
}

TEST(MappedFile, RefusesADirectory) {
    const ScratchDirectory scratch;
    EXPECT_THAT(error_of([&] { MappedFile{scratch.path()}; }), EndsWith(": Is a directory"));
}

TEST(MappedFile, ReadsFilesThatHideTheirSize) {
    EXPECT_FALSE(MappedFile("/proc/self/stat").bytes().empty());
}

TEST(MappedFile, ReadsStandardInput) {
    const ScratchDirectory scratch;
    store(scratch / "in", "piped");
    const Redirect redirect(STDIN_FILENO, scratch / "in", O_RDONLY);
    EXPECT_EQ(text_of(MappedFile("-").bytes()), "piped");
}

TEST(MappedFile, ReadsLongStandardInput) {
    const ScratchDirectory scratch;
    std::string text(std::size_t{3} << 20, 'x');
    text += "end";
    store(scratch / "in", text);
    const Redirect redirect(STDIN_FILENO, scratch / "in", O_RDONLY);
    EXPECT_EQ(text_of(MappedFile("-").bytes()), text);
}

TEST(MappedFile, ReadsEmptyStandardInput) {
    const Redirect redirect(STDIN_FILENO, "/dev/null", O_RDONLY);
    EXPECT_TRUE(MappedFile("-").bytes().empty());
}

TEST(MappedFile, KeepsItsBytesWhenMoved) {
    const ScratchDirectory scratch;
    store(scratch / "a", "first");
    store(scratch / "b", "second");
    MappedFile a(scratch / "a");
    MappedFile b(std::move(a));
    EXPECT_EQ(text_of(b.bytes()), "first");
    b = MappedFile(scratch / "b");
    EXPECT_EQ(text_of(b.bytes()), "second");
}

TEST(MappedFile, StillReadsARangeThatWasDropped) {
    const ScratchDirectory scratch;
    const std::string text(100'000, 'x');
    store(scratch / "in", text);
    const MappedFile file(scratch / "in");
    file.drop(5000, 50'000);
    file.drop(90'000, SIZE_MAX);
    file.drop(SIZE_MAX, 1);
    EXPECT_EQ(text_of(file.bytes()), text);
}

TEST(OutputFile, AppearsUnderItsNameOnlyWhenCommitted) {
    const ScratchDirectory scratch;
    OutputFile file(scratch / "out");
    file.append(bytes_of("one "));
    file.append(bytes_of("two"));
    EXPECT_FALSE(std::filesystem::exists(scratch / "out"));
    file.commit();
    EXPECT_EQ(contents(scratch / "out"), "one two");
    EXPECT_EQ(scratch.entries(), 1u);
}

TEST(OutputFile, IsNotSeenInItsFolderBeforeItIsCommitted) {
    const ScratchDirectory scratch;
    const int nameless = ::open(scratch.path().c_str(), O_TMPFILE | O_WRONLY, 0600);
    if (nameless < 0) GTEST_SKIP() << "this file system has no files without names";
    ::close(nameless);
    OutputFile file(scratch / "out");
    file.reserve(1000);
    file.append(bytes_of("x"));
    EXPECT_EQ(scratch.entries(), 0u);
    file.commit();
    EXPECT_EQ(scratch.entries(), 1u);
}

TEST(OutputFile, LeavesThePreviousFileUntouchedWhenNotCommitted) {
    const ScratchDirectory scratch;
    store(scratch / "out", "before");
    { OutputFile(scratch / "out").append(bytes_of("after")); }
    EXPECT_EQ(contents(scratch / "out"), "before");
    EXPECT_EQ(scratch.entries(), 1u);
}

TEST(OutputFile, ReplacesThePreviousFileWhenCommitted) {
    const ScratchDirectory scratch;
    store(scratch / "out", "a longer text than after");
    OutputFile file(scratch / "out");
    file.append(bytes_of("after"));
    file.commit();
    EXPECT_EQ(contents(scratch / "out"), "after");
}

TEST(OutputFile, ReplacesTheFileBehindASymbolicLink) {
    const ScratchDirectory scratch;
    std::filesystem::create_directory(scratch / "there");
    store(scratch / "there/real", "before");
    std::filesystem::create_symlink("there/real", scratch / "link");
    OutputFile file(scratch / "link");
    file.append(bytes_of("after"));
    file.commit();
    EXPECT_TRUE(std::filesystem::is_symlink(scratch / "link"));
    EXPECT_EQ(contents(scratch / "there/real"), "after");
}

TEST(OutputFile, LeavesNothingWhereItCannotTakeItsPlace) {
    const ScratchDirectory scratch;
    OutputFile file(scratch / "out");
    std::filesystem::create_directory(scratch / "out");
    EXPECT_THAT(error_of([&] { file.commit(); }), HasSubstr("cannot create "));
    { const OutputFile dropped(std::move(file)); }
    EXPECT_EQ(scratch.entries(), 1u);
}

TEST(OutputFile, FillsAFileInAnyOrder) {
    const ScratchDirectory scratch;
    OutputFile file(scratch / "out");
    file.reserve(8);
    file.write_at(5, bytes_of("f"));
    file.write_at(1, bytes_of("b"));
    file.commit();
    EXPECT_EQ(contents(scratch / "out"), std::string("\0b\0\0\0f\0\0", 8));
}

TEST(OutputFile, IsKeptWholeWhenMoved) {
    const ScratchDirectory scratch;
    OutputFile first(scratch / "out");
    first.append(bytes_of("one "));
    OutputFile second(std::move(first));
    second.append(bytes_of("two"));
    second.commit();
    EXPECT_EQ(contents(scratch / "out"), "one two");
}

TEST(OutputFile, HasTheModeThatTheUmaskAllows) {
    const ScratchDirectory scratch;
    const mode_t before = ::umask(027);
    OutputFile file(scratch / "out");
    ::umask(before);
    file.commit();
    struct stat status = {};
    ASSERT_EQ(::stat((scratch / "out").c_str(), &status), 0);
    EXPECT_EQ(status.st_mode & 0777, 0640u);
}

TEST(OutputFile, TakesANameAsLongAsTheFileSystemAllows) {
    const ScratchDirectory scratch;
    const std::string name(255, 'n');
    OutputFile file(scratch / name);
    file.commit();
    EXPECT_TRUE(std::filesystem::exists(scratch / name));
    EXPECT_THAT(error_of([&] { OutputFile(scratch / (name + "n")); }), EndsWith(": File name too long"));
}

TEST(OutputFile, NamesTheDirectoryThatIsMissing) {
    EXPECT_EQ(error_of([] { OutputFile("no/such"); }), "cannot create no/such: No such file or directory");
    EXPECT_EQ(error_of([] { OutputFile(""); }), "cannot create '': No such file or directory");
}

TEST(OutputFile, RefusesADirectory) {
    const ScratchDirectory scratch;
    EXPECT_THAT(error_of([&] { OutputFile{scratch.path()}; }), EndsWith(": Is a directory"));
}

TEST(OutputFile, CannotBeCommittedTwice) {
    const ScratchDirectory scratch;
    OutputFile file(scratch / "out");
    file.commit();
    EXPECT_THAT(error_of([&] { file.commit(); }), HasSubstr("cannot commit"));
}

TEST(OutputFile, ReportsAFullDisk) {
    OutputFile file("/dev/full");
    const std::string full = "cannot write /dev/full: No space left on device";
    EXPECT_EQ(error_of([&] { file.append(bytes_of("x")); }), full);
    EXPECT_EQ(error_of([&] { file.write_at(0, bytes_of("x")); }), full);
}

TEST(OutputFile, ReportsAtOnceThatADiskCannotHoldTheReservation) {
    const ScratchDirectory scratch;
    OutputFile file(scratch / "out");
    EXPECT_THAT(error_of([&] { file.reserve(std::uint64_t{1} << 62); }),
                HasSubstr("cannot reserve space for "));
    EXPECT_THAT(error_of([&] { file.reserve(UINT64_MAX); }), EndsWith(": File too large"));
}

TEST(OutputFile, RefusesAnOffsetThatOverflows) {
    const ScratchDirectory scratch;
    OutputFile file(scratch / "out");
    EXPECT_THAT(error_of([&] { file.write_at(INT64_MAX, bytes_of("x")); }), EndsWith(": File too large"));
    EXPECT_THAT(error_of([&] { file.write_at(UINT64_MAX, bytes_of("x")); }), EndsWith(": File too large"));
}

TEST(OutputFile, WritesADeviceInPlace) {
    OutputFile file("/dev/null");
    file.reserve(1000);
    file.append(bytes_of("x"));
    file.write_at(500, bytes_of("x"));
    file.commit();
    EXPECT_TRUE(std::filesystem::is_character_file("/dev/null"));
}

TEST(OutputFile, AppendsToStandardOutput) {
    const ScratchDirectory scratch;
    const Redirect redirect(STDOUT_FILENO, scratch / "out", O_WRONLY | O_CREAT);
    OutputFile file("-");
    file.reserve(1000);
    file.append(bytes_of("to "));
    file.append(bytes_of("stdout"));
    file.commit();
    EXPECT_EQ(contents(scratch / "out"), "to stdout");
}

TEST(OutputFile, RefusesOffsetsOnStandardOutput) {
    OutputFile file("-");
    EXPECT_EQ(error_of([&] { file.write_at(0, bytes_of("x")); }),
              "cannot write at an offset of standard output: Illegal seek");
}

TEST(OutputFile, PassesThroughAPipeWholeDespiteShortWritesAndSignals) {
    const ScratchDirectory scratch;
    ASSERT_EQ(::mkfifo((scratch / "pipe").c_str(), 0600), 0);
    std::string text(std::size_t{8} << 20, '\0');
    for (std::size_t i = 0; i < text.size(); ++i) text[i] = static_cast<char>(i * 31 + i / 4096);
    const Interruptions interruptions;
    std::thread writer([&] {
        OutputFile file(scratch / "pipe");
        file.append(bytes_of(text));
        file.commit();
    });
    const MappedFile read(scratch / "pipe");
    writer.join();
    EXPECT_TRUE(text_of(read.bytes()) == text);
}

TEST(RefuseSameFile, NamesBothWhateverTheyAreCalled) {
    const ScratchDirectory scratch;
    store(scratch / "in", "x");
    std::filesystem::create_symlink("in", scratch / "link");
    std::filesystem::create_hard_link(scratch / "in", scratch / "hard");
    for (const char* name : {"in", "./in", "link", "hard"}) {
        const std::string output = scratch / name;
        EXPECT_EQ(error_of([&] {
                      refuse_same_file(output, {"", scratch / "in"});
                  }),
                  "the output " + output + " is the same file as " + (scratch / "in"));
    }
}

TEST(RefuseSameFile, KnowsTwoOutputsThatAreNotThereYet) {
    const ScratchDirectory scratch;
    EXPECT_NE(error_of([&] { refuse_same_file(scratch / "a", {scratch / "./a"}); }), "");
    EXPECT_EQ(error_of([&] { refuse_same_file(scratch / "a", {scratch / "b"}); }), "");
}

TEST(RefuseSameFile, LetsOtherFilesDevicesAndStreamsPass) {
    const ScratchDirectory scratch;
    store(scratch / "in", "x");
    store(scratch / "out", "x");
    refuse_same_file(scratch / "out", {scratch / "in", "no/such", ""});
    refuse_same_file("no/such", {scratch / "in"});
    refuse_same_file("/dev/null", {"/dev/null"});
    refuse_same_file("-", {"-"});
    refuse_same_file("", {""});
}

}  // namespace
}  // namespace kvcast::tools
