// Encoding one chunk of KV cache into a chunk object (FORMAT.md, section 3).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "codec/delta/levels.h"
#include "codec/entropy/block_writer.h"
#include "codec/executor.h"
#include "codec/format/chunk_header.h"
#include "kernels/ops.h"

namespace kvcast {

// One plane of one layer in the caller's memory: `tokens` rows of `width` elements of the layout's dtype, row
// t at rows + t * row_bytes. Any alignment. Read only during the call.
struct PlaneRows {
    const void* rows = nullptr;
    std::size_t row_bytes = 0;
};

class Calibration;

// Attention sinks that klt stores exactly: the first token, whose statistics are no other's. The others are
// predicted as well as the rest.
inline constexpr std::size_t kKltSinks = 1;

struct EncodeOptions {
    Profile profile = Profile::kDelta;
    unsigned level = 5;  // delta: 1..kDeltaLevels; klt: 1.. the calibration's; lossless: ignored
    Predictor predictor = Predictor::kMean;
    bool unrotate = true;         // delta: code K before RoPE, where the layout has one
    std::size_t sinks = 4;        // lossy: leading tokens of a context that are stored exactly
    LayerSteps layer_steps;       // delta: empty, or one multiplier per layer and plane
    std::size_t block_heads = 0;  // heads per block; 0: as many as keep a block near 64 Ki values
    std::shared_ptr<const Calibration> calibration;  // klt
    unsigned tail_level = 0;     // klt: level of ChunkInput::tail_tokens; 0: like all others
    std::size_t run_layers = 6;  // klt: layers that share the coder's states; fewer are decoded in parallel
};

struct ChunkInput {
    const Layout* layout = nullptr;
    std::string_view model;
    std::string_view salt;  // goes into the identity only
    std::span<const std::int32_t> token_ids;
    std::uint64_t first_token = 0;
    std::uint64_t base_position = 0;
    Hash parent = {};
    std::span<const PlaneRows> planes;  // [layer][plane]
    std::size_t tail_tokens = 0;        // klt: last tokens of the chunk, coded at EncodeOptions::tail_level
};

// Where a chunk's bytes went, and what they should have been.
struct EncodeReport {
    std::uint64_t header_bytes = 0;
    std::uint64_t block_bytes = 0;
    entropy::BlockCost ideal;  // bits
};

// Encodes chunk after chunk, keeping its buffers. One thread at a time; layers run in parallel on the
// executor.
class ChunkEncoder {
  public:
    explicit ChunkEncoder(EncodeOptions options, const kernels::Ops& ops = kernels::best_ops());
    ~ChunkEncoder();
    ChunkEncoder(ChunkEncoder&&) noexcept;
    ChunkEncoder& operator=(ChunkEncoder&&) noexcept;

    // Replaces `object` by the chunk object and `chain` by its identity; after an error, `object` holds
    // nothing of use. The bytes do not depend on the executor or the backend. With a report, ideal code
    // lengths are computed too, which is slow. Errors: kBadArgument, kLimitExceeded, kBadHeader (a layout
    // that contradicts itself).
    Status encode(const ChunkInput& input, Executor& executor, std::vector<std::uint8_t>& object, Hash& chain,
                  EncodeReport* report = nullptr);

  private:
    struct State;
    std::unique_ptr<State> state_;
};

}  // namespace kvcast
