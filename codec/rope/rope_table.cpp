#include "codec/rope/rope_table.h"

#include <vector>

namespace kvcast {

RopeTable::RopeTable(const Rope& rope, std::size_t row, std::size_t token_step)
    : pairs_(rope.pairs()),
      first_(rope.offset),
      pair_step_(rope.pair_step()),
      partner_(rope.partner()),
      row_(row),
      token_step_(token_step) {}

RopeTable RopeTable::by_pair(const kernels::Ops& ops, const Rope& rope, std::uint64_t first,
                             std::uint64_t stride, std::size_t tokens, std::size_t aligned) {
    if (rope.pairing == RopePairing::kNone) return {};
    const std::size_t begin = line_stride(aligned) - aligned;
    RopeTable table(rope, line_stride(begin + tokens), 1);
    table.begin_ = begin;
    table.cos_.resize(table.pairs_ * table.row_);
    table.sin_.resize(table.pairs_ * table.row_);
    for (std::size_t p = 0; p < table.pairs_; ++p) {
        const std::uint64_t frequency = rope.frequencies[p];
        const std::size_t at = p * table.row_ + begin;
        ops.turns(first * frequency, stride * frequency, tokens, &table.cos_[at], &table.sin_[at]);
    }
    return table;
}

RopeTable RopeTable::by_token(const kernels::Ops& ops, const Rope& rope, std::uint64_t first,
                              std::uint64_t stride, std::size_t tokens) {
    if (rope.pairing == RopePairing::kNone) return {};
    RopeTable table(rope, rope.pairs(), rope.pairs());
    table.cos_.resize(tokens * table.row_);
    table.sin_.resize(tokens * table.row_);
    std::vector<std::int16_t> cos(tokens), sin(tokens);
    for (std::size_t p = 0; p < table.pairs_; ++p) {
        const std::uint64_t frequency = rope.frequencies[p];
        ops.turns(first * frequency, stride * frequency, tokens, cos.data(), sin.data());
        for (std::size_t t = 0; t < tokens; ++t) {
            table.cos_[t * table.row_ + p] = cos[t];
            table.sin_[t * table.row_ + p] = sin[t];
        }
    }
    return table;
}

kernels::Rotation RopeTable::rotation(std::size_t token) const {
    if (pairs_ == 0) return {};
    const std::size_t at = begin_ + token * token_step_;
    return {pairs_, first_, pair_step_, partner_, cos_.data() + at, sin_.data() + at, row_};
}

RopeTable chunk_turns(const kernels::Ops& ops, const ChunkHeader& header, std::uint64_t position) {
    const Rope& rope = header.layout.rope;
    if (header.profile == Profile::kKlt) return RopeTable::by_token(ops, rope, position, 1, header.tokens);
    return RopeTable::by_pair(ops, rope, position, 1, header.tokens, header.exact_rows);
}

}  // namespace kvcast
