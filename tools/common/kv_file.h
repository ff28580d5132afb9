// KV caches in safetensors files: tensors `k` and `v` [layers, tokens, kv_heads, head_dim] (or a single
// `latent` [layers, tokens, 1, width]), `token_ids` int32 [tokens], and the metadata that says what RoPE
// turned them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "codec/encoder.h"
#include "codec/format/chunk_header.h"
#include "tools/common/safetensors.h"

namespace kvcast::tools {

// A KV cache in a mapped file. Rows are read where they lie; nothing is copied but the token ids.
class KvInput {
  public:
    // Throws DamagedInput naming what is missing or does not fit.
    explicit KvInput(std::unique_ptr<SafetensorsReader> file);

    const Layout& layout() const { return layout_; }
    const std::string& model() const { return model_; }
    std::uint64_t base_position() const { return base_position_; }
    const std::vector<std::int32_t>& token_ids() const { return token_ids_; }

    // Rows of `token` and the tokens after it, [layer][plane].
    std::vector<PlaneRows> rows(std::size_t token) const;

  private:
    void read_planes();
    void read_ids();
    void read_rope();
    const std::string& metadata(const std::string& key) const;

    std::unique_ptr<SafetensorsReader> file_;
    std::vector<const TensorView*> planes_;
    Layout layout_;
    std::string model_;
    std::uint64_t base_position_ = 0;
    std::vector<std::int32_t> token_ids_;
};

// The names of the plane tensors of a layout: k and v, or latent.
std::vector<std::string> plane_names(const Layout& layout);

TensorType tensor_type(Dtype dtype);

// Metadata of a file that holds decoded KV, as KvInput reads it.
std::map<std::string, std::string> kv_metadata(const Layout& layout, const std::string& model,
                                               std::uint64_t base_position);

}  // namespace kvcast::tools
