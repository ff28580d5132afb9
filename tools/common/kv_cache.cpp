#include "tools/common/kv_cache.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>

namespace kvcast::tools {
namespace {

std::uint32_t load_element(Dtype dtype, const std::byte* at) {
    std::uint32_t bits = 0;
    std::memcpy(&bits, at, kernels::dtype_bytes(dtype));
    return bits;
}

}  // namespace

std::size_t KvCache::row_bytes(std::size_t plane) const {
    return layout.row_bytes(plane);
}

std::vector<PlaneRows> KvCache::rows(std::size_t token) const {
    std::vector<PlaneRows> out;
    for (std::size_t l = 0; l < layout.layers; ++l) {
        for (std::size_t p = 0; p < planes.size(); ++p)
            out.push_back({planes[p].data() + (l * tokens() + token) * row_bytes(p), row_bytes(p)});
    }
    return out;
}

std::vector<PlaneBuffer> KvCache::buffers(std::size_t token) {
    std::vector<PlaneBuffer> out;
    for (std::size_t l = 0; l < layout.layers; ++l) {
        for (std::size_t p = 0; p < planes.size(); ++p)
            out.push_back({planes[p].data() + (l * tokens() + token) * row_bytes(p), row_bytes(p)});
    }
    return out;
}

KvCache blank_copy(const KvCache& cache) {
    KvCache out = {cache.layout, cache.model, cache.base_position, cache.token_ids, {}};
    for (std::size_t p = 0; p < cache.planes.size(); ++p)
        out.planes.emplace_back(cache.layout.layers * cache.tokens() * cache.row_bytes(p));
    return out;
}

KvCache first_tokens(const KvCache& cache, std::size_t tokens) {
    KvCache out = {cache.layout, cache.model, cache.base_position, {}, {}};
    out.token_ids.assign(cache.token_ids.begin(),
                         cache.token_ids.begin() + static_cast<std::ptrdiff_t>(tokens));
    for (std::size_t p = 0; p < cache.planes.size(); ++p) {
        const std::size_t row = cache.row_bytes(p);
        std::vector<std::byte>& plane = out.planes.emplace_back(cache.layout.layers * tokens * row);
        for (std::size_t l = 0; l < cache.layout.layers; ++l) {
            std::memcpy(plane.data() + l * tokens * row, cache.planes[p].data() + l * cache.tokens() * row,
                        tokens * row);
        }
    }
    return out;
}

KvCache load_kv(const KvInput& input) {
    KvCache out = {input.layout(), input.model(), input.base_position(), input.token_ids(), {}};
    const std::vector<PlaneRows> rows = input.rows(0);
    const std::size_t planes = out.layout.planes.size();
    for (std::size_t p = 0; p < planes; ++p) {
        const std::size_t bytes = out.tokens() * out.row_bytes(p);
        std::vector<std::byte>& plane = out.planes.emplace_back(out.layout.layers * bytes);
        for (std::size_t l = 0; l < out.layout.layers; ++l)
            std::memcpy(plane.data() + l * bytes, rows[l * planes + p].rows, bytes);
    }
    return out;
}

void save_kv(OutputFile file, const KvCache& cache) {
    const std::vector<std::string> names = plane_names(cache.layout);
    std::vector<TensorSpec> specs = {{"token_ids", TensorType::kI32, {cache.tokens()}}};
    for (std::size_t p = 0; p < names.size(); ++p) {
        const PlaneShape& s = cache.layout.planes[p];
        specs.push_back({names[p],
                         tensor_type(cache.layout.dtype),
                         {cache.layout.layers, cache.tokens(), s.heads, s.head_dim}});
    }
    SafetensorsWriter writer(std::move(file), std::move(specs),
                             kv_metadata(cache.layout, cache.model, cache.base_position));
    writer.write(0, 0, std::as_bytes(std::span(cache.token_ids)));
    for (std::size_t p = 0; p < cache.planes.size(); ++p) writer.write(p + 1, 0, cache.planes[p]);
    writer.commit();
}

void save_kv(const std::string& path, const KvCache& cache) {
    save_kv(OutputFile(path), cache);
}

void require_finite(const KvCache& cache, const std::string& name) {
    const std::vector<std::string> planes = plane_names(cache.layout);
    for (std::size_t p = 0; p < planes.size(); ++p) {
        const std::vector<float> values = plane_floats(cache, p);
        const auto found = std::ranges::find_if(values, [](float v) { return !std::isfinite(v); });
        if (found == values.end()) continue;
        throw Error(fmt::format("{}: tensor '{}' holds {}, expected finite values", name, planes[p], *found));
    }
}

std::vector<float> plane_floats(const KvCache& cache, std::size_t plane) {
    const std::size_t size = kernels::dtype_bytes(cache.layout.dtype);
    const std::vector<std::byte>& bytes = cache.planes[plane];
    std::vector<float> out(bytes.size() / size);
    for (std::size_t i = 0; i < out.size(); ++i) {
        out[i] = static_cast<float>(kernels::from_bits(
            cache.layout.dtype, load_element(cache.layout.dtype, bytes.data() + i * size)));
    }
    return out;
}

void set_plane(KvCache& cache, std::size_t plane, const std::vector<float>& values) {
    const std::size_t size = kernels::dtype_bytes(cache.layout.dtype);
    for (std::size_t i = 0; i < values.size(); ++i) {
        const std::uint32_t bits = kernels::to_bits(cache.layout.dtype, values[i]);
        std::memcpy(cache.planes[plane].data() + i * size, &bits, size);
    }
}

RoundTrip round_trip(const KvCache& cache, const EncodeOptions& options, std::size_t chunk_tokens,
                     Executor& executor) {
    RoundTrip out = {blank_copy(cache), 0};
    ChunkEncoder encoder(options);
    std::vector<DecodeWorkspace> workspaces(executor.workers());
    std::vector<std::uint8_t> object;
    Hash chain = {};
    for (std::size_t first = 0; first < cache.tokens(); first += chunk_tokens) {
        const std::size_t count = std::min(chunk_tokens, cache.tokens() - first);
        const std::vector<PlaneRows> rows = cache.rows(first);
        const ChunkInput input = {
            &cache.layout, cache.model,         "",    std::span(cache.token_ids).subspan(first, count),
            first,         cache.base_position, chain, rows};
        if (Status s = encoder.encode(input, executor, object, chain); !s.ok()) throw Error(s.message());
        auto decoder = ChunkDecoder::open(object, {.calibration = options.calibration});
        if (!decoder.ok()) throw Error(decoder.status().message());
        const Status s = decoder.value().decode(out.decoded.buffers(first), executor, workspaces);
        if (!s.ok()) throw Error(s.message());
        out.bytes += object.size();
    }
    return out;
}

}  // namespace kvcast::tools
