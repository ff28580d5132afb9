#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <memory>
#include <random>

#include "streamer/destination.h"

namespace kvcast::streamer {
namespace {

namespace fs = std::filesystem;

constexpr const char* kLockFile = ".kvcast-lock";
constexpr const char* kTemporarySuffix = ".part";

Status failed(const std::string& path, const char* what) {
    return {ErrorCode::kNetwork, fmt::format("{}: cannot {}: {}", path, what, std::strerror(errno))};
}

class File {
  public:
    File(const std::string& path, int flags) : fd_(::open(path.c_str(), flags | O_CLOEXEC, 0644)) {}
    ~File() {
        if (fd_ >= 0) ::close(fd_);
    }
    File(const File&) = delete;
    File& operator=(const File&) = delete;
    int get() const { return fd_; }

  private:
    int fd_;
};

bool write_all(int fd, std::span<const std::uint8_t> bytes) {
    while (!bytes.empty()) {
        const ssize_t written = ::write(fd, bytes.data(), bytes.size());
        if (written < 0 && errno == EINTR) continue;
        if (written <= 0) return false;
        bytes = bytes.subspan(static_cast<std::size_t>(written));
    }
    return true;
}

bool read_all(int fd, std::vector<std::uint8_t>& bytes) {
    constexpr std::size_t kStep = std::size_t{1} << 16;
    std::size_t size = 0;
    for (;;) {
        bytes.resize(size + kStep);
        const ssize_t got = ::read(fd, bytes.data() + size, kStep);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return false;
        size += static_cast<std::size_t>(got);
        bytes.resize(size);
        if (got == 0) return true;
    }
}

StoredObject stored(const std::string& name, const struct stat& s) {
    return {name, static_cast<std::uint64_t>(s.st_size), static_cast<std::int64_t>(s.st_mtime)};
}

class Folder final : public Destination {
  public:
    explicit Folder(std::string path) : root_(std::move(path)) {}

    const std::string& root() const override { return root_; }

    Result<std::optional<StoredObject>> find(const std::string& name) override {
        struct stat s = {};
        if (::stat(path(name).c_str(), &s) == 0) return std::optional(stored(name, s));
        if (errno == ENOENT || errno == ENOTDIR) return std::optional<StoredObject>();
        return failed(path(name), "look at it");
    }

    Status put(const std::string& name, std::span<const std::uint8_t> bytes) override {
        const std::string target = path(name);
        std::error_code error;
        fs::create_directories(fs::path(target).parent_path(), error);
        // Others may put the same at this moment, from containers whose processes have our id, too.
        std::string temporary;
        std::unique_ptr<const File> file;
        do {
            temporary = fmt::format("{}.{}{}", target, random_number(), kTemporarySuffix);
            file = std::make_unique<const File>(temporary, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW);
        } while (file->get() < 0 && errno == EEXIST);
        if (file->get() < 0) return failed(temporary, "create it");
        if (!write_all(file->get(), bytes) || ::fdatasync(file->get()) != 0) {
            Status status = failed(temporary, "write it");
            ::unlink(temporary.c_str());
            return status;
        }
        file.reset();
        if (::rename(temporary.c_str(), target.c_str()) == 0) return {};
        Status status = failed(target, "rename it");
        ::unlink(temporary.c_str());
        return status;
    }

    Status refresh(const std::string& name, std::span<const std::uint8_t> bytes) override {
        if (::utimensat(AT_FDCWD, path(name).c_str(), nullptr, 0) == 0) return {};
        return put(name, bytes);
    }

    Result<std::vector<std::uint8_t>> get(const std::string& name) override {
        const File file(path(name), O_RDONLY);
        if (file.get() < 0 && (errno == ENOENT || errno == ENOTDIR))
            return Status(ErrorCode::kNotStored, fmt::format("{}: not in the store", path(name)));
        if (file.get() < 0) return failed(path(name), "open it");
        std::vector<std::uint8_t> bytes;
        if (!read_all(file.get(), bytes)) return failed(path(name), "read it");
        return bytes;
    }

    // The folder of a chunk goes with its last object.
    Status remove(const std::string& name) override {
        if (::unlink(path(name).c_str()) != 0 && errno != ENOENT) return failed(path(name), "remove it");
        const fs::path folder = fs::path(path(name)).parent_path();
        if (folder != fs::path(root_)) ::rmdir(folder.c_str());
        return {};
    }

    Result<std::vector<StoredObject>> list() override {
        std::vector<StoredObject> out;
        std::error_code error;
        fs::recursive_directory_iterator it(root_, error);
        for (; !error && it != fs::recursive_directory_iterator(); it.increment(error)) {
            struct stat s = {};
            if (::stat(it->path().c_str(), &s) != 0) {
                if (errno == ENOENT) continue;  // gone since
                return failed(it->path(), "look at it");
            }
            const std::string name = it->path().lexically_relative(root_).generic_string();
            if (S_ISREG(s.st_mode) && name != kLockFile) out.push_back(stored(name, s));
        }
        if (error) return Status(ErrorCode::kNetwork, fmt::format("{}: {}", root_, error.message()));
        return out;
    }

    Result<std::shared_ptr<void>> lock(bool exclusive) override {
        auto file = std::make_shared<File>(path(kLockFile), O_RDWR | O_CREAT);
        if (file->get() < 0) return failed(path(kLockFile), "create it");
        if (::flock(file->get(), exclusive ? LOCK_EX : LOCK_SH) != 0)
            return failed(path(kLockFile), "lock it");
        return std::shared_ptr<void>(std::move(file));
    }

  private:
    std::string path(const std::string& name) const { return root_ + "/" + name; }

    std::uint64_t random_number() { return static_cast<std::uint64_t>(random_()) << 32 | random_(); }

    std::string root_;
    std::random_device random_;
};

}  // namespace

Result<std::unique_ptr<Destination>> folder_destination(const std::string& path) {
    std::error_code error;
    fs::create_directories(path, error);
    if (!fs::is_directory(path))
        return Status(ErrorCode::kBadArgument, fmt::format("{}: not a folder", path));
    return std::unique_ptr<Destination>(std::make_unique<Folder>(path));
}

}  // namespace kvcast::streamer
