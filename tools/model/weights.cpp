#include "tools/model/weights.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstring>
#include <filesystem>

#include "tools/model/json.h"

namespace kvcast::model {
namespace {

using tools::Error;
using tools::SafetensorsReader;
using tools::TensorType;
using tools::TensorView;

constexpr const char* kSingle = "/model.safetensors";
constexpr const char* kIndex = "/model.safetensors.index.json";

at::ScalarType scalar_type(const TensorView& tensor, const std::string& file) {
    switch (tensor.type) {
        case TensorType::kBf16:
            return at::kBFloat16;
        case TensorType::kF16:
            return at::kHalf;
        case TensorType::kF32:
            return at::kFloat;
        default:
            throw Error(fmt::format("{}: tensor '{}' is {}, expected BF16, F16 or F32", file, tensor.name,
                                    tensor.type_name));
    }
}

// The file may lie unaligned in memory, hence the copy before the conversion.
at::Tensor copied(const TensorView& tensor, at::ScalarType type, const std::vector<std::int64_t>& shape) {
    at::Tensor out = at::empty(shape, at::TensorOptions(type));
    std::memcpy(out.data_ptr(), tensor.data.data(), tensor.data.size());
    return out;
}

}  // namespace

WeightFiles::WeightFiles(const std::string& folder) : source_(folder + kSingle) {
    if (std::filesystem::exists(folder + kIndex) && !std::filesystem::exists(source_)) {
        open_shards(folder, folder + kIndex);
        return;
    }
    files_[source_] = std::make_unique<SafetensorsReader>(source_);
}

void WeightFiles::open_shards(const std::string& folder, const std::string& index) {
    source_ = index;
    const nlohmann::json parsed = parse_json_file(index);
    const JsonObject root(parsed, index);
    const nlohmann::json* map = root.find("weight_map");
    if (map == nullptr || !map->is_object()) root.fail("weight_map", "an object of file names");
    for (const auto& [tensor, file] : map->items()) {
        const std::string name = file.is_string() ? file.get<std::string>() : "";
        // A name with a folder in it could lead out of the model's own.
        if (name.empty() || name.find('/') != std::string::npos) {
            throw Error(fmt::format("{}: tensor '{}' is in {}, expected the name of a file beside it", index,
                                    tensor, file.dump()));
        }
        auto& reader = files_[name];
        if (!reader) reader = std::make_unique<SafetensorsReader>(fmt::format("{}/{}", folder, name));
        file_of_[tensor] = reader.get();
    }
}

const TensorView& WeightFiles::find(const std::string& name) const {
    if (file_of_.empty() && files_.count(source_) == 1) return files_.at(source_)->at(name);
    const auto found = file_of_.find(name);
    if (found == file_of_.end()) throw Error(fmt::format("{}: tensor '{}' is not listed", source_, name));
    return found->second->at(name);
}

at::Tensor WeightFiles::load(const std::string& name, const std::vector<std::int64_t>& shape,
                             const at::TensorOptions& options) const {
    const TensorView& tensor = find(name);
    const bool same = std::equal(shape.begin(), shape.end(), tensor.shape.begin(), tensor.shape.end(),
                                 [](auto a, auto b) { return static_cast<std::size_t>(a) == b; });
    if (!same) {
        throw Error(fmt::format("{}: tensor '{}' has shape [{}], expected [{}] by config.json", source_, name,
                                fmt::join(tensor.shape, ", "), fmt::join(shape, ", ")));
    }
    return copied(tensor, scalar_type(tensor, source_), shape).to(options);
}

}  // namespace kvcast::model
