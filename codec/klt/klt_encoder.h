// Encodes a chunk with the klt profile: closed loop on the decoder's integers. FORMAT.md, section 11.
//
// Analysis, gains and the choice of exact tokens are the encoder's own affair; what it predicts from is what
// the decoder will reconstruct.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "codec/chunk_assembly.h"
#include "codec/encoder.h"
#include "codec/entropy/block_writer.h"
#include "codec/klt/gain.h"
#include "codec/klt/klt_analysis.h"
#include "codec/klt/klt_chunk.h"
#include "codec/rope/rope_table.h"

namespace kvcast {

class KltEncoder {
  public:
    explicit KltEncoder(const kernels::Ops& ops) : ops_(ops) {}

    // Fills header.klt.exact_tokens (which holds the tokens that are exact by choice), block sizes and
    // checksums, and `object`, a part of it for each run of layers. `costs`, where given, has one entry per
    // layer. kBadArgument where the calibration does not fit the layout or has no such level.
    Status encode(const ChunkInput& input, const KltAnalysis& analysis, ChunkHeader& header,
                  const RopeTable& rope, Executor& executor, ChunkAssembly& object,
                  std::span<entropy::BlockCost> costs);

  private:
    struct Scratch {
        AlignedVector<float> values;               // [token][plane width], un-rotated
        AlignedVector<float> residual;             // of a token's part
        AlignedVector<std::int16_t> integers;      // [token][part width]: residuals, by exponents
        std::vector<int> exponents;                // [token]
        AlignedVector<std::int32_t> coefficients;  // [token][active]
    };
    struct Unit {
        AlignedVector<std::int16_t> q;          // [token][part width]
        std::vector<std::int16_t> gains;        // [token]
        std::vector<std::int16_t> coded_gains;  // [body token]
        AlignedVector<std::int16_t> tiles;      // [strip][coefficient][lane]

        void list_gains(std::span<const std::uint32_t> body) {
            coded_gains.clear();
            for (const std::uint32_t t : body) coded_gains.push_back(gains[t]);
        }
    };
    struct Job;

    void quantise_planes(const Job& job, std::span<const TokenSlice> slices,
                         std::span<const std::uint32_t> body, Executor& executor);
    void quantise_plane(const Job& job, std::size_t layer, std::size_t plane, TokenSlice slice,
                        Scratch& scratch);
    void reconstruct_plane(const Job& job, std::size_t layer, std::size_t plane, TokenSlice slice);
    void load_plane(const Job& job, std::size_t layer, std::size_t plane, TokenSlice slice, Scratch& scratch);
    void quantise_unit(const Job& job, std::size_t layer, std::size_t plane, std::size_t part,
                       TokenSlice slice, Scratch& scratch);
    void level_gains(const Job& job, Unit& unit, std::span<const std::uint32_t> body);
    void reconstruct_unit(const Job& job, std::size_t layer, std::size_t plane, std::size_t part,
                          TokenSlice slice);
    std::int32_t* sums_of(const Job& job, std::size_t plane, std::size_t part, TokenSlice slice);
    void take_residual(const Job& job, std::size_t layer, std::size_t plane, std::size_t part,
                       TokenSlice slice, Scratch& scratch);
    void write_layer(const Job& job, std::size_t layer, const std::vector<std::uint32_t>& body,
                     entropy::BlockWriter& writer);
    void write_coefficients(const CalibrationUnit& from, const ChunkHeader& header,
                            const std::vector<std::uint32_t>& body, Unit& unit,
                            entropy::BlockWriter& writer) const;
    void write_exact_rows(const Job& job, std::size_t layer, entropy::BlockWriter& writer);

    const kernels::Ops& ops_;
    KltStates states_;
    AlignedVector<std::int32_t> sums_;  // predictions of the newest plane, slice by slice
    TokenStrips token_strips_;
    std::vector<Unit> units_;          // [layer][plane][part]
    std::vector<std::uint8_t> unfit_;  // [token]: cannot be coded
    std::vector<Scratch> scratch_;     // [worker]
    std::vector<entropy::BlockWriter> writers_;
};

}  // namespace kvcast
