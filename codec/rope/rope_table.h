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

  private:
    std::size_t pairs_ = 0;
    std::size_t first_ = 0;
    std::size_t pair_step_ = 0;
    std::size_t partner_ = 0;
    std::size_t tokens_ = 0;
    std::vector<std::int16_t> cos_;
    std::vector<std::int16_t> sin_;
};

}  // namespace kvcast
