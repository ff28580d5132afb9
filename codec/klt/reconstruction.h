// The integer arithmetic of the klt profile: what the decoder reconstructs, and the encoder predicts from.
// FORMAT.md, section 11.3.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "codec/aligned_vector.h"
#include "codec/klt/calibration.h"
#include "kernels/ops.h"

namespace kvcast {

// A run of tokens of a chunk.
struct TokenSlice {
    std::size_t first = 0;
    std::size_t count = 0;
};

// Reconstructed states of a chunk's newest layer, features of it and the layers before, as far back as
// predictions reach, and what the ids of its tokens predict. Slices of tokens are independent:
// different threads may work on different ones.
class KltStates {
  public:
    void reset(const Calibration& calibration, const Calibration::Set& set,
               std::span<const std::int32_t> token_ids);

    // Tokens of one id start from the same sums, bias and what the id predicts; a plane's are made once for
    // each of the `ids()` ids that the chunk has, in slices of ids, before any of its units is predicted.
    // Those of the layer before are still there.
    std::size_t ids() const { return ids_; }
    void make_starts(const kernels::Ops& ops, std::size_t layer, std::size_t plane, TokenSlice ids);

    // States [token][width] of a plane, of the newest layer that has been reconstructed.
    const std::int16_t* plane(std::size_t plane) const { return states_[plane].data(); }

    // sums[t * part width + c], t counted from the slice's first token, becomes bias + prediction of a unit.
    void predict(const kernels::Ops& ops, std::size_t layer, std::size_t plane, std::size_t part,
                 TokenSlice slice, std::int32_t* sums) const;

    // Adds the transform of multiples of coefficients [token of the slice][part width], which fit 16 bits,
    // and keeps the saturated sums as the unit's states, and what later units are predicted from.
    void reconstruct(const kernels::Ops& ops, std::size_t layer, std::size_t plane, std::size_t part,
                     TokenSlice slice, const std::int16_t* coefficients, unsigned multiplier,
                     std::int32_t* sums);

  private:
    std::size_t feature_slot(std::size_t layer, std::size_t plane) const;
    std::size_t start_slot(std::size_t layer, std::size_t plane) const;

    const Calibration* calibration_ = nullptr;
    std::optional<Calibration::Set> set_;
    std::vector<AlignedVector<std::int16_t>> states_;    // [plane]
    std::vector<AlignedVector<std::int16_t>> features_;  // [layer modulo reach + 1][plane]: as states
    std::size_t ids_ = 0;                                // different ones; 1 where none predicts anything
    std::vector<std::uint32_t> id_of_;                   // [token]
    AlignedVector<std::int16_t> token_features_;         // [id][features]
    std::vector<AlignedVector<std::int32_t>> starts_;    // [layer modulo 2][plane]: [id][plane width]
};

using kernels::klt_class;

inline constexpr std::int32_t kGainLow = -15;
inline constexpr std::int32_t kGainHigh = 15;

}  // namespace kvcast
