// Files as command-line tools use them: mapped input, output that appears whole or not at all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace kvcast::tools {

// A failure to be shown to the user as one sentence; `what()` names the file.
class Error : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

// A failure that was found in the bytes of an input file, which is damaged, or not what it should be.
class DamagedInput : public Error {
  public:
    using Error::Error;
};

// Read-only mapping of a whole file. "-" (standard input), pipes and devices are copied to their end into a
// nameless file in $TMPDIR (/tmp) first, so that memory does not grow with them. Throws Error. Move-only. A
// mapped file must not shrink while it is read.
class MappedFile {
  public:
    explicit MappedFile(const std::string& path);
    ~MappedFile();
    MappedFile(MappedFile&& other) noexcept;
    MappedFile& operator=(MappedFile&& other) noexcept;
    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;

    std::span<const std::byte> bytes() const { return bytes_; }
    // The same, as the codec takes them.
    std::span<const std::uint8_t> octets() const {
        return {reinterpret_cast<const std::uint8_t*>(bytes_.data()), bytes_.size()};
    }

    // Tells the kernel that a range will not be read again, so that resident memory stays bounded on long
    // inputs.
    void drop(std::size_t offset, std::size_t length) const;

  private:
    void map(int fd, std::size_t size, const std::string& name);

    std::span<const std::byte> bytes_;
    void* mapping_ = nullptr;
};

// Output in a file without a name, which commit() puts in the target's place: whatever ends the program
// before leaves no trace, and whatever was under the final name untouched. File systems that have no such
// files get one under a temporary name beside the target, which the destructor removes. "-" writes to
// standard output: append() only. Devices and pipes (/dev/null, a FIFO) are written in place. A symbolic link
// keeps pointing where it did; the file behind it is replaced. Every method throws Error (full disk, no
// permission). Move-only; concurrent write_at() calls to disjoint ranges are safe.
class OutputFile {
  public:
    explicit OutputFile(const std::string& path);
    ~OutputFile();
    OutputFile(OutputFile&& other) noexcept;
    OutputFile& operator=(OutputFile&&) = delete;
    OutputFile(const OutputFile&) = delete;
    OutputFile& operator=(const OutputFile&) = delete;

    void append(std::span<const std::byte> bytes);
    void write_at(std::uint64_t offset, std::span<const std::byte> bytes);
    // Reserves `bytes` on disk, so that a full disk is found before the work is done. The file becomes at
    // least that long, with zeros where nothing is written. Does nothing for standard output and files
    // written in place.
    void reserve(std::uint64_t bytes);
    // Once, after the last write. Where it throws, the file under the final name is untouched. The bytes are
    // on the disk before the name is, so that no crash leaves half a file under it; a cache, whose files are
    // checked as they are read, need not wait for that.
    void commit(bool durable = true);
    // The path as given, or "standard output": a name for messages.
    const std::string& path() const { return path_; }

  private:
    bool in_place() const { return target_.empty(); }

    std::string path_;
    std::string target_;  // path_ without symbolic links: what commit() replaces; empty where there is none
    std::string temporary_;  // empty where the file has no name, or is written in place
    bool standard_output_ = false;
    int fd_ = -1;
};

// Throws Error where writing `output` would replace one of `others`, under whatever names: files that are
// read, or that are written too. Empty names and "-" are no files; devices and pipes are not replaced.
void refuse_same_file(const std::string& output, const std::vector<std::string>& others);

// A whole file, as OutputFile writes it.
void write_text(const std::string& path, std::string_view text);

}  // namespace kvcast::tools
