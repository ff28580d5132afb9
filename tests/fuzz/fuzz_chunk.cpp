// Any bytes either decode or are refused with a named error. Checksums are repaired first, so that mutations
// reach the parsers and the entropy decoder behind them.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "codec/decoder.h"

namespace {

using namespace kvcast;

constexpr std::uint64_t kMostOutput = std::uint64_t{4} << 20;

void repair_header(std::vector<std::uint8_t>& bytes) {
    const Result<std::size_t> length = header_length(bytes);
    if (!length.ok() || length.value() > bytes.size()) return;
    const std::uint32_t crc = crc32(std::span(bytes).first(length.value() - 4));
    std::memcpy(bytes.data() + length.value() - 4, &crc, sizeof(crc));
}

void decode(const ChunkDecoder& decoder) {
    const ChunkHeader& h = decoder.header();
    std::vector<std::vector<std::uint8_t>> planes;
    std::vector<PlaneBuffer> buffers;
    for (const PlaneShape& p : h.layout.planes) {
        const std::size_t row = p.width() * kernels::dtype_bytes(decoder.dtype());
        planes.emplace_back(row * h.tokens);
        buffers.push_back({planes.back().data(), row});
    }
    DecodeWorkspace workspace;
    for (std::size_t l = 0; l < h.layout.layers; ++l) {
        (void)decoder.verify_layer(l);
        for (std::size_t b = 0; b < h.blocks_per_layer(); ++b)
            (void)decoder.decode_block(l, b, buffers, workspace);
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    if (size == 0) return 0;
    std::vector<std::uint8_t> bytes(data + 1, data + size);
    repair_header(bytes);
    DecodeOptions options;
    if (data[0] & 1) options.dtype = static_cast<Dtype>(data[0] >> 1 & 1);
    if (data[0] & 4) options.base_position = data[0] * 1000u;
    const Result<ChunkDecoder> decoder = ChunkDecoder::open(bytes, options);
    if (!decoder.ok()) return 0;
    const ChunkHeader& h = decoder.value().header();
    if (h.tokens * h.layout.values_per_token() <= kMostOutput) decode(decoder.value());
    return 0;
}
