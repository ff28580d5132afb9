// Safetensors files: a mapped reader that trusts nothing and a writer that fills a file in any order.
//
// Format: https://github.com/huggingface/safetensors (8-byte little-endian header length, JSON header, data).
// Both classes report failure by throwing tools::Error (DamagedInput where the file read is at fault), whose
// message names the file, what was expected and what was found. Neither is thread-safe for writing;
// concurrent reads of a reader and concurrent write() calls to disjoint ranges of a writer are safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "tools/common/file.h"

namespace kvcast::tools {

enum class TensorType : std::uint8_t { kBf16, kF16, kF32, kI32, kI64, kU8, kI8, kOther };

// Size of one element; 0 for kOther.
std::size_t element_bytes(TensorType type);

// The name in a safetensors header ("BF16", "F32", ...).
std::string_view tensor_type_name(TensorType type);

// One tensor of a mapped file. `data` is row-major, little-endian, and may be unaligned.
struct TensorView {
    std::string name;
    TensorType type = TensorType::kOther;
    std::string type_name;  // as the file spells it, also where `type` is kOther
    std::vector<std::size_t> shape;
    std::span<const std::byte> data;
};

// A mapped safetensors file. Views stay valid as long as the object lives.
class SafetensorsReader {
  public:
    // Maps and checks the whole header: lengths, types, shapes, non-overlapping offsets inside the file. No
    // product of a tensor's dimensions overflows, whichever of them are multiplied. Throws DamagedInput;
    // Error where the file cannot be read.
    explicit SafetensorsReader(const std::string& path);

    // The same over bytes in memory, which must outlive the reader; `name` is used in messages.
    SafetensorsReader(std::span<const std::byte> bytes, std::string name);

    // The tensor, or nullptr where the file has none of that name.
    const TensorView* find(std::string_view name) const;

    // The tensor; throws DamagedInput naming the tensors that the file does have.
    const TensorView& at(std::string_view name) const;

    // In the order of the header.
    const std::vector<TensorView>& tensors() const { return tensors_; }
    const std::map<std::string, std::string>& metadata() const { return metadata_; }
    const std::string& name() const { return name_; }

  private:
    void parse(std::span<const std::byte> bytes);

    std::string name_;
    std::unique_ptr<MappedFile> file_;
    std::vector<TensorView> tensors_;
    std::vector<std::size_t> by_name_;  // indices into tensors_, sorted by name
    std::map<std::string, std::string> metadata_;
};

struct TensorSpec {
    std::string name;
    TensorType type = TensorType::kF32;
    std::vector<std::size_t> shape;
};

// Writes a safetensors file of known shapes piece by piece, in any order, straight to the output (memory does
// not grow with the file). The header lists the tensors in the order given. Their data lies by falling
// element size, and in the order given within one size: so each is aligned to its element size without the
// holes that the format forbids. What was not written reads as zeros. Nothing appears under the final name
// until commit(); a writer destroyed before leaves no trace.
class SafetensorsWriter {
  public:
    // Reserves the whole file on disk. Throws Error, also for names that repeat and shapes that overflow.
    SafetensorsWriter(const std::string& path, std::vector<TensorSpec> tensors,
                      const std::map<std::string, std::string>& metadata);
    // The same into a file that is open already, and has nothing in it.
    SafetensorsWriter(OutputFile file, std::vector<TensorSpec> tensors,
                      const std::map<std::string, std::string>& metadata);

    // Writes bytes at a byte offset inside tensor `index`. Throws Error where the range leaves the tensor or
    // the disk is full.
    void write(std::size_t index, std::size_t byte_offset, std::span<const std::byte> bytes);

    // Makes the file visible under its name. Throws Error; the previous file is then untouched.
    void commit();

  private:
    std::vector<TensorSpec> tensors_;
    std::vector<std::uint64_t> begin_;  // absolute file offset of each tensor
    OutputFile file_;
};

}  // namespace kvcast::tools
