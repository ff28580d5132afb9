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

}  // namespace

void project(const Projection& p) {
    for (std::size_t first = 0; first < p.tokens; first += kTokenTile) {
        const std::size_t tokens = std::min(kTokenTile, p.tokens - first);
        const std::int16_t* features = p.features + first * p.feature_stride;
        for (std::size_t o = 0; o < p.outputs; ++o) {
            const std::int16_t* row = p.matrix + o * p.inputs;
            std::int32_t sums[kTokenTile];
            if (tokens == kTokenTile) {
                dot_four(row, features, p.feature_stride, p.inputs, sums);
            } else {
                for (std::size_t t = 0; t < tokens; ++t)
                    sums[t] = dot(row, features + t * p.feature_stride, p.inputs);
            }
            for (std::size_t t = 0; t < tokens; ++t)
                p.sums[(first + t) * p.sum_stride + o] += shifted_sum(sums[t] * p.multiplier, p.shifts[o]);
        }
    }
}

void project_sparse(const Projection& p) {
    constexpr std::size_t kOutputs = 256;  // sums held at once
    std::int32_t sums[kOutputs];
    for (std::size_t begin = 0; begin < p.outputs; begin += kOutputs) {
        const std::size_t outputs = std::min(kOutputs, p.outputs - begin);
        for (std::size_t t = 0; t < p.tokens; ++t) {
            std::fill_n(sums, outputs, 0);
            for (std::size_t i = 0; i < p.inputs; ++i) {
                const std::int16_t f = p.features[t * p.feature_stride + i];
                if (f == 0) continue;
                const std::int16_t* column = p.matrix + i * p.outputs + begin;
                for (std::size_t o = 0; o < outputs; ++o) sums[o] += std::int32_t{column[o]} * f;
            }
            for (std::size_t o = 0; o < outputs; ++o)
                p.sums[t * p.sum_stride + begin + o] +=
                    shifted_sum(sums[o] * p.multiplier, p.shifts[begin + o]);
        }
    }
}

}  // namespace kvcast::kernels::scalar
