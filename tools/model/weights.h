// The tensors of a Hugging Face directory, in one file or in shards.
#pragma once

#include <ATen/ATen.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "tools/common/safetensors.h"

namespace kvcast::model {

class WeightFiles {
  public:
    // Opens model.safetensors, or every shard that model.safetensors.index.json lists. Throws tools::Error.
    explicit WeightFiles(const std::string& folder);

    // A copy of a tensor in the given type and place. Throws tools::Error where it is missing, has another
    // shape or is not of a floating-point type.
    at::Tensor load(const std::string& name, const std::vector<std::int64_t>& shape,
                    const at::TensorOptions& options) const;

  private:
    void open_shards(const std::string& folder, const std::string& index);
    const tools::TensorView& find(const std::string& name) const;

    std::string source_;  // the file that should list every tensor
    std::map<std::string, std::unique_ptr<tools::SafetensorsReader>> files_;
    std::map<std::string, const tools::SafetensorsReader*> file_of_;  // by tensor name, in shards only
};

}  // namespace kvcast::model
