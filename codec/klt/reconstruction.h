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

// Reconstructed states of a chunk's newest layers, as far back as predictions reach, and the features of its
// tokens. Slices of tokens are independent: different threads may work on different ones.
class KltStates {
  public:
    void reset(const Calibration& calibration, const Calibration::Set& set,
               std::span<const std::int32_t> token_ids);

    // States [token][width] of a plane. Those of `reach` layers before the newest one are still there.
    std::int16_t* plane(std::size_t layer, std::size_t plane);
    const std::int16_t* plane(std::size_t layer, std::size_t plane) const;

    // sums[t * part width + c], t counted from the slice's first token, becomes bias + prediction of a unit.
    void predict(const kernels::Ops& ops, std::size_t layer, std::size_t plane, std::size_t part,
                 TokenSlice slice, std::int32_t* sums) const;

    // Adds the transform of multiples of coefficients [token of the slice][part width], which fit 16 bits,
    // and keeps the saturated sums as the unit's states.
    void reconstruct(const kernels::Ops& ops, std::size_t layer, std::size_t plane, std::size_t part,
                     TokenSlice slice, const std::int16_t* coefficients, unsigned multiplier,
                     std::int32_t* sums);

  private:
    std::size_t slot(std::size_t layer, std::size_t plane) const;

    const Calibration* calibration_ = nullptr;
    std::optional<Calibration::Set> set_;
    std::size_t tokens_ = 0;
    std::vector<AlignedVector<std::int16_t>> planes_;  // [layer modulo reach + 1][plane]
    AlignedVector<std::int16_t> features_;             // [token][features]
};

using kernels::klt_class;

inline constexpr std::int32_t kGainLow = -15;
inline constexpr std::int32_t kGainHigh = 15;

}  // namespace kvcast
