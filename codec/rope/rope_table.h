// Integer RoPE: cosines and sines of every (pair, token), computed once per chunk and shared by all layers
// and heads. FORMAT.md, section 6: phase = position * frequency modulo 2^64.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "codec/format/layout.h"
#include "kernels/ops.h"

namespace kvcast {

class RopeTable {
  public:
    // No rotation at all.
    RopeTable() = default;

    // Token t is at position first + t * stride, modulo 2^64; stride 0 turns all tokens by the same angle.
    RopeTable(const Rope& rope, std::uint64_t first, std::uint64_t stride, std::size_t tokens);

    // For kernels, over tokens from `token` on. Points into this object.
    kernels::Rotation rotation(std::size_t token = 0) const;

    // The same with tables as Ops::store_states wants them.
    kernels::Rotation rotation_by_token(std::size_t token) const;

  private:
    std::size_t pairs_ = 0;
    std::size_t first_ = 0;
    std::size_t pair_step_ = 0;
    std::size_t partner_ = 0;
    std::size_t tokens_ = 0;
    std::vector<std::int16_t> cos_;  // [pair][token]
    std::vector<std::int16_t> sin_;
    std::vector<std::int16_t> cos_by_token_;  // [token][pair]
    std::vector<std::int16_t> sin_by_token_;
};

}  // namespace kvcast
