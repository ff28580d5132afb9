// Any safetensors file is either refused or encoded into a chunk that decodes; lossless chunks give the input
// back.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <span>
#include <vector>

#include "codec/decoder.h"
#include "tools/common/kv_file.h"

namespace {

using namespace kvcast;
using namespace kvcast::tools;

void require(bool condition) {
    if (!condition) std::abort();
}

void round_trip(const KvInput& kv, const EncodeOptions& options) {
    const std::size_t tokens = std::min<std::size_t>(kv.token_ids().size(), 64);
    const auto rows = kv.rows(0);
    const ChunkInput input = {&kv.layout(),       kv.model(), "",  std::span(kv.token_ids()).first(tokens), 0,
                              kv.base_position(), {},         rows};
    ChunkEncoder encoder(options);
    SerialExecutor serial;
    std::vector<std::uint8_t> object;
    Hash chain;
    if (!encoder.encode(input, serial, object, chain).ok()) return;
    const Result<ChunkDecoder> decoder = ChunkDecoder::open(object);
    require(decoder.ok());
    std::vector<std::vector<std::uint8_t>> planes;
    std::vector<PlaneBuffer> buffers;
    for (const PlaneRows& r : rows) {
        planes.emplace_back(r.row_bytes * tokens);
        buffers.push_back({planes.back().data(), r.row_bytes});
    }
    std::vector<DecodeWorkspace> workspaces(1);
    require(decoder.value().decode(buffers, serial, workspaces).ok());
    for (std::size_t i = 0; options.profile == Profile::kLossless && i < rows.size(); ++i) {
        require(std::memcmp(planes[i].data(), rows[i].rows, planes[i].size()) == 0);
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    if (size == 0) return 0;
    EncodeOptions options;
    options.level = data[0] % (kDeltaLevels + 1);
    options.profile = options.level == 0 ? Profile::kLossless : Profile::kDelta;
    options.predictor = data[0] & 8 ? Predictor::kAnchor : Predictor::kMean;
    options.unrotate = (data[0] & 16) == 0;
    options.block_heads = data[0] >> 5;
    try {
        const KvInput kv(
            std::make_unique<SafetensorsReader>(std::as_bytes(std::span(data + 1, size - 1)), "input"));
        if (kv.layout().values_per_token() <= 65536) round_trip(kv, options);
    } catch (const Error&) {
        return 0;
    }
    return 0;
}
