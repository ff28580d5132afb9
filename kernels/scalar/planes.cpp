#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>

#include "kernels/scalar/elements.h"
#include "kernels/scalar/slots.h"

namespace kvcast::kernels::scalar {
namespace {

const void* row_of(const void* rows, std::size_t row_bytes, std::size_t token) {
    return static_cast<const std::uint8_t*>(rows) + token * row_bytes;
}

void* row_of(void* rows, std::size_t row_bytes, std::size_t token) {
    return static_cast<std::uint8_t*>(rows) + token * row_bytes;
}

// Magnitudes order like their bits, and NaN above infinity.
std::uint32_t magnitude_bits(float x) {
    return std::bit_cast<std::uint32_t>(x) & 0x7fffffffu;
}

// a, b: the two channels of a pair for all tokens, turned back by each token's angle.
void unrotate(float* a, float* b, const std::int16_t* cos, const std::int16_t* sin, std::size_t tokens) {
    constexpr float unit = 1.0f / (1 << kTrigBits);
    for (std::size_t t = 0; t < tokens; ++t) {
        const auto c = static_cast<float>(cos[t]);
        const auto s = static_cast<float>(sin[t]);
        const float x = a[t];
        const float y = b[t];
        a[t] = (x * c + y * s) * unit;
        b[t] = (y * c - x * s) * unit;
    }
}

// A rotation by tables [token][pair], as one of a single token's tile.
Rotation of_token(const Rotation& all, std::size_t token) {
    Rotation one = all;
    if (all.pairs == 0) return one;
    one.cos += token * all.table_stride;
    one.sin += token * all.table_stride;
    one.table_stride = 1;
    return one;
}

template <Dtype D>
void store_channel(const HeadStore& h, std::size_t channel) {
    const std::int16_t* state = h.tile + channel * h.tile_stride;
    for (std::size_t t = 0; t < h.tokens; ++t) {
        put_element(row_of(h.rows, h.row_bytes, t), D, channel, to_bits(D, value_of(state[t], h.scale)));
    }
}

template <Dtype D>
void store_pair(const HeadStore& h, std::size_t pair) {
    const Rotation& r = h.rotation;
    const std::size_t first = r.first + pair * r.pair_step;
    const std::size_t second = first + r.partner;
    const std::int16_t* a = h.tile + first * h.tile_stride;
    const std::int16_t* b = h.tile + second * h.tile_stride;
    const std::int16_t* cos = r.cos + pair * r.table_stride;
    const std::int16_t* sin = r.sin + pair * r.table_stride;
    for (std::size_t t = 0; t < h.tokens; ++t) {
        const Rotated v = rotate(a[t], b[t], {cos[t], sin[t]});
        void* row = row_of(h.rows, h.row_bytes, t);
        put_element(row, D, first, to_bits(D, value_of(v.a, h.scale)));
        put_element(row, D, second, to_bits(D, value_of(v.b, h.scale)));
    }
}

template <Dtype D>
void store_head_as(const HeadStore& h) {
    const Rotation& r = h.rotation;
    for (std::size_t p = 0; p < r.pairs; ++p) store_pair<D>(h, p);
    for (std::size_t c = 0; c < h.channels; ++c) {
        const bool turned = c >= r.first && c < r.first + 2 * r.pairs;
        if (!turned) store_channel<D>(h, c);
    }
}

std::uint32_t element_of(const ExactStore& h, std::size_t channel, std::size_t token) {
    return element_at(h.tile, h.source, channel * h.tile_stride + token);
}

void store_exact_pair(const ExactStore& h, std::size_t pair) {
    const Rotation& r = h.rotation;
    const std::size_t first = r.first + pair * r.pair_step;
    const std::size_t second = first + r.partner;
    for (std::size_t t = 0; t < h.tokens; ++t) {
        const std::int32_t cos = r.cos[pair * r.table_stride + t];
        const std::int32_t sin = r.sin[pair * r.table_stride + t];
        const float x = from_bits(h.source, element_of(h, first, t));
        const float y = from_bits(h.source, element_of(h, second, t));
        void* row = row_of(h.rows, h.row_bytes, t);
        put_element(row, h.dtype, first, to_bits(h.dtype, rotate_exact(x, cos, y, -sin)));
        put_element(row, h.dtype, second, to_bits(h.dtype, rotate_exact(y, cos, x, sin)));
    }
}

void store_exact_channel(const ExactStore& h, std::size_t channel) {
    const bool same = h.source == h.dtype;
    for (std::size_t t = 0; t < h.tokens; ++t) {
        const std::uint32_t bits = element_of(h, channel, t);
        put_element(row_of(h.rows, h.row_bytes, t), h.dtype, channel,
                    same ? bits : to_bits(h.dtype, from_bits(h.source, bits)));
    }
}

}  // namespace

void load_elements(const void* rows, std::size_t row_bytes, Dtype dtype, std::size_t tokens,
                   std::size_t channels, void* tile, std::size_t tile_stride) {
    for (std::size_t t = 0; t < tokens; ++t) {
        for (std::size_t c = 0; c < channels; ++c)
            put_element(tile, dtype, c * tile_stride + t, element_at(row_of(rows, row_bytes, t), dtype, c));
    }
}

float load_head(const HeadLoad& h) {
    for (std::size_t c = 0; c < h.channels; ++c) {
        float* row = h.tile + c * h.tile_stride;
        for (std::size_t t = 0; t < h.tokens; ++t) {
            row[t] = from_bits(h.dtype, element_at(row_of(h.rows, h.row_bytes, t), h.dtype, c));
        }
    }
    turn_back(h, unrotate);
    std::uint32_t largest = 0;
    for (std::size_t c = 0; c < h.channels; ++c) {
        const float* row = h.tile + c * h.tile_stride;
        for (std::size_t t = 0; t < h.tokens; ++t) largest = std::max(largest, magnitude_bits(row[t]));
    }
    return magnitude_of(largest);
}

// Rows of a token are a tile of one.
void load_rows(const RowLoad& l) {
    for (std::size_t t = 0; t < l.tokens; ++t) {
        load_head({static_cast<const std::uint8_t*>(l.rows) + t * l.row_bytes, l.row_bytes, l.dtype, 1,
                   l.channels, of_token(l.rotation, t), l.values + t * l.value_stride, 1});
    }
}

void turns(std::uint64_t first, std::uint64_t step, std::size_t count, std::int16_t* cos, std::int16_t* sin) {
    for (std::size_t t = 0; t < count; ++t) {
        const SinCos turn = sin_cos(first + t * step);
        cos[t] = turn.cos;
        sin[t] = turn.sin;
    }
}

Moments moments(const float* values, std::size_t count, float scale) {
    Moments m = {0, 0};
    for (std::size_t i = 0; i < count; ++i) {
        const auto v = static_cast<std::int64_t>(round_even(values[i] * scale));
        m.sum += v;
        m.sum_of_squares += static_cast<std::uint64_t>(v * v);
    }
    return m;
}

std::int64_t rounded_sum(const float* values, std::size_t count, float scale) {
    std::int64_t sum = 0;
    for (std::size_t i = 0; i < count; ++i) sum += static_cast<std::int64_t>(round_even(values[i] * scale));
    return sum;
}

std::uint64_t quantise(const Quantisation& x) {
    const float step = power_of_two(-static_cast<int>(x.shift));
    const auto bound = static_cast<float>(x.limit);
    std::uint64_t sum = 0;
    for (std::size_t i = 0; i < x.count; ++i) {
        const auto predicted = static_cast<float>(x.prediction == nullptr ? x.mean : x.prediction[i]);
        const float residual = (x.values[i] * x.inverse_unit - predicted) * step;
        const float rounded = round_even(std::min(bound, std::max(-bound, residual)));
        const auto v = static_cast<std::int16_t>(rounded);
        sum += static_cast<std::uint64_t>(v < 0 ? -v : v);
        x.q[i] = v;
    }
    return sum;
}

void reconstruct(const std::int16_t* q, const std::int16_t* prediction, std::size_t count, unsigned shift,
                 std::int16_t* states) {
    for (std::size_t i = 0; i < count; ++i) states[i] = state_of(prediction[i], q[i], shift);
}

bool residual(const float* values, const std::int32_t* sums, std::size_t count, float scale, float most,
              float* residual) {
    int unfit = 0;
    for (std::size_t i = 0; i < count; ++i) {
        const float state = values[i] * scale;
        const bool fits = std::abs(state) <= most;
        unfit |= fits ? 0 : 1;
        residual[i] = fits ? state - static_cast<float>(sums[i]) : 0.0f;
    }
    return unfit == 0;
}

int share_exponent(const float* values, std::size_t count, std::int16_t* integers) {
    float largest = 0;
    for (std::size_t i = 0; i < count; ++i) largest = std::max(largest, std::abs(values[i]));
    const int exponent = shared_exponent(largest);
    const float factor = power_of_two(exponent);
    for (std::size_t i = 0; i < count; ++i)
        integers[i] = static_cast<std::int16_t>(static_cast<std::int32_t>(round_even(values[i] * factor)));
    return exponent;
}

bool round_steps(const std::int32_t* values, std::size_t count, float unit, float step, float most,
                 std::int16_t* q) {
    const float inverse = 1 / step;
    int unfit = 0;
    for (std::size_t i = 0; i < count; ++i) {
        const float x = static_cast<float>(values[i]) * unit;
        const bool fits = std::abs(x) <= most;
        unfit |= fits ? 0 : 1;
        q[i] = static_cast<std::int16_t>(static_cast<std::int32_t>(round_even(fits ? x * inverse : 0.0f)));
    }
    return unfit == 0;
}

void strips_to_rows(const std::int16_t* tile, std::size_t coefficients, std::int16_t* const* rows,
                    std::size_t tokens) {
    for (std::size_t t = 0; t < tokens; ++t) {
        for (std::size_t c = 0; c < coefficients; ++c) rows[t][c] = tile[c * kLanes + t];
    }
}

void rows_to_strips(const std::int16_t* const* rows, std::size_t tokens, std::size_t coefficients,
                    std::int16_t* tile) {
    for (std::size_t t = 0; t < tokens; ++t) {
        for (std::size_t c = 0; c < coefficients; ++c) tile[c * kLanes + t] = rows[t][c];
    }
}

void saturate(const std::int32_t* sums, std::size_t count, std::int16_t* states) {
    for (std::size_t i = 0; i < count; ++i) states[i] = saturate16(sums[i]);
}

void state_features(const std::int16_t* states, const std::int16_t* bias, const std::int16_t* factors,
                    std::size_t count, std::int16_t* features) {
    for (std::size_t i = 0; i < count; ++i) features[i] = state_feature(states[i], bias[i], factors[i]);
}

void store_head(const HeadStore& head) {
    switch (head.dtype) {
        case Dtype::kBf16:
            return store_head_as<Dtype::kBf16>(head);
        case Dtype::kF16:
            return store_head_as<Dtype::kF16>(head);
        default:
            return store_head_as<Dtype::kF32>(head);
    }
}

// States of a token are a tile of one.
void store_states(const StateStore& s) {
    for (std::size_t t = 0; t < s.tokens; ++t) {
        store_head({s.states + t * s.state_stride, 1, 1, s.channels, of_token(s.rotation, t), s.scale,
                    s.dtype, static_cast<std::uint8_t*>(s.rows) + t * s.row_bytes, s.row_bytes});
    }
}

void store_exact(const ExactStore& head) {
    const Rotation& r = head.rotation;
    for (std::size_t p = 0; p < r.pairs; ++p) store_exact_pair(head, p);
    for (std::size_t c = 0; c < head.channels; ++c) {
        const bool turned = c >= r.first && c < r.first + 2 * r.pairs;
        if (!turned) store_exact_channel(head, c);
    }
}

void send(Outgoing& rows) {
    while (rows.left != 0) {
        std::memcpy(rows.to, rows.from, rows.left_in_row);
        rows.leave(rows.left_in_row);
    }
}

}  // namespace kvcast::kernels::scalar
