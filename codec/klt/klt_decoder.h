// Decodes a chunk of the klt profile layer after layer. FORMAT.md, section 11.
#pragma once

#include <array>
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

    // A layer's block (checksum verified) and where its values go; `planes` is empty where they are not
    // wanted.
    struct Layer {
        std::span<const std::uint8_t> block;
        std::span<const PlaneBuffer> planes;
    };

    // Decodes the next layer; token slices run on the executor. Where `ahead` is given, the layer after it,
    // it is prepared at the same time, and comes next as `layer`. kCorruptBlock; then begin() again.
    Status layer(const Layer& layer, const Layer* ahead, Executor& executor);

  private:
    struct Scratch {
        AlignedVector<std::int32_t> sums;
    };

    // What a layer's block says, before any arithmetic.
    struct Symbols {
        Status status;
        std::vector<std::vector<std::int16_t>> gains;           // [unit of the layer][body token]
        std::vector<AlignedVector<std::int16_t>> coefficients;  // [unit of the layer][token][part width]
    };

    Status read(std::size_t layer, const Layer& from, Symbols& symbols);
    bool read_exact_rows(std::span<const PlaneBuffer> planes);
    bool read_gains(Symbols& symbols);
    void read_strip(const TokenStrip& strip, std::span<const std::int8_t> classes,
                    std::int16_t* coefficients);
    void read_coefficients(std::size_t layer, Symbols& symbols);
    void reconstruct_slice(TokenSlice slice, std::span<const PlaneBuffer> planes, Scratch& scratch);
    unsigned multiplier_of(TokenSlice slice, std::span<std::int16_t> coefficients) const;
    void store_slice(TokenSlice slice, std::size_t plane, const PlaneBuffer& out) const;

    std::optional<entropy::BlockReader> reader_;  // first: it is aligned to 64 bytes
    Chunk chunk_;
    std::optional<Calibration::Set> set_;
    std::size_t next_layer_ = 0;
    KltBytes bytes_;
    std::vector<std::uint32_t> body_;
    std::vector<TokenSlice> slices_;
    std::vector<TokenSlice> id_slices_;
    KltStates states_;
    std::array<Symbols, 2> symbols_;   // of even and odd layers
    std::size_t prepared_layers_ = 0;  // whose symbols have been read, and whose sums have starts
    std::vector<std::uint8_t> row_;
    TokenStrips token_strips_;
    std::vector<kernels::Strip> strips_;  // of one token strip, by coefficient
    AlignedVector<std::int16_t> tile_;    // [coefficient][lane]
    std::vector<Scratch> scratch_;        // [worker]
};

}  // namespace kvcast
