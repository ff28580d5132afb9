#include "tools/common/file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <random>
#include <system_error>
#include <utility>

namespace kvcast::tools {
namespace {

constexpr std::size_t kReadStep = std::size_t{1} << 20;
constexpr int kNameAttempts = 64;
// The kernel's file offsets are signed.
constexpr std::uint64_t kMaxOffset = std::numeric_limits<off_t>::max();

[[noreturn]] void fail(const char* action, const std::string& name, int error) {
    const std::string reason = std::generic_category().message(error);
    throw Error(fmt::format("cannot {} {}: {}", action, name.empty() ? "''" : name, reason));
}

template <typename Call>
auto retry_interrupted(Call call) {
    auto result = call();
    while (result == -1 && errno == EINTR) result = call();
    return result;
}

class Descriptor {
  public:
    Descriptor(int fd, bool owned) : fd_(fd), owned_(owned && fd >= 0) {}
    ~Descriptor() {
        if (owned_) ::close(fd_);
    }
    Descriptor(const Descriptor&) = delete;
    Descriptor& operator=(const Descriptor&) = delete;

    int get() const { return fd_; }

  private:
    int fd_;
    bool owned_;
};

int open_existing(const std::string& path, int access) {
    const int fd = retry_interrupted([&] { return ::open(path.c_str(), access | O_CLOEXEC | O_NOCTTY); });
    if (fd < 0) fail("open", path, errno);
    return fd;
}

struct stat status_of(int fd, const std::string& name) {
    struct stat status = {};
    if (::fstat(fd, &status) != 0) fail("open", name, errno);
    if (S_ISDIR(status.st_mode)) fail("open", name, EISDIR);
    return status;
}

// write(2) and pwrite(2) may take less than they are given; `call` writes the rest from where they stopped.
template <typename Call>
void write_all(const std::string& name, std::span<const std::byte> bytes, Call call) {
    while (!bytes.empty()) {
        const ssize_t wrote = retry_interrupted([&] { return call(bytes); });
        if (wrote < 0) fail("write", name, errno);
        if (wrote == 0) fail("write", name, EIO);
        bytes = bytes.subspan(static_cast<std::size_t>(wrote));
    }
}

// A file without a name, in $TMPDIR: it is gone when its last descriptor or mapping is.
int create_nameless() {
    const char* const given = std::getenv("TMPDIR");
    std::string path = fmt::format("{}/kvcast-XXXXXX", given != nullptr && *given != 0 ? given : "/tmp");
    const int fd = ::mkostemp(path.data(), O_CLOEXEC);
    if (fd < 0) fail("create", path, errno);
    ::unlink(path.c_str());
    return fd;
}

// Copies what cannot be mapped to where it can be, so that memory does not grow with it. Returns the bytes
// copied.
std::size_t spool(int from, const std::string& name, int to) {
    std::vector<std::byte> step(kReadStep);
    std::size_t total = 0;
    for (;;) {
        const ssize_t got = retry_interrupted([&] { return ::read(from, step.data(), step.size()); });
        if (got < 0) fail("read", name, errno);
        if (got == 0) return total;
        const auto part = std::span(step).first(static_cast<std::size_t>(got));
        write_all("a temporary copy of " + name, part,
                  [to](std::span<const std::byte> rest) { return ::write(to, rest.data(), rest.size()); });
        total += part.size();
    }
}

// The file behind a symbolic link, so that replacing it leaves the link in place.
std::string resolved(const std::string& path) {
    const std::unique_ptr<char, decltype(&std::free)> real(::realpath(path.c_str(), nullptr), &std::free);
    return real ? std::string(real.get()) : path;
}

// The name does not grow with the target's, which may already be as long as the file system allows.
std::string temporary_beside(const std::string& target) {
    std::random_device random;
    const std::size_t slash = target.rfind('/');
    const std::string directory = slash == std::string::npos ? "" : target.substr(0, slash + 1);
    return fmt::format("{}.kvcast-{:08x}{:08x}.tmp", directory, random(), random());
}

// mkostemp() would create the file for its owner alone; open() applies the umask and any default ACL.
int create_temporary(const std::string& path, const std::string& target, std::string& temporary) {
    for (int attempt = 0; attempt < kNameAttempts; ++attempt) {
        temporary = temporary_beside(target);
        const int fd = retry_interrupted(
            [&] { return ::open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666); });
        if (fd >= 0) return fd;
        if (errno != EEXIST) break;
    }
    fail("create", path, errno);
}

std::string by_descriptor(int fd) {
    return fmt::format("/proc/self/fd/{}", fd);
}

std::string folder_of(const std::string& path) {
    const std::size_t slash = path.rfind('/');
    return slash == std::string::npos ? "." : path.substr(0, slash + 1);
}

// A file in the target's folder that has no name yet, or -1 where it could not be given one later.
int create_unnamed(const std::string& target) {
    const std::string folder = folder_of(target);
    const int fd =
        retry_interrupted([&] { return ::open(folder.c_str(), O_TMPFILE | O_WRONLY | O_CLOEXEC, 0666); });
    if (fd < 0 || ::access(by_descriptor(fd).c_str(), F_OK) == 0) return fd;
    ::close(fd);
    return -1;
}

// link() does not replace, rename() does: so the name is a temporary one, for a moment.
std::string give_temporary_name(int fd, const std::string& path, const std::string& target) {
    for (int attempt = 0; attempt < kNameAttempts; ++attempt) {
        std::string name = temporary_beside(target);
        const std::string source = by_descriptor(fd);
        if (::linkat(AT_FDCWD, source.c_str(), AT_FDCWD, name.c_str(), AT_SYMLINK_FOLLOW) == 0) return name;
        if (errno != EEXIST) break;
    }
    fail("create", path, errno);
}

// What a path leads to: a file, or the place of one that is not there yet.
struct Identity {
    dev_t device = 0;
    ino_t node = 0;    // of the file, or of its folder
    std::string name;  // within the folder
    bool operator==(const Identity&) const = default;
};

std::optional<Identity> identity_of(const std::string& path) {
    struct stat status = {};
    if (path.empty() || path == "-") return std::nullopt;
    if (::stat(path.c_str(), &status) == 0) {
        if (!S_ISREG(status.st_mode)) return std::nullopt;
        return Identity{status.st_dev, status.st_ino, ""};
    }
    if (::stat(folder_of(path).c_str(), &status) != 0) return std::nullopt;
    return Identity{status.st_dev, status.st_ino, path.substr(path.rfind('/') + 1)};
}

}  // namespace

MappedFile::MappedFile(const std::string& path) {
    const bool standard = path == "-";
    const std::string name = standard ? "standard input" : path;
    const Descriptor file(standard ? STDIN_FILENO : open_existing(path, O_RDONLY), !standard);
    const struct stat status = status_of(file.get(), name);
    // Files under /proc say that they are empty and are not; reading finds out.
    if (!standard && S_ISREG(status.st_mode) && status.st_size != 0) {
        map(file.get(), static_cast<std::size_t>(status.st_size), name);
        return;
    }
    const Descriptor copy(create_nameless(), true);
    map(copy.get(), spool(file.get(), name, copy.get()), name);
}

void MappedFile::map(int fd, std::size_t size, const std::string& name) {
    if (size == 0) return;
    void* const mapping = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (mapping == MAP_FAILED) fail("map", name, errno);
    mapping_ = mapping;
    bytes_ = {static_cast<const std::byte*>(mapping), size};
}

MappedFile::~MappedFile() {
    if (mapping_ != nullptr) ::munmap(mapping_, bytes_.size());
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : bytes_(std::exchange(other.bytes_, {})), mapping_(std::exchange(other.mapping_, nullptr)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
    MappedFile taken(std::move(other));
    std::swap(bytes_, taken.bytes_);
    std::swap(mapping_, taken.mapping_);
    return *this;
}

// Both ends are rounded down: a page shared with the next range stays until that one is dropped. Reading a
// dropped range again is only slower, so the advice may fail.
void MappedFile::drop(std::size_t offset, std::size_t length) const {
    if (mapping_ == nullptr || offset >= bytes_.size()) return;
    const std::size_t page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
    const bool to_end = length >= bytes_.size() - offset;
    const std::size_t begin = offset - offset % page;
    const std::size_t end = to_end ? bytes_.size() : (offset + length) - (offset + length) % page;
    if (begin < end) ::madvise(static_cast<std::byte*>(mapping_) + begin, end - begin, MADV_DONTNEED);
}

OutputFile::OutputFile(const std::string& path)
    : path_(path == "-" ? "standard output" : path), standard_output_(path == "-") {
    if (standard_output_) {
        fd_ = STDOUT_FILENO;
        return;
    }
    struct stat status = {};
    const bool exists = ::stat(path.c_str(), &status) == 0;
    if (!exists && (errno != ENOENT || path.empty())) fail("create", path, errno);
    if (exists && S_ISDIR(status.st_mode)) fail("create", path, EISDIR);
    if (exists && !S_ISREG(status.st_mode)) {
        fd_ = open_existing(path, O_WRONLY);
        return;
    }
    target_ = exists ? resolved(path) : path;
    fd_ = create_unnamed(target_);
    if (fd_ < 0) fd_ = create_temporary(path, target_, temporary_);
}

OutputFile::~OutputFile() {
    if (fd_ >= 0 && !standard_output_) ::close(fd_);
    if (!temporary_.empty()) ::unlink(temporary_.c_str());
}

OutputFile::OutputFile(OutputFile&& other) noexcept
    : path_(std::move(other.path_)),
      target_(std::exchange(other.target_, {})),
      temporary_(std::exchange(other.temporary_, {})),
      standard_output_(other.standard_output_),
      fd_(std::exchange(other.fd_, -1)) {}

void OutputFile::append(std::span<const std::byte> bytes) {
    write_all(path_, bytes, [&](auto rest) { return ::write(fd_, rest.data(), rest.size()); });
}

void OutputFile::write_at(std::uint64_t offset, std::span<const std::byte> bytes) {
    if (standard_output_) fail("write at an offset of", path_, ESPIPE);
    if (offset > kMaxOffset || bytes.size() > kMaxOffset - offset) fail("write", path_, EFBIG);
    off_t position = static_cast<off_t>(offset);
    write_all(path_, bytes, [&](auto rest) {
        const ssize_t wrote = ::pwrite(fd_, rest.data(), rest.size(), position);
        if (wrote > 0) position += wrote;
        return wrote;
    });
}

// fallocate() rather than posix_fallocate(), which writes to every block where the file system has no such
// call.
void OutputFile::reserve(std::uint64_t bytes) {
    if (in_place() || bytes == 0) return;
    if (bytes > kMaxOffset) fail("reserve space for", path_, EFBIG);
    const off_t size = static_cast<off_t>(bytes);
    if (retry_interrupted([&] { return ::fallocate(fd_, 0, 0, size); }) == 0) return;
    if (errno != EOPNOTSUPP && errno != ENOSYS) fail("reserve space for", path_, errno);
    struct stat status = {};
    if (::fstat(fd_, &status) != 0) fail("reserve space for", path_, errno);
    if (status.st_size >= size) return;
    if (retry_interrupted([&] { return ::ftruncate(fd_, size); }) != 0) {
        fail("reserve space for", path_, errno);
    }
}

void OutputFile::commit(bool durable) {
    if (fd_ < 0) fail("commit", path_, EBADF);
    if (durable && !in_place() && retry_interrupted([&] { return ::fdatasync(fd_); }) != 0) {
        fail("write", path_, errno);
    }
    if (!in_place() && temporary_.empty()) temporary_ = give_temporary_name(fd_, path_, target_);
    // A descriptor is closed even where close() reports an error, so it is never closed twice.
    const int fd = std::exchange(fd_, -1);
    if (!standard_output_ && ::close(fd) != 0 && errno != EINTR) fail("write", path_, errno);
    if (in_place()) return;
    if (std::rename(temporary_.c_str(), target_.c_str()) != 0) fail("create", path_, errno);
    temporary_.clear();
}

void refuse_same_file(const std::string& output, const std::vector<std::string>& others) {
    const std::optional<Identity> written = identity_of(output);
    if (!written) return;
    for (const std::string& other : others) {
        if (identity_of(other) == written)
            throw Error(fmt::format("the output {} is the same file as {}", output, other));
    }
}

void write_text(const std::string& path, std::string_view text) {
    OutputFile file(path);
    file.append(std::as_bytes(std::span(text)));
    file.commit();
}

}  // namespace kvcast::tools
