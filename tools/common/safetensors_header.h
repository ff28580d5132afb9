// The JSON header of a safetensors file as it is spelled: its grammar is checked here, what the fields mean
// is not.
#pragma once

#include <cstddef>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace kvcast::tools {

constexpr std::size_t kMaxDimensions = 64;
constexpr std::string_view kMetadataKey = "__metadata__";

// A field that the file leaves out is empty.
struct TensorEntry {
    std::string name;
    std::optional<std::string> type;
    std::optional<std::vector<std::size_t>> shape;
    std::optional<std::vector<std::size_t>> offsets;
};

struct SafetensorsHeader {
    std::vector<TensorEntry> tensors;
    std::map<std::string, std::string> metadata;
};

// Names may repeat among the tensors; metadata and fields do not. Throws DamagedInput, its message beginning
// with `file`.
SafetensorsHeader parse_safetensors_header(std::string_view json, const std::string& file);

// A file's own text, made safe for a terminal: quoted, cut short, control bytes spelled out.
std::string in_quotes(std::string_view text);

}  // namespace kvcast::tools
