// What the encoding kernels are told about chunks of the klt profile (FORMAT.md, section 11). See
// kernels/cuda/tasks.h.
#pragma once

#include "kernels/cuda/encode_tasks.h"

namespace kvcast::kernels::cuda {

// One chunk. All its tokens go through the transforms; those that are exact, by choice or because nothing
// else holds them, only leave their coefficients unused. No other token depends on them.
struct KltChunkTask {
    std::uint64_t levels;  // image: std::uint8_t [token], counted from 0
    std::uint64_t
        in_tail;           // image: std::uint8_t [token]: 1 in the tail, which has a level of its own, else 0
    std::uint64_t chosen;  // image: std::uint8_t [token]: not 0 where exact by choice
    std::uint64_t unfit;   // workspace: std::uint32_t [token]: not 0 where exact
    std::uint64_t body;    // workspace: std::uint32_t [1 + tokens]: how many tokens are coded, and which
    std::uint64_t exact;   // report: std::uint32_t [1 + tokens]: how many are exact, and which
    const std::uint16_t* multipliers;  // device: [level]
    std::uint32_t tokens;
    std::uint32_t level_count;
};

// One plane of one layer of a chunk.
struct KltSourceTask {
    RowsAt in;
    std::uint64_t q;             // workspace: std::int16_t [token][width]
    std::uint64_t gains;         // workspace: std::int16_t [part][token]
    std::uint64_t row_models;    // workspace: std::uint16_t [head][exact token], as stored
    const std::int8_t* classes;  // device: [part][level][coefficient]
    std::uint32_t chunk;
    std::uint32_t heads;
    std::uint32_t channels;  // per head
    std::uint32_t parts;
    std::uint32_t part_width;
    std::uint32_t rotation;    // turned back: index, or kNone
    std::uint32_t first_head;  // heads of the tasks before this one
    Dtype source;
};

// One part of such a plane, on its way to coefficients. A wave's units have no order among them.
struct KltUnitTask {
    std::uint64_t sums;      // workspace: std::int32_t [token][width]: predictions
    std::uint64_t features;  // workspace: std::int16_t [token][width]: residuals by their tokens' exponents;
                             // then quantised coefficients, multiplied by their multiplier
    std::uint64_t products;  // workspace: std::int32_t [token][width]: coefficients; before, residuals, float
    std::uint64_t units;     // workspace: float [token]: what a token's products count
    std::uint64_t order;     // workspace: std::uint32_t [token], scratch
    std::uint32_t plane;     // index of its KltSourceTask
    std::uint32_t part;
    std::uint32_t active[2];    // leading coefficients that may be coded: at the level, at the tail's
    std::uint32_t most_active;  // the greater one, rounded up to kUnitStep, or the part's width
    float inverse_unit;         // 1 / what a state stands for
    float fraction;             // KltAnalysis::fraction()
    std::uint32_t first_token;  // tokens of the wave's units before this one
};

// Layers that share coder states, written backwards by one warp into the slot of an EncodeBlockTask.
struct KltWriteTask {
    std::uint32_t chunk;
    std::uint32_t plane;   // index of the first layer's first KltSourceTask
    std::uint32_t planes;  // of a layer
    std::uint32_t layers;
    std::uint64_t order;        // workspace: std::uint32_t [token], scratch
    std::uint32_t first_layer;  // where the report has their sizes
};

}  // namespace kvcast::kernels::cuda
