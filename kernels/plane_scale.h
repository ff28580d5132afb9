// How encoders choose the scale of a delta plane, once for host and device: both are to write the same bytes.
// The encoder's own affair; a decoder reads what was chosen.
#pragma once

#include <cmath>

#include "kernels/math.h"

namespace kvcast::kernels {

inline constexpr float kStateLimit = 32000.0f;
inline constexpr unsigned kMostGuardBits = 8;
inline constexpr std::int32_t kSymbolLimit = 30000;  // of magnitudes of quantised values

struct PlaneScale {
    bool quantised = false;
    unsigned guard_bits = 0;  // the step is 2^guard_bits states
    Scale scale = {128, 0};
};

// The unit mantissa * 2^exponent nearest to `unit`; false where the exponent is out of range.
KVCAST_HD inline bool express_unit(double unit, Scale& scale) {
    int exponent = 0;
    const double fraction = frexp(unit, &exponent);  // [0.5, 1)
    scale.mantissa = static_cast<std::int32_t>(floor(fraction * 256 + 0.5));
    scale.exponent = exponent - 8;
    if (scale.mantissa == 256) scale = {128, exponent - 7};
    return scale.exponent >= kMinExponent && scale.exponent <= kMaxExponent;
}

// The step nearest to `step` that the format can express, with as many guard bits as the largest magnitude
// leaves room for. Not quantised where states of 16 bits cannot hold both, or where there is no step.
KVCAST_HD inline PlaneScale choose_scale(double step, float max_magnitude, unsigned least_guard_bits) {
    if (max_magnitude == 0) return {true, least_guard_bits, {128, 0}};
    const bool finite = max_magnitude < INFINITY;  // magnitudes are not NaN
    if (!finite || !(step > 0)) return {};
    for (unsigned guard = kMostGuardBits; guard >= least_guard_bits; --guard) {
        PlaneScale p = {true, guard, {128, 0}};
        if (!express_unit(ldexp(step, -static_cast<int>(guard)), p.scale)) continue;
        if (max_magnitude <= kStateLimit * unit_of(p.scale)) return p;
    }
    return {};
}

}  // namespace kvcast::kernels
