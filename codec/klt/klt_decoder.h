// Decodes a chunk of the klt profile layer after layer. FORMAT.md, section 11.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "codec/decoder.h"
#include "codec/entropy/block_reader.h"
#include "codec/klt/klt_chunk.h"
#include "codec/rope/rope_table.h"

namespace kvcast {

// Where one chunk's decoding stands. Buffers grow to the largest chunk seen and stay.
class KltDecoder {
  public:
    // What does not change between layers; must stay until the last one.
    struct Chunk {
        const ChunkHeader* header = nullptr;
        const Calibration* calibration = nullptr;
        const kernels::Ops* ops = nullptr;
        Dtype dtype = Dtype::kBf16;
        const RopeTable* absolute = nullptr;
        const RopeTable* shift = nullptr;
    };

    void begin(const Chunk& chunk);

    // The layer that layer() decodes next.
    std::size_t next_layer() const { return next_layer_; }

    const KltBytes& bytes() const { return bytes_; }

    // Decodes the next layer from its block (checksum verified) into `planes`, which may be empty where its
    // values are not wanted; token slices run on the executor. kCorruptBlock; then begin() again.
    Status layer(std::span<const std::uint8_t> block, std::span<const PlaneBuffer> planes,
                 Executor& executor);

  private:
    struct Scratch {
        std::vector<std::int32_t> sums;
        std::vector<std::int16_t> tile;
    };

    bool read_exact_rows(std::span<const PlaneBuffer> planes);
    bool read_gains();
    void read_coefficients();
    void scale_slice(TokenSlice slice, std::int16_t* coefficients, std::size_t width) const;
    void store_slice(TokenSlice slice, std::size_t plane, const PlaneBuffer& out, Scratch& scratch) const;

    std::optional<entropy::BlockReader> reader_;  // first: it is aligned to 64 bytes
    Chunk chunk_;
    std::size_t next_layer_ = 0;
    KltBytes bytes_;
    std::vector<std::uint32_t> body_;
    std::vector<TokenSlice> slices_;
    KltStates states_;
    std::vector<std::vector<std::int16_t>> gains_;         // [unit of the layer][body token]
    std::vector<std::vector<std::int16_t>> coefficients_;  // [unit of the layer][token][part width]
    std::vector<std::uint32_t> bits_;
    std::vector<kernels::Strip> strips_;
    std::vector<Scratch> scratch_;  // [worker]
};

}  // namespace kvcast
