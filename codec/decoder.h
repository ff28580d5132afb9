// Decoding chunk objects (FORMAT.md). Output is bit-identical on every backend and executor.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "codec/executor.h"
#include "codec/format/chunk_header.h"
#include "kernels/ops.h"

namespace kvcast {

// Where one plane of one layer goes: `tokens` rows of `width` elements of the wanted dtype. Any alignment;
// where all rows begin at multiples of 64 bytes, large chunks can be written past the caches, which is faster
// into memory that is not in them.
struct PlaneBuffer {
    void* rows = nullptr;
    std::size_t row_bytes = 0;
};

class Calibration;

struct DecodeOptions {
    std::optional<Dtype> dtype = std::nullopt;                  // default: the layout's
    std::optional<std::uint64_t> base_position = std::nullopt;  // default: the chunk's; re-bases K by RoPE
    std::shared_ptr<const Calibration> calibration = nullptr;   // for chunks of the klt profile
};

// Where the bytes of a klt chunk's blocks are, in layers decoded so far.
struct KltBytes {
    std::uint64_t states = 0;
    std::uint64_t exact_tokens = 0;
    std::uint64_t gains = 0;
    std::uint64_t coefficients = 0;
};

// Buffers of one worker. Grows to the largest block seen, then allocates nothing.
class DecodeWorkspace {
  public:
    DecodeWorkspace();
    ~DecodeWorkspace();
    DecodeWorkspace(DecodeWorkspace&&) noexcept;
    DecodeWorkspace& operator=(DecodeWorkspace&&) noexcept;

    // Of the last klt chunk.
    const KltBytes& klt_bytes() const;

    struct Buffers;
    Buffers& buffers() { return *buffers_; }

  private:
    std::unique_ptr<Buffers> buffers_;
};

// One opened chunk object. Immutable after open(): any number of threads may decode from it at once, each
// with its own workspace. The object's bytes must outlive it.
class ChunkDecoder {
  public:
    // Parses and checks the header (klt: against the calibration, kMissingCalibration or
    // kWrongCalibration); blocks are checked when they are decoded. `bytes` starts at the object
    // and may go on after it; it may also end early, for delivery of the layers that are there.
    static Result<ChunkDecoder> open(std::span<const std::uint8_t> bytes, const DecodeOptions& options = {},
                                     const kernels::Ops& ops = kernels::best_ops());
    ~ChunkDecoder();
    ChunkDecoder(ChunkDecoder&&) noexcept;
    ChunkDecoder& operator=(ChunkDecoder&&) noexcept;

    const ChunkHeader& header() const;
    Dtype dtype() const;  // of the output

    // Bytes of the whole object.
    std::uint64_t object_bytes() const;

    // Checks a layer's checksum: kTruncated, kBlockChecksum.
    Status verify_layer(std::size_t layer) const;

    // Decodes one block of a layer whose checksum was verified, into the planes that it has heads of;
    // `planes` has one buffer per plane. On failure the buffers' content is unspecified: kCorruptBlock,
    // kTruncated. Chunks of the klt profile have no blocks that can be decoded alone: kBadArgument.
    Status decode_block(std::size_t layer, std::size_t block, std::span<const PlaneBuffer> planes,
                        DecodeWorkspace& workspace) const;

    // verify_layer and all blocks, in this thread. Layers of a klt chunk come in order, from 0 on, with the
    // same workspace; else kBadArgument.
    Status decode_layer(std::size_t layer, std::span<const PlaneBuffer> planes,
                        DecodeWorkspace& workspace) const;

    // Layers first to end - 1; `planes` is [layer - first][plane]. Blocks run in parallel, or token slices in
    // the klt profile, where layers before `first` are decoded too. `workspaces` has one entry per worker.
    Status decode_layers(std::size_t first, std::size_t end, std::span<const PlaneBuffer> planes,
                         Executor& executor, std::span<DecodeWorkspace> workspaces) const;

    // All layers.
    Status decode(std::span<const PlaneBuffer> planes, Executor& executor,
                  std::span<DecodeWorkspace> workspaces) const;

  private:
    struct State;
    // Blocks first to first + count - 1, counted over all layers, side by side; `planes` begins with the
    // first one's layer. The first block that failed and why, or kOk.
    std::pair<std::size_t, Status> decode_group(std::size_t first, std::size_t count,
                                                std::span<const PlaneBuffer> planes,
                                                DecodeWorkspace& workspace) const;
    // `ahead`: where the values of the layer after it go, if it is there and is decoded next.
    Status decode_klt_layer(std::size_t layer, std::span<const PlaneBuffer> planes,
                            const std::span<const PlaneBuffer>* ahead, Executor& executor,
                            DecodeWorkspace& workspace) const;
    Status decode_klt_layers(std::size_t first, std::size_t end, std::span<const PlaneBuffer> planes,
                             Executor& executor, DecodeWorkspace& workspace) const;
    Status decode_block_layers(std::size_t first, std::size_t end, std::span<const PlaneBuffer> planes,
                               Executor& executor, std::span<DecodeWorkspace> workspaces) const;
    explicit ChunkDecoder(std::unique_ptr<State> state);
    std::unique_ptr<State> state_;
};

// kOk where `next` may follow `previous` in one file: the same layout, model and base position, consecutive
// tokens (kNotConsecutive), and its parent (kBrokenChain).
Status check_consecutive(const ChunkHeader& previous, const ChunkHeader& next);

}  // namespace kvcast
