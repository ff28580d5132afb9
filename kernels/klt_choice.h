// How encoders of the klt profile quantise and choose gains, once for host and device: both are to write the
// same bytes. The encoder's own affair; a decoder reads what was chosen.
#pragma once

#include "kernels/math.h"

namespace kvcast::kernels {

// Gains that encoders try; the format allows more.
inline constexpr std::int32_t kKltGainMost = 6;
inline constexpr std::int32_t kKltGainsTried = 2 * kKltGainMost + 1;

// The n-th gain to be tried: 0, 1, -1, 2, ...; the first of the cheapest is taken, so that small ones win
// ties.
KVCAST_HD constexpr std::int16_t klt_gain_tried(std::int32_t n) {
    return static_cast<std::int16_t>(n % 2 == 0 ? -n / 2 : (n + 1) / 2);
}

// What a coefficient that class 0 sets to zero counts for, per unit of its magnitude, in 1/256 bit: its bits
// are saved, its error is not.
inline constexpr std::uint32_t kKltLostCost = 8 * 256;

// Up to this magnitude a coefficient counts as much as its opposite does.
inline constexpr std::int32_t kKltSymmetricCost = 15;

// Largest magnitudes that states, which keep room below saturation, and coefficients may have.
inline constexpr float kKltStateMost = 32000;
inline constexpr float kKltCoefficientMost = 30000;

// False for NaN too.
KVCAST_HD constexpr bool klt_state_fits(float state) {
    return state >= -kKltStateMost && state <= kKltStateMost;
}

struct KltQuantised {
    std::int16_t q;
    bool fits;  // strips can hold it
};

// A coefficient, given in units of `unit`, in steps of its level's multiplier, as Ops::round_steps has it;
// inverse_step = 1 / multiplier.
KVCAST_HD constexpr KltQuantised klt_quantised(std::int32_t coefficient, float unit, float inverse_step) {
    constexpr float most = kKltCoefficientMost;
    const float x = static_cast<float>(coefficient) * unit;
    const bool fits = x >= -most && x <= most;
    const float steps = fits ? x * inverse_step : 0.0f;
    return {static_cast<std::int16_t>(static_cast<std::int32_t>(round_even(steps))), fits};
}

}  // namespace kvcast::kernels
