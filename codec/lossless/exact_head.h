// Exact coding of floating-point elements, bit for bit: sign and mantissa raw, exponents by rANS under a
// model per run. FORMAT.md, section 7.1. A run is one channel of a head over all tokens (bodies), or one
// token over all channels of a head (the exact rows at the start of a chunk).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "codec/entropy/block_reader.h"
#include "codec/entropy/block_writer.h"
#include "codec/fetch_ahead.h"

namespace kvcast {

// Elements are stored as their type is.

// One row of `count` elements, which must stay until the writer finishes. Models travel as a word each.
void write_exact_row(entropy::BlockWriter& out, kernels::Dtype dtype, const void* row, std::size_t count);

// Buffers that exact bodies need per head; reused.
struct ExactModels {
    std::vector<std::int16_t> centers;
    std::vector<std::int16_t> tables;
    std::vector<kernels::FloatStrip> strips;
};

// A channel-major tile [channels][tile_stride] of which the first `tokens` of each row are coded. The tile
// must stay until the writer finishes.
void write_exact_body(entropy::BlockWriter& out, kernels::Dtype dtype, const void* tile,
                      std::size_t tile_stride, std::size_t channels, std::size_t tokens, ExactModels& models,
                      FetchAhead& ahead);

// A body or a row that is read: where it goes, and whether its models were in range (the tile is filled all
// the same).
struct ExactBody {
    void* tile = nullptr;
    bool fits = true;
};

// Reads a row from each of some blocks, all of `count` elements, side by side.
void read_exact_rows(std::span<entropy::BlockReader* const> readers, kernels::Dtype dtype,
                     std::span<ExactBody> rows, std::size_t count);

// Reads a body from each of some blocks, all of one shape, side by side; `models` has one entry per reader.
// Lines of what is outgoing leave meanwhile.
void read_exact_bodies(std::span<entropy::BlockReader* const> readers, kernels::Dtype dtype,
                       std::span<ExactBody> bodies, std::size_t tile_stride, std::size_t channels,
                       std::size_t tokens, std::span<ExactModels> models,
                       std::span<kernels::Outgoing> outgoing);

}  // namespace kvcast
