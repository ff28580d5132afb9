#include "bench/gpu/source.h"

#include <algorithm>
#include <cmath>
#include <random>

#include "codec/decoder.h"
#include "tools/common/file.h"

namespace kvcast::bench {

using tools::Error;
using tools::KvInput;

Source synthetic(std::string name, std::size_t layers) {
    Source s;
    s.name = std::move(name);
    s.layout.layers = layers;
    s.layout.planes = {{8, 128}, {8, 128}};
    s.layout.rope = {RopePairing::kHalf, 0, 128, geometric_frequencies(500000, 128)};
    s.model = "synthetic";
    s.ids.assign(256, 0);
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    for (std::size_t i = 0; i < s.layout.layers * 2; ++i) {
        auto& plane = s.memory.emplace_back(256 * 1024);
        for (std::size_t c = 0; c < 1024; ++c) {
            const float mean = normal(random), spread = std::exp(normal(random));
            for (std::size_t t = 0; t < 256; ++t)
                plane[t * 1024 + c] = kernels::to_bf16(mean + spread * normal(random));
        }
        s.planes.push_back({plane.data(), 1024 * sizeof(std::uint16_t)});
    }
    return s;
}

Source first_chunk(const KvInput& kv, const std::string& name) {
    const std::size_t tokens = std::min<std::size_t>(kv.token_ids().size(), 256);
    return {name,
            kv.layout(),
            kv.model(),
            {kv.token_ids().begin(), kv.token_ids().begin() + tokens},
            kv.base_position(),
            kv.rows(0),
            {}};
}

std::vector<std::uint8_t> encode(const Source& s, const EncodeOptions& options) {
    ChunkEncoder encoder(options);
    SerialExecutor serial;
    std::vector<std::uint8_t> object;
    Hash chain = {};
    const ChunkInput input = {&s.layout, s.model, "", s.ids, 0, s.base_position, {}, s.planes};
    if (const Status failed = encoder.encode(input, serial, object, chain); !failed.ok())
        throw Error(failed.message());
    return object;
}

std::vector<std::byte> decode_on_cpu(const std::vector<std::uint8_t>& object, Dtype dtype,
                                     const std::shared_ptr<const Calibration>& calibration) {
    auto opened = ChunkDecoder::open(object, {.dtype = dtype, .calibration = calibration});
    if (!opened.ok()) throw Error(opened.status().message());
    const ChunkHeader& h = opened.value().header();
    const std::size_t element = kernels::dtype_bytes(dtype);
    std::vector<std::byte> out(h.tokens * h.layout.values_per_token() * element);
    std::vector<PlaneBuffer> buffers;
    std::size_t at = 0;
    for (std::size_t i = 0; i < h.layout.layers * h.layout.planes.size(); ++i) {
        const std::size_t row_bytes = h.layout.planes[i % h.layout.planes.size()].width() * element;
        buffers.push_back({out.data() + at, row_bytes});
        at += h.tokens * row_bytes;
    }
    SerialExecutor serial;
    std::vector<DecodeWorkspace> workspaces(1);
    if (const Status s = opened.value().decode(buffers, serial, workspaces); !s.ok())
        throw Error(s.message());
    return out;
}

}  // namespace kvcast::bench
