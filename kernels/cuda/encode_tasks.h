// What the encoding kernels are told, and what they answer. See kernels/cuda/tasks.h.
#pragma once

#include "kernels/cuda/encode_step.h"
#include "kernels/cuda/strip_list.h"
#include "kernels/cuda/tasks.h"
#include "kernels/ops.h"

namespace kvcast::kernels::cuda {

inline constexpr std::uint32_t kThresholds = 30;
inline constexpr std::uint32_t kLoadTokens = 64;  // of a tile that is loaded, of kStoreSlots slots

// The coder's tables and code lengths, in the image.
struct CoderTables {
    StepTables steps;
    std::uint16_t cost[kTables][kSymbols];  // 1/256 bit, an escape with its 16 bits
    std::uint32_t
        class_thresholds[kThresholds];  // class n + 1 from a mean |q| * 256 of class_thresholds[n] on
};

// What was decided about a plane: the device's answer to the host, and to the kernels that come after.
struct PlaneChoice {
    std::uint32_t quantised;
    std::uint32_t guard_bits;
    Scale scale;
};

// One plane of one layer of a chunk, profiles delta and lossless.
struct EncodePlaneTask {
    RowsAt in;
    double relative_step;   // times the plane's standard deviation; lossless: 0
    std::uint64_t tile;     // workspace: stored bits [head][channel][tile_stride], as tile_place() says
    std::uint64_t words;    // workspace: BatchWord [head][batch], as StripList says
    std::uint64_t records;  // workspace: std::uint32_t [head][batch][record]
    std::uint64_t side;     // workspace: std::int16_t [head][vector][channel]: classes, delta classes if
                            // anchored, means; where exact: centers, tables
    std::uint64_t moments;  // workspace: Moments [head][channel]
    std::uint64_t largest;  // workspace: std::uint32_t, bits of the largest magnitude
    std::uint32_t heads;
    std::uint32_t channels;  // per head
    std::uint32_t body_tokens;
    std::uint32_t tile_stride;  // tile_tokens() in whole sectors of memory
    std::uint32_t exact_rows;
    std::uint32_t head_batches;  // of a head, at most
    std::uint32_t plane_lines;   // of a record
    std::uint32_t anchor_group;  // 0: predicted from the mean
    std::uint32_t anchor_shift;
    std::uint32_t least_guard_bits;
    std::uint32_t rotation;    // of the body, turned back: index, or kNone
    std::uint32_t first_tile;  // tiles of the tasks before this one that have no bands, each one of all heads
    std::uint32_t first_band;  // bands of those that have
    std::uint32_t first_head;  // heads of the tasks before this one
    std::uint32_t first_duo;   // their runs of duos, as duo_runs_of() counts them
    std::uint32_t first_row;   // heads * exact rows of them
    Dtype source;
    bool lossless;
    bool banded;  // short, and in pieces of 16 bytes that are turned as a whole; see bands_of()
};

// Bodies that warps take whole, eight values a lane: bf16, up to a batch of tokens, predicted from the mean
// or exact.
KVCAST_HD constexpr bool is_short(const EncodePlaneTask& p) {
    return p.source == Dtype::kBf16 && p.body_tokens <= kBatchValues && p.anchor_group == 0;
}

// A tile has what a lane of a warp takes side by side where the body is short, and zeros behind its end.
KVCAST_HD constexpr std::uint32_t tile_tokens(const EncodePlaneTask& p) {
    return is_short(p) && p.body_tokens != 0 ? kBatchValues : p.body_tokens;
}
KVCAST_HD constexpr std::uint32_t tile_place(const EncodePlaneTask& p, std::uint32_t token) {
    static_assert(kBodyUnit == kBatchValues);
    return is_short(p) ? body_index(token) : token;
}

// A band is kBandPieces pieces of kPieceChannels of a head's first half of channels, and those of its second
// half that they are turned with, if any are: the whole body of them.
inline constexpr std::uint32_t kPieceChannels = 8;
inline constexpr std::uint32_t kBandPieces = 4;
KVCAST_HD constexpr std::uint32_t half_pieces(const EncodePlaneTask& p) {
    return p.channels / 2 / kPieceChannels;
}
KVCAST_HD constexpr std::uint32_t bands_of(const EncodePlaneTask& p) {
    return div_up(half_pieces(p), kBandPieces);
}

// Warps go through channels two by two, a duo, and take the same duo of several heads: what it needs is found
// and loaded once.
inline constexpr std::uint32_t kRunHeads = 8;

KVCAST_HD constexpr std::uint32_t duos_of(const EncodePlaneTask& p) {
    return div_up(p.channels, 2);
}
KVCAST_HD constexpr std::uint32_t duo_runs_of(const EncodePlaneTask& p) {
    return duos_of(p) * div_up(p.heads, kRunHeads);
}

inline constexpr std::uint32_t kMostVectors = 3;

// Strips of a plane's head.
KVCAST_HD constexpr StripList strip_list(const EncodePlaneTask& p, bool quantised) {
    const bool anchored = quantised && p.anchor_group != 0;
    const std::uint32_t anchors = anchored ? div_up(p.body_tokens, p.anchor_group) : p.body_tokens;
    const std::uint32_t vectors = p.body_tokens == 0 ? 0 : anchored ? 3 : 2;
    return {p.exact_rows, vectors, p.channels, anchored ? 2u : 1u, {anchors, p.body_tokens - anchors}};
}

// One block, written from the end of its slot backwards.
struct EncodeBlockTask {
    std::uint64_t slot;        // workspace
    std::uint32_t slot_bytes;  // even
    std::uint32_t plane;       // index of the layer's first EncodePlaneTask
    std::uint32_t first_head;
    std::uint32_t end_head;
};

// Where a chunk's blocks are packed.
struct PackTask {
    std::uint8_t* payload;  // device; even
    std::uint64_t capacity;
    std::uint32_t first_block;  // of its chunk
    std::uint32_t end_block;
};

}  // namespace kvcast::kernels::cuda
