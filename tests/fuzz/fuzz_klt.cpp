// Any calibration is either refused or harmless, whatever chunk is decoded with it. Input: inputs.h,
// KltInput.
#include "codec/decoder.h"
#include "tests/chunks.h"
#include "tests/fuzz/inputs.h"

namespace {

using namespace kvcast;

constexpr std::uint64_t kMostOutput = std::uint64_t{1} << 20;

void decode(const ChunkDecoder& decoder) {
    const test::HostPlanes rows(decoder.header(), decoder.dtype());
    DecodeWorkspace workspace;
    for (std::size_t l = 0; l < decoder.header().layout.layers; ++l) {
        if (!decoder.decode_layer(l, rows.planes(), workspace).ok()) return;
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    const auto input = fuzz::klt_input({data, size});
    if (!input) return 0;
    const auto decoder = ChunkDecoder::open(input->chunk, {.calibration = input->calibration});
    if (decoder.ok() && test::values_of(decoder.value().header()) <= kMostOutput) decode(decoder.value());
    return 0;
}
