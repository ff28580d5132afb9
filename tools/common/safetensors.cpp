#include "tools/common/safetensors.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>
#include <utility>

#include "tools/common/safetensors_header.h"

namespace kvcast::tools {
namespace {

constexpr std::size_t kLengthBytes = 8;
constexpr std::size_t kMaxHeaderBytes = 100'000'000;  // as the reference implementation has it
// Leaves room for the header below the largest file offset.
constexpr std::uint64_t kMaxDataBytes = std::uint64_t{1} << 62;
constexpr std::size_t kShownNames = 8;

struct TypeRow {
    TensorType type;
    std::string_view name;
    std::size_t bytes;
};

constexpr std::array<TypeRow, 7> kTypes = {{{TensorType::kBf16, "BF16", 2},
                                            {TensorType::kF16, "F16", 2},
                                            {TensorType::kF32, "F32", 4},
                                            {TensorType::kI32, "I32", 4},
                                            {TensorType::kI64, "I64", 8},
                                            {TensorType::kU8, "U8", 1},
                                            {TensorType::kI8, "I8", 1}}};

const TypeRow* row_of(TensorType type) {
    const auto* row =
        std::find_if(kTypes.begin(), kTypes.end(), [&](const auto& r) { return r.type == type; });
    return row == kTypes.end() ? nullptr : row;
}

TensorType type_of(std::string_view name) {
    const auto* row =
        std::find_if(kTypes.begin(), kTypes.end(), [&](const auto& r) { return r.name == name; });
    return row == kTypes.end() ? TensorType::kOther : row->type;
}

std::string shape_text(const std::vector<std::size_t>& shape) {
    return fmt::format("[{}]", fmt::join(shape, ", "));
}

// Number of elements, or nothing where a product of dimensions overflows. A zero does not excuse the others:
// a caller may multiply them without it.
std::optional<std::size_t> checked_elements(const std::vector<std::size_t>& shape) {
    std::size_t product = 1;
    bool empty = false;
    for (const std::size_t dimension : shape) {
        empty = empty || dimension == 0;
        if (__builtin_mul_overflow(product, std::max<std::size_t>(dimension, 1), &product))
            return std::nullopt;
    }
    return empty ? 0 : product;
}

std::optional<std::size_t> checked_bytes(TensorType type, const std::vector<std::size_t>& shape) {
    const std::optional<std::size_t> elements = checked_elements(shape);
    std::size_t bytes = 0;
    if (!elements || __builtin_mul_overflow(*elements, element_bytes(type), &bytes)) return std::nullopt;
    return bytes;
}

[[noreturn]] void fail(const std::string& file, const std::string& what) {
    throw Error(fmt::format("{}: {}", file, what));
}

[[noreturn]] void fail_tensor(const std::string& file, const std::string& tensor, const std::string& what) {
    fail(file, fmt::format("tensor {} {}", in_quotes(tensor), what));
}

[[noreturn]] void damaged(const std::string& file, const std::string& what) {
    throw DamagedInput(fmt::format("{}: {}", file, what));
}

[[noreturn]] void damaged_tensor(const std::string& file, const std::string& tensor,
                                 const std::string& what) {
    damaged(file, fmt::format("tensor {} {}", in_quotes(tensor), what));
}

std::uint64_t load_u64(std::span<const std::byte> bytes) {
    std::uint64_t value = 0;
    for (std::size_t i = 0; i < kLengthBytes; ++i)
        value |= std::to_integer<std::uint64_t>(bytes[i]) << (8 * i);
    return value;
}

std::string_view header_text(std::span<const std::byte> bytes, const std::string& file) {
    if (bytes.empty()) damaged(file, "is empty, expected a safetensors file");
    if (bytes.size() < kLengthBytes) {
        damaged(file,
                fmt::format("expected an 8-byte header length, found a file of {} bytes", bytes.size()));
    }
    const std::uint64_t length = load_u64(bytes);
    const std::size_t limit = std::min(bytes.size() - kLengthBytes, kMaxHeaderBytes);
    if (length > limit) {
        damaged(file, fmt::format("expected a safetensors header of at most {} bytes, found a length of {}",
                                  limit, length));
    }
    const auto text = bytes.subspan(kLengthBytes, static_cast<std::size_t>(length));
    return {reinterpret_cast<const char*>(text.data()), text.size()};
}

void check_fields(const TensorEntry& tensor, const std::string& file) {
    if (!tensor.type) damaged_tensor(file, tensor.name, "has no dtype");
    if (!tensor.shape) damaged_tensor(file, tensor.name, "has no shape");
    if (!tensor.offsets) damaged_tensor(file, tensor.name, "has no data_offsets");
    if (tensor.offsets->size() != 2) {
        damaged_tensor(file, tensor.name,
                       fmt::format("has {} data_offsets, expected 2", tensor.offsets->size()));
    }
}

void check_size(const TensorView& tensor, const std::string& file) {
    const std::optional<std::size_t> needed = checked_bytes(tensor.type, tensor.shape);
    const std::string shape = shape_text(tensor.shape);
    if (!needed) damaged_tensor(file, tensor.name, fmt::format("has a shape that overflows, {}", shape));
    if (tensor.type == TensorType::kOther || *needed == tensor.data.size()) return;
    damaged_tensor(file, tensor.name,
                   fmt::format("has {} bytes of data, its shape {} of {} needs {}", tensor.data.size(), shape,
                               tensor.type_name, *needed));
}

TensorView checked_view(TensorEntry& entry, std::span<const std::byte> data, const std::string& file) {
    check_fields(entry, file);
    const std::size_t begin = (*entry.offsets)[0];
    const std::size_t end = (*entry.offsets)[1];
    if (begin > end || end > data.size()) {
        damaged_tensor(file, entry.name,
                       fmt::format("lies at bytes {} to {}, expected a range within {} bytes of data", begin,
                                   end, data.size()));
    }
    TensorView view{std::move(entry.name), type_of(*entry.type), std::move(*entry.type),
                    std::move(*entry.shape), data.subspan(begin, end - begin)};
    check_size(view, file);
    return view;
}

void check_overlaps(const std::vector<TensorView>& tensors, const std::string& file) {
    std::vector<const TensorView*> order;
    for (const TensorView& tensor : tensors) {
        if (!tensor.data.empty()) order.push_back(&tensor);
    }
    std::sort(order.begin(), order.end(), [](auto* a, auto* b) { return a->data.data() < b->data.data(); });
    for (std::size_t i = 1; i < order.size(); ++i) {
        const auto& before = order[i - 1]->data;
        if (before.data() + before.size() <= order[i]->data.data()) continue;
        damaged_tensor(file, order[i]->name,
                       fmt::format("overlaps tensor {}", in_quotes(order[i - 1]->name)));
    }
}

// Indices by name. Throws where a name repeats.
template <typename Tensor>
std::vector<std::size_t> sorted_by_name(const std::vector<Tensor>& tensors, const std::string& file) {
    std::vector<std::size_t> order(tensors.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::sort(order.begin(), order.end(), [&](auto a, auto b) { return tensors[a].name < tensors[b].name; });
    const auto same = [&](auto a, auto b) { return tensors[a].name == tensors[b].name; };
    const auto twice = std::adjacent_find(order.begin(), order.end(), same);
    if (twice != order.end()) damaged_tensor(file, tensors[*twice].name, "appears twice");
    return order;
}

void check_spec(const TensorSpec& spec, const std::string& file) {
    if (spec.name == kMetadataKey)
        fail_tensor(file, spec.name, "has a name that the format keeps for metadata");
    if (spec.type == TensorType::kOther) fail_tensor(file, spec.name, "has no known element type");
    if (spec.shape.size() > kMaxDimensions) {
        fail_tensor(
            file, spec.name,
            fmt::format("has {} dimensions, at most {} are written", spec.shape.size(), kMaxDimensions));
    }
    if (!checked_bytes(spec.type, spec.shape)) {
        fail_tensor(file, spec.name, fmt::format("has a shape that overflows, {}", shape_text(spec.shape)));
    }
}

// Of a checked spec.
std::size_t data_bytes(const TensorSpec& spec) {
    return checked_bytes(spec.type, spec.shape).value_or(0);
}

// Where each tensor begins, from the start of the data. Falling element sizes keep every tensor aligned,
// because each one before is a multiple of a larger power of two.
std::vector<std::uint64_t> layout(const std::vector<TensorSpec>& tensors, const std::string& file) {
    for (const TensorSpec& tensor : tensors) check_spec(tensor, file);
    sorted_by_name(tensors, file);
    std::vector<std::size_t> order(tensors.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) {
        return element_bytes(tensors[a].type) > element_bytes(tensors[b].type);
    });
    std::vector<std::uint64_t> begin(tensors.size());
    std::uint64_t end = 0;
    for (const std::size_t i : order) {
        begin[i] = end;
        const std::size_t size = data_bytes(tensors[i]);
        if (size > kMaxDataBytes - end) {
            fail_tensor(file, tensors[i].name, fmt::format("takes the data past {} bytes", kMaxDataBytes));
        }
        end += size;
    }
    return begin;
}

std::string json_string(std::string_view text, const std::string& file) {
    try {
        return nlohmann::json(text).dump();
    } catch (const nlohmann::json::type_error&) {
        fail(file, fmt::format("{} is not valid UTF-8", in_quotes(text)));
    }
}

std::string metadata_json(const std::map<std::string, std::string>& metadata, const std::string& file) {
    std::vector<std::string> pairs;
    pairs.reserve(metadata.size());
    for (const auto& [key, value] : metadata) {
        pairs.push_back(fmt::format("{}:{}", json_string(key, file), json_string(value, file)));
    }
    return fmt::format("\"{}\":{{{}}}", kMetadataKey, fmt::join(pairs, ","));
}

// The length and the header's JSON, padded so that the data begins on a multiple of 8 bytes.
std::string header_bytes(const std::vector<TensorSpec>& tensors, const std::vector<std::uint64_t>& begin,
                         const std::map<std::string, std::string>& metadata, const std::string& file) {
    std::vector<std::string> entries;
    if (!metadata.empty()) entries.push_back(metadata_json(metadata, file));
    for (std::size_t i = 0; i < tensors.size(); ++i) {
        const TensorSpec& tensor = tensors[i];
        entries.push_back(fmt::format(R"({}:{{"dtype":"{}","shape":[{}],"data_offsets":[{},{}]}})",
                                      json_string(tensor.name, file), tensor_type_name(tensor.type),
                                      fmt::join(tensor.shape, ","), begin[i], begin[i] + data_bytes(tensor)));
    }
    std::string json = fmt::format("{{{}}}", fmt::join(entries, ","));
    json.append((8 - json.size() % 8) % 8, ' ');
    if (json.size() > kMaxHeaderBytes) {
        fail(file,
             fmt::format("expected a header of at most {} bytes, found {}", kMaxHeaderBytes, json.size()));
    }
    std::string length(kLengthBytes, '\0');
    for (std::size_t i = 0; i < kLengthBytes; ++i)
        length[i] = static_cast<char>((json.size() >> (8 * i)) & 0xFF);
    return length + json;
}

}  // namespace

std::size_t element_bytes(TensorType type) {
    const TypeRow* const row = row_of(type);
    return row == nullptr ? 0 : row->bytes;
}

std::string_view tensor_type_name(TensorType type) {
    const TypeRow* const row = row_of(type);
    return row == nullptr ? "other" : row->name;
}

SafetensorsReader::SafetensorsReader(const std::string& path)
    : name_(path == "-" ? "standard input" : path), file_(std::make_unique<MappedFile>(path)) {
    parse(file_->bytes());
}

SafetensorsReader::SafetensorsReader(std::span<const std::byte> bytes, std::string name)
    : name_(std::move(name)) {
    parse(bytes);
}

void SafetensorsReader::parse(std::span<const std::byte> bytes) {
    const std::string_view text = header_text(bytes, name_);
    SafetensorsHeader header = parse_safetensors_header(text, name_);
    const std::span<const std::byte> data = bytes.subspan(kLengthBytes + text.size());
    tensors_.reserve(header.tensors.size());
    for (TensorEntry& entry : header.tensors) tensors_.push_back(checked_view(entry, data, name_));
    by_name_ = sorted_by_name(tensors_, name_);
    check_overlaps(tensors_, name_);
    metadata_ = std::move(header.metadata);
}

const TensorView* SafetensorsReader::find(std::string_view name) const {
    const auto found =
        std::lower_bound(by_name_.begin(), by_name_.end(), name,
                         [&](std::size_t i, std::string_view n) { return tensors_[i].name < n; });
    if (found == by_name_.end() || tensors_[*found].name != name) return nullptr;
    return &tensors_[*found];
}

const TensorView& SafetensorsReader::at(std::string_view name) const {
    if (const TensorView* const tensor = find(name)) return *tensor;
    std::vector<std::string> names;
    for (std::size_t i = 0; i < std::min(tensors_.size(), kShownNames); ++i)
        names.push_back(in_quotes(tensors_[i].name));
    if (tensors_.size() > kShownNames) names.push_back(fmt::format("{} more", tensors_.size() - kShownNames));
    if (names.empty()) names.emplace_back("none");
    damaged(name_, fmt::format("expected a tensor {}, found {}", in_quotes(name), fmt::join(names, ", ")));
}

SafetensorsWriter::SafetensorsWriter(const std::string& path, std::vector<TensorSpec> tensors,
                                     const std::map<std::string, std::string>& metadata)
    : SafetensorsWriter(OutputFile(path), std::move(tensors), metadata) {}

SafetensorsWriter::SafetensorsWriter(OutputFile file, std::vector<TensorSpec> tensors,
                                     const std::map<std::string, std::string>& metadata)
    : tensors_(std::move(tensors)), begin_(layout(tensors_, file.path())), file_(std::move(file)) {
    const std::string header = header_bytes(tensors_, begin_, metadata, file_.path());
    std::uint64_t end = header.size();
    for (std::size_t i = 0; i < tensors_.size(); ++i) {
        begin_[i] += header.size();
        end = std::max<std::uint64_t>(end, begin_[i] + data_bytes(tensors_[i]));
    }
    file_.reserve(end);
    file_.write_at(0, std::as_bytes(std::span(header)));
}

void SafetensorsWriter::write(std::size_t index, std::size_t byte_offset, std::span<const std::byte> bytes) {
    if (index >= tensors_.size()) {
        fail(file_.path(), fmt::format("expected one of {} tensors, found index {}", tensors_.size(), index));
    }
    const std::size_t size = data_bytes(tensors_[index]);
    if (byte_offset > size || bytes.size() > size - byte_offset) {
        fail_tensor(
            file_.path(), tensors_[index].name,
            fmt::format("holds {} bytes, {} at offset {} do not fit", size, bytes.size(), byte_offset));
    }
    file_.write_at(begin_[index] + byte_offset, bytes);
}

void SafetensorsWriter::commit() {
    file_.commit();
}

}  // namespace kvcast::tools
