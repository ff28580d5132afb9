#include <algorithm>

#include "kernels/scalar/slots.h"

namespace kvcast::kernels::scalar {
namespace {

// Tokens that share one pass over a matrix.
constexpr std::size_t kTokenTile = 4;

std::int32_t dot(const std::int16_t* row, const std::int16_t* features, std::size_t inputs) {
    std::int32_t sum = 0;
    for (std::size_t i = 0; i < inputs; ++i) sum += std::int32_t{row[i]} * features[i];
    return sum;
}

// The same with four rows of features. Compilers turn the loop into multiply-add instructions of pairs,
// whatever the backend's name, which read the matrix once for all four.
void dot_four(const std::int16_t* row, const std::int16_t* features, std::size_t stride, std::size_t inputs,
              std::int32_t (&sums)[kTokenTile]) {
    const std::int16_t* const b = features + stride;
    const std::int16_t* const c = b + stride;
    const std::int16_t* const d = c + stride;
    std::int32_t with_a = 0, with_b = 0, with_c = 0, with_d = 0;
    for (std::size_t i = 0; i < inputs; ++i) {
        const std::int32_t m = row[i];
        with_a += m * features[i];
        with_b += m * b[i];
        with_c += m * c[i];
        with_d += m * d[i];
    }
    sums[0] = with_a;
    sums[1] = with_b;
    sums[2] = with_c;
    sums[3] = with_d;
}

// How many features are up to the last one that is not zero for all of some tokens.
std::size_t leading(const Projection& p, const std::int16_t* features, std::size_t tokens) {
    std::size_t used = p.inputs;
    const auto all_zero = [&](std::size_t i) {
        for (std::size_t t = 0; t < tokens; ++t) {
            if (features[t * p.feature_stride + i] != 0) return false;
        }
        return true;
    };
    while (used != 0 && all_zero(used - 1)) --used;
    return used;
}

}  // namespace

void project(const Projection& p) {
    for (std::size_t first = 0; first < p.tokens; first += kTokenTile) {
        const std::size_t tokens = std::min(kTokenTile, p.tokens - first);
        const std::int16_t* features = p.features + first * p.feature_stride;
        const std::size_t inputs = leading(p, features, tokens);
        for (std::size_t o = 0; o < p.outputs; ++o) {
            const std::int16_t* row = p.matrix + o * p.inputs;
            std::int32_t sums[kTokenTile];
            if (tokens == kTokenTile) {
                dot_four(row, features, p.feature_stride, inputs, sums);
            } else {
                for (std::size_t t = 0; t < tokens; ++t)
                    sums[t] = dot(row, features + t * p.feature_stride, inputs);
            }
            for (std::size_t t = 0; t < tokens; ++t)
                p.sums[(first + t) * p.sum_stride + o] += shifted_sum(sums[t] * p.multiplier, p.shifts[o]);
        }
    }
}

}  // namespace kvcast::kernels::scalar
