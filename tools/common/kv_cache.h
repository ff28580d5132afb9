// A KV cache in memory, and its way through the codec and back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "codec/decoder.h"
#include "codec/encoder.h"
#include "tools/common/kv_file.h"

namespace kvcast::tools {

// planes[p] is dense row-major [layers, tokens, heads, head_dim] of the layout's dtype: K and V, or one
// latent plane. K is as engines store it, after RoPE.
struct KvCache {
    Layout layout;
    std::string model;
    std::uint64_t base_position = 0;
    std::vector<std::int32_t> token_ids;
    std::vector<std::vector<std::byte>> planes;

    std::size_t tokens() const { return token_ids.size(); }
    std::size_t values() const { return tokens() * layout.values_per_token(); }
    std::size_t bytes() const { return values() * kernels::dtype_bytes(layout.dtype); }
    std::size_t row_bytes(std::size_t plane) const;

    // Rows of `token` and the tokens after it, [layer][plane]; they point into this object.
    std::vector<PlaneRows> rows(std::size_t token) const;
    std::vector<PlaneBuffer> buffers(std::size_t token);
};

// The same cache with planes of zeros.
KvCache blank_copy(const KvCache& cache);

// The first `tokens` of them.
KvCache first_tokens(const KvCache& cache, std::size_t tokens);

KvCache load_kv(const KvInput& input);

// Writes a safetensors file as KvInput reads it. Throws Error.
void save_kv(OutputFile file, const KvCache& cache);
void save_kv(const std::string& path, const KvCache& cache);

// Throws Error where a value is infinite or not a number; `name` is the cache's in the message.
void require_finite(const KvCache& cache, const std::string& name);

// Elements of a plane as floats, and floats rounded to nearest even into a plane. Sizes must agree.
std::vector<float> plane_floats(const KvCache& cache, std::size_t plane);
void set_plane(KvCache& cache, std::size_t plane, const std::vector<float>& values);

struct RoundTrip {
    KvCache decoded;
    std::uint64_t bytes = 0;  // of all chunk objects
};

// Encodes in chunks of `chunk_tokens` and decodes again. Throws Error where the encoder refuses.
RoundTrip round_trip(const KvCache& cache, const EncodeOptions& options, std::size_t chunk_tokens,
                     Executor& executor);

}  // namespace kvcast::tools
