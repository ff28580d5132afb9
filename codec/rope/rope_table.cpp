#include "codec/rope/rope_table.h"

namespace kvcast {

RopeTable::RopeTable(const Rope& rope, std::uint64_t first, std::uint64_t stride, std::size_t tokens) {
    if (rope.pairing == RopePairing::kNone) return;
    pairs_ = rope.pairs();
    first_ = rope.offset;
    pair_step_ = rope.pair_step();
    partner_ = rope.partner();
    tokens_ = tokens;
    cos_.resize(pairs_ * tokens);
    sin_.resize(pairs_ * tokens);
    cos_by_token_.resize(pairs_ * tokens);
    sin_by_token_.resize(pairs_ * tokens);
    for (std::size_t p = 0; p < pairs_; ++p) {
        for (std::size_t t = 0; t < tokens; ++t) {
            const kernels::SinCos v = kernels::sin_cos((first + t * stride) * rope.frequencies[p]);
            cos_[p * tokens + t] = cos_by_token_[t * pairs_ + p] = v.cos;
            sin_[p * tokens + t] = sin_by_token_[t * pairs_ + p] = v.sin;
        }
    }
}

kernels::Rotation RopeTable::rotation(std::size_t token) const {
    if (pairs_ == 0) return {};
    return {pairs_, first_, pair_step_, partner_, cos_.data() + token, sin_.data() + token, tokens_};
}

kernels::Rotation RopeTable::rotation_by_token(std::size_t token) const {
    if (pairs_ == 0) return {};
    const std::size_t at = token * pairs_;
    return {pairs_, first_, pair_step_, partner_, cos_by_token_.data() + at, sin_by_token_.data() + at,
            pairs_};
}

}  // namespace kvcast
