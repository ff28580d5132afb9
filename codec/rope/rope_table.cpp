#include "codec/rope/rope_table.h"

namespace kvcast {

RopeTable::RopeTable(const Rope& rope, std::size_t row, std::size_t token_step)
    : pairs_(rope.pairs()),
      first_(rope.offset),
      pair_step_(rope.pair_step()),
      partner_(rope.partner()),
      row_(row),
      token_step_(token_step) {}

template <typename Put>
void RopeTable::for_turns(const Rope& rope, std::uint64_t first, std::uint64_t stride, std::size_t tokens,
                          Put&& put) {
    for (std::size_t p = 0; p < rope.pairs(); ++p) {
        for (std::size_t t = 0; t < tokens; ++t)
            put(p, t, kernels::sin_cos((first + t * stride) * rope.frequencies[p]));
    }
}

RopeTable RopeTable::by_pair(const Rope& rope, std::uint64_t first, std::uint64_t stride, std::size_t tokens,
                             std::size_t aligned) {
    if (rope.pairing == RopePairing::kNone) return {};
    const std::size_t begin = line_stride(aligned) - aligned;
    RopeTable table(rope, line_stride(begin + tokens), 1);
    table.begin_ = begin;
    table.cos_.resize(table.pairs_ * table.row_);
    table.sin_.resize(table.pairs_ * table.row_);
    for_turns(rope, first, stride, tokens, [&](std::size_t p, std::size_t t, kernels::SinCos turn) {
        table.cos_[p * table.row_ + begin + t] = turn.cos;
        table.sin_[p * table.row_ + begin + t] = turn.sin;
    });
    return table;
}

RopeTable RopeTable::by_token(const Rope& rope, std::uint64_t first, std::uint64_t stride,
                              std::size_t tokens) {
    if (rope.pairing == RopePairing::kNone) return {};
    RopeTable table(rope, rope.pairs(), rope.pairs());
    table.cos_.resize(tokens * table.row_);
    table.sin_.resize(tokens * table.row_);
    for_turns(rope, first, stride, tokens, [&](std::size_t p, std::size_t t, kernels::SinCos turn) {
        table.cos_[t * table.row_ + p] = turn.cos;
        table.sin_[t * table.row_ + p] = turn.sin;
    });
    return table;
}

kernels::Rotation RopeTable::rotation(std::size_t token) const {
    if (pairs_ == 0) return {};
    const std::size_t at = begin_ + token * token_step_;
    return {pairs_, first_, pair_step_, partner_, cos_.data() + at, sin_.data() + at, row_};
}

RopeTable chunk_turns(const ChunkHeader& header, std::uint64_t position) {
    const Rope& rope = header.layout.rope;
    if (header.profile == Profile::kKlt) return RopeTable::by_token(rope, position, 1, header.tokens);
    return RopeTable::by_pair(rope, position, 1, header.tokens, header.delta.exact_rows);
}

}  // namespace kvcast
