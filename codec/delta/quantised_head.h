// One head of a plane in the delta profile: a spread class and a mean per channel, then the channel's
// quantised residuals as strips. FORMAT.md, section 7.2. Token-wise deltas to an anchor follow CacheGen
// (arXiv 2310.07240, section 5.1); prediction from the chunk's own mean needs no anchor.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "codec/entropy/block_reader.h"
#include "codec/entropy/block_writer.h"
#include "codec/fetch_ahead.h"
#include "codec/format/chunk_header.h"

namespace kvcast {

// Buffers of one head; reused. Symbols must live until the block is finished, everything else only for the
// call.
struct QuantisedScratch {
    std::vector<std::int16_t> classes;
    std::vector<std::int16_t> delta_classes;
    std::vector<std::int16_t> means;
    std::vector<std::uint64_t> sums;
    std::vector<std::int16_t> prediction;
    std::vector<std::int16_t> states;
    std::vector<std::int16_t> joined;
    std::vector<float> gathered;
    std::vector<kernels::Strip> strips;
};

// Extents of a tile, channel-major.
struct TileShape {
    std::size_t channels = 0;
    std::size_t tokens = 0;
    std::size_t stride = 0;
};

// Fewest guard bits that a plane is coded with.
unsigned least_guard_bits(const DeltaParams& delta);

// Mode, guard bits and scale of a plane from its statistics: the step nearest to `step` that the format can
// express. Falls back to the exact mode where states of 16 bits cannot hold both the step and the largest
// magnitude.
PlaneParams choose_params(double step, float max_magnitude, const DeltaParams& delta);

// Quantises a tile of floats into `symbols` (same shape and stride) and takes them down in the writer.
void write_quantised_head(entropy::BlockWriter& out, const kernels::Ops& ops, const DeltaParams& delta,
                          const PlaneParams& plane, const float* tile, TileShape shape, std::int16_t* symbols,
                          QuantisedScratch& scratch, FetchAhead& ahead);

// One head that is read: its plane's parameters, where its states go, or, predicted from means, the elements
// of 16 bits that those are where a type is given; and whether its side information was in range (the tile is
// filled all the same).
struct QuantisedHead {
    PlaneParams plane;
    std::int16_t* tile = nullptr;
    std::optional<kernels::Dtype> elements;
    bool fits = true;
};

// Reads the next head of each of some blocks, all of one shape, side by side. `scratch` has one entry per
// reader. Lines of what is outgoing leave meanwhile.
void read_quantised_heads(std::span<entropy::BlockReader* const> readers, const kernels::Ops& ops,
                          const DeltaParams& delta, std::span<QuantisedHead> heads, TileShape shape,
                          std::span<QuantisedScratch> scratch, std::span<kernels::Outgoing> outgoing);

}  // namespace kvcast
