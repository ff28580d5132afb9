// Any bytes either decode or are refused with a named error. Checksums are repaired first, so that mutations
// reach the parsers and the entropy decoder behind them.
#include "codec/decoder.h"
#include "tests/chunks.h"

namespace {

using namespace kvcast;

constexpr std::uint64_t kMostOutput = std::uint64_t{4} << 20;

void decode(const ChunkDecoder& decoder) {
    const ChunkHeader& h = decoder.header();
    const test::HostPlanes rows(h, decoder.dtype());
    DecodeWorkspace workspace;
    for (std::size_t l = 0; l < h.layout.layers; ++l) {
        (void)decoder.verify_layer(l);
        for (std::size_t b = 0; b < h.blocks_per_layer(); ++b)
            (void)decoder.decode_block(l, b, rows.planes(), workspace);
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    if (size == 0) return 0;
    std::vector<std::uint8_t> bytes(data + 1, data + size);
    test::repair_header(bytes);
    DecodeOptions options;
    if (data[0] & 1) options.dtype = static_cast<Dtype>(data[0] >> 1 & 1);
    if (data[0] & 4) options.base_position = data[0] * 1000u;
    const Result<ChunkDecoder> decoder = ChunkDecoder::open(bytes, options);
    if (decoder.ok() && test::values_of(decoder.value().header()) <= kMostOutput) decode(decoder.value());
    return 0;
}
