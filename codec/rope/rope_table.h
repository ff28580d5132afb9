// Integer RoPE: cosines and sines of every (pair, token), computed once per chunk and shared by all layers
// and heads. FORMAT.md, section 6: phase = position * frequency modulo 2^64.
#pragma once

#include <cstddef>
#include <cstdint>

#include "codec/aligned_vector.h"
#include "codec/format/chunk_header.h"
#include "kernels/ops.h"

namespace kvcast {

class RopeTable {
  public:
    // No rotation at all.
    RopeTable() = default;

    // Token t is at position first + t * stride, modulo 2^64; stride 0 turns all tokens by the same angle.
    // What kernels read of token `aligned` begins where a cache line does.
    static RopeTable by_pair(const kernels::Ops& ops, const Rope& rope, std::uint64_t first,
                             std::uint64_t stride, std::size_t tokens, std::size_t aligned = 0);

    // The same as Ops::store_states and load_rows want it.
    static RopeTable by_token(const kernels::Ops& ops, const Rope& rope, std::uint64_t first,
                              std::uint64_t stride, std::size_t tokens);

    // For kernels, over tokens from `token` on. Points into this object.
    kernels::Rotation rotation(std::size_t token = 0) const;

  private:
    RopeTable(const Rope& rope, std::size_t row, std::size_t token_step);

    std::size_t pairs_ = 0;
    std::size_t first_ = 0;
    std::size_t pair_step_ = 0;
    std::size_t partner_ = 0;
    std::size_t row_ = 0;         // entries of a row of the tables: tokens, or pairs
    std::size_t token_step_ = 0;  // from one token to the next
    std::size_t begin_ = 0;       // of token 0
    AlignedVector<std::int16_t> cos_;
    AlignedVector<std::int16_t> sin_;
};

// What turns the rows of a chunk whose first token is at `position`, as its profile's kernels want it.
RopeTable chunk_turns(const kernels::Ops& ops, const ChunkHeader& header, std::uint64_t position);

}  // namespace kvcast
