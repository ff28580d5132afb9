// What encoding finds out about planes before it codes them: tiles, scales, classes, means, symbols, exponent
// models. The arithmetic is the CPU encoder's, operation by operation, so that both write the same bytes:
// floats are rounded once per operation (no contraction), sums are integers, and the few sums of doubles go
// in the CPU's order.
#include "kernels/cuda/encode_launch.h"
#include "kernels/cuda/exponent_model.cuh"
#include "kernels/cuda/platform.cuh"
#include "kernels/cuda/rows.cuh"
#include "kernels/cuda/warp_rans.cuh"
#include "kernels/plane_scale.h"

namespace kvcast::kernels::cuda {
namespace {

constexpr std::uint32_t kThreads = 128;
constexpr std::uint32_t kWarps = kThreads / kLanes;

// ---- rows to tiles

__device__ std::uint32_t element(const EncodePlaneTask& p, std::uint32_t token, std::uint32_t head,
                                 std::uint32_t channel) {
    return element_of(row_of(p.in, token) + head * p.in.head_bytes, p.source, channel);
}

// Floats of planes that may be quantised, turned back, and the plane's largest magnitude; or the stored bits
// of planes that are exact after all.
__global__ void load_tiles(Memory memory, const EncodePlaneTask* planes, std::uint32_t count,
                           const RotationTask* rotations, const PlaneChoice* choices, bool bits) {
    __shared__ std::uint32_t first[kStoreTokens][kStoreSlots + 1];
    __shared__ std::uint32_t second[kStoreTokens][kStoreSlots + 1];
    const std::uint32_t index = task_of<&EncodePlaneTask::first_tile>(planes, count, blockIdx.x);
    const EncodePlaneTask& p = planes[index];
    if (bits ? choices[index].quantised != 0 : p.lossless) return;
    const RotationTask* r = p.rotation == kNone ? nullptr : rotations + p.rotation;
    const std::uint32_t slots = slots_of(p.channels, r == nullptr ? 0 : r->pairs);
    const std::uint32_t across = div_up(slots, kStoreSlots), down = div_up(p.body_tokens, kStoreTokens);
    const std::uint32_t local = blockIdx.x - p.first_tile;
    const std::uint32_t head = local / (across * down);
    const std::uint32_t first_slot = local % across * kStoreSlots;
    const std::uint32_t first_token = local / across % down * kStoreTokens;

    for (std::uint32_t i = threadIdx.x; i < kStoreTokens * kStoreSlots; i += kThreads) {
        const std::uint32_t t = i / kStoreSlots, s = i % kStoreSlots;
        if (first_slot + s >= slots || first_token + t >= p.body_tokens) continue;
        const Slot slot = slot_of(first_slot + s, r);
        const std::uint32_t token = p.exact_rows + first_token + t;
        first[t][s] = element(p, token, head, slot.first);
        if (slot.pair) second[t][s] = element(p, token, head, slot.second);
    }
    __syncthreads();

    auto* tile = reinterpret_cast<std::uint32_t*>(memory.workspace + p.tile) +
                 std::uint64_t{head} * p.channels * p.body_tokens;
    std::uint32_t largest = 0;  // magnitudes order like their bits, and NaN above infinity
    const auto put = [&](std::uint32_t channel, std::uint32_t token, std::uint32_t value) {
        tile[std::uint64_t{channel} * p.body_tokens + token] = value;
        const std::uint32_t magnitude = value & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
    };
    for (std::uint32_t i = threadIdx.x; i < kStoreTokens * kStoreSlots; i += kThreads) {
        const std::uint32_t s = i / kStoreTokens, t = i % kStoreTokens;
        const std::uint32_t token = first_token + t;
        if (first_slot + s >= slots || token >= p.body_tokens) continue;
        const Slot slot = slot_of(first_slot + s, r);
        if (bits) {
            put(slot.first, token, first[t][s]);
            if (slot.pair) put(slot.second, token, second[t][s]);
            continue;
        }
        const float x = from_bits(p.source, first[t][s]);
        if (!slot.pair) {
            put(slot.first, token, std::bit_cast<std::uint32_t>(x));
            continue;
        }
        const float y = from_bits(p.source, second[t][s]);
        const SinCos angle = reinterpret_cast<const SinCos*>(
            memory.workspace + r->table)[(first_slot + s) * r->columns + p.exact_rows + token];
        const TurnedBack v = turned_back(x, y, angle);
        put(slot.first, token, std::bit_cast<std::uint32_t>(v.a));
        put(slot.second, token, std::bit_cast<std::uint32_t>(v.b));
    }
    if (!bits) atomicMax(reinterpret_cast<std::uint32_t*>(memory.workspace + p.largest), largest);
}

__global__ void clear_largest(Memory memory, const EncodePlaneTask* planes, std::uint32_t count) {
    const std::uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) *reinterpret_cast<std::uint32_t*>(memory.workspace + planes[i].largest) = 0;
}

// ---- scales

// Of round_even(value(i) * scale), over a warp.
template <typename Value>
__device__ Moments moments_of(std::uint32_t count, float scale, Value value) {
    std::int64_t sum = 0, squares = 0;
    for (std::uint32_t i = lane_id(); i < count; i += kLanes) {
        const auto v = static_cast<std::int64_t>(round_even(value(i) * scale));
        sum += v;
        squares += v * v;
    }
    return {sum_of_lanes(sum), static_cast<std::uint64_t>(sum_of_lanes(squares))};
}

// The scale under which a plane's moments are taken; 0 where its deviation counts as 0.
__device__ float moment_scale(std::uint32_t largest) {
    const float magnitude = std::bit_cast<float>(largest);
    if (!(magnitude >= 0x1p-100f && magnitude <= 0x1p100f)) return 0;
    return power_of_two(20 - (static_cast<int>(largest >> 23) - 127));
}

__global__ void take_moments(Memory memory, const EncodePlaneTask* planes, std::uint32_t count,
                             std::uint32_t channels) {
    const std::uint32_t channel = blockIdx.x * kWarps + threadIdx.x / kLanes;
    if (channel >= channels) return;
    const EncodePlaneTask& p = planes[task_of<&EncodePlaneTask::first_channel>(planes, count, channel)];
    const std::uint32_t local = channel - p.first_channel;
    const float scale = moment_scale(*reinterpret_cast<const std::uint32_t*>(memory.workspace + p.largest));
    if (p.lossless || scale == 0) return;
    const float* row =
        reinterpret_cast<const float*>(memory.workspace + p.tile) + std::uint64_t{local} * p.body_tokens;
    const Moments m = moments_of(p.body_tokens, scale, [&](std::uint32_t i) { return row[i]; });
    if (lane_id() == 0) reinterpret_cast<Moments*>(memory.workspace + p.moments)[local] = m;
}

// Standard deviation of a plane about its channel means. Sums of doubles in channel order, as on the CPU.
__device__ double deviation(const EncodePlaneTask& p, const Moments* moments, float scale) {
    double sum = 0;
    for (std::uint32_t c = 0; c < p.heads * p.channels; ++c) {
        const auto total = static_cast<double>(moments[c].sum);
        sum += static_cast<double>(moments[c].sum_of_squares) -
               total * total / static_cast<double>(p.body_tokens);
    }
    const auto values = static_cast<double>(std::uint64_t{p.heads} * p.channels * p.body_tokens);
    return sqrt((sum > 0.0 ? sum : 0.0) / values) / static_cast<double>(scale);
}

__global__ void choose_scales(Memory memory, const EncodePlaneTask* planes, std::uint32_t count,
                              PlaneChoice* choices) {
    const std::uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const EncodePlaneTask& p = planes[i];
    choices[i] = {0, 0, {128, 0}};
    if (p.lossless || p.body_tokens == 0) return;
    const std::uint32_t largest = *reinterpret_cast<const std::uint32_t*>(memory.workspace + p.largest);
    const bool finite = largest < 0x7f800000u;
    const float scale = moment_scale(largest);
    const double spread =
        scale == 0 ? 0 : deviation(p, reinterpret_cast<const Moments*>(memory.workspace + p.moments), scale);
    const std::uint32_t magnitude = finite ? largest : 0x7f800000u;
    const PlaneScale chosen = choose_scale(finite ? p.relative_step * spread : 0,
                                           std::bit_cast<float>(magnitude), p.least_guard_bits);
    choices[i] = {chosen.quantised ? 1u : 0u, chosen.guard_bits, chosen.scale};
}

// ---- channels

// The class for `count` values whose magnitudes sum to `sum`.
__device__ std::int16_t class_for(const CoderTables& tables, std::uint64_t sum, std::uint32_t count) {
    if (sum == 0) return 0;
    const std::uint64_t mean = sum * 256 / count;
    int spread_class = 1;
    for (const std::uint32_t threshold : tables.class_thresholds) spread_class += threshold <= mean ? 1 : 0;
    return static_cast<std::int16_t>(spread_class);
}

// Quantises value(i) against prediction(i); the sum of magnitudes, in all lanes.
template <typename Value, typename Prediction>
__device__ std::uint64_t quantise(std::uint32_t count, float inverse_unit, unsigned shift, Value value,
                                  Prediction prediction, std::int16_t* q) {
    const float step = power_of_two(-static_cast<int>(shift));
    constexpr auto bound = static_cast<float>(kSymbolLimit);
    std::int64_t sum = 0;
    for (std::uint32_t i = lane_id(); i < count; i += kLanes) {
        const float residual = (value(i) * inverse_unit - static_cast<float>(prediction(i))) * step;
        const float clamped = residual < -bound ? -bound : residual > bound ? bound : residual;
        const auto v = static_cast<std::int16_t>(round_even(clamped));
        sum += v < 0 ? -v : v;
        q[i] = v;
    }
    return static_cast<std::uint64_t>(sum_of_lanes(sum));
}

// The mean of a channel in quarter steps.
template <typename Value>
__device__ std::int16_t mean_of(std::uint32_t count, float inverse_unit, unsigned guard_bits, Value value) {
    const Moments m = moments_of(count, inverse_unit, value);
    const double mean =
        static_cast<double>(m.sum) / static_cast<double>(count) / (1 << (guard_bits - kMeanFraction));
    const double rounded = nearbyint(mean);
    return static_cast<std::int16_t>(rounded < -kMeanLimit  ? -kMeanLimit
                                     : rounded > kMeanLimit ? kMeanLimit
                                                            : rounded);
}

__device__ void quantise_channel(const EncodePlaneTask& p, const PlaneChoice& choice,
                                 const CoderTables& tables, const float* row, std::int16_t* q,
                                 std::int16_t& spread_class, std::int16_t& delta_class, std::int16_t& mean) {
    const float inverse_unit = 1.0f / unit_of(choice.scale);
    const unsigned guard = choice.guard_bits;
    if (p.anchor_group == 0) {
        const auto value = [&](std::uint32_t i) { return row[i]; };
        mean = mean_of(p.body_tokens, inverse_unit, guard, value);
        const std::int16_t prediction = mean_state(mean, guard);
        const std::uint64_t sum = quantise(
            p.body_tokens, inverse_unit, guard, value, [&](std::uint32_t) { return prediction; }, q);
        spread_class = class_for(tables, sum, p.body_tokens);
        delta_class = 0;
        return;
    }
    const std::uint32_t anchors = div_up(p.body_tokens, p.anchor_group), rest = p.body_tokens - anchors;
    const std::uint32_t between = p.anchor_group - 1;
    const unsigned fine = guard - p.anchor_shift;
    const auto anchor = [&](std::uint32_t i) { return row[i * p.anchor_group]; };
    mean = mean_of(anchors, inverse_unit, guard, anchor);
    const std::int16_t prediction = mean_state(mean, guard);
    const std::uint64_t sum = quantise(
        anchors, inverse_unit, fine, anchor, [&](std::uint32_t) { return prediction; }, q);
    spread_class = class_for(tables, sum, anchors);
    __syncwarp();  // anchors' symbols, before the others are predicted from them
    const std::uint64_t delta_sum = quantise(
        rest, inverse_unit, guard,
        [&](std::uint32_t i) { return row[i / between * p.anchor_group + 1 + i % between]; },
        [&](std::uint32_t i) { return state_of(prediction, q[i / between], fine); }, q + anchors);
    delta_class = rest == 0 ? std::int16_t{0} : class_for(tables, delta_sum, rest);
}

// One warp per channel of a body, then one per exact row of a head.
__global__ void analyse_channels(Memory memory, const EncodePlaneTask* planes, std::uint32_t count,
                                 std::uint32_t channels, const PlaneChoice* choices,
                                 const CoderTables* tables) {
    __shared__ std::uint32_t counts[kWarps][256];
    const std::uint32_t channel = blockIdx.x * kWarps + threadIdx.x / kLanes;
    if (channel >= channels) return;
    const std::uint32_t index = task_of<&EncodePlaneTask::first_channel>(planes, count, channel);
    const EncodePlaneTask& p = planes[index];
    if (p.body_tokens == 0) return;
    const std::uint32_t local = channel - p.first_channel, all = p.heads * p.channels;
    auto* side = reinterpret_cast<std::int16_t*>(memory.workspace + p.classes) + local;
    const std::uint64_t row = std::uint64_t{local} * p.body_tokens;
    if (choices[index].quantised != 0) {
        std::int16_t spread_class = 0, delta_class = 0, mean = 0;
        quantise_channel(p, choices[index], *tables,
                         reinterpret_cast<const float*>(memory.workspace + p.tile) + row,
                         reinterpret_cast<std::int16_t*>(memory.workspace + p.symbols) + row, spread_class,
                         delta_class, mean);
        if (lane_id() != 0) return;
        side[0] = spread_class;
        side[all] = delta_class;
        side[2 * all] = mean;
        return;
    }
    const auto* bits = reinterpret_cast<const std::uint32_t*>(memory.workspace + p.tile) + row;
    const ExponentModel m = exponent_model(*tables, p.source, p.body_tokens, counts[threadIdx.x / kLanes],
                                           [&](std::uint32_t i) { return bits[i]; });
    if (lane_id() != 0) return;
    side[0] = static_cast<std::int16_t>(m.center);
    side[all] = static_cast<std::int16_t>(m.table);
}

__global__ void analyse_rows(Memory memory, const EncodePlaneTask* planes, std::uint32_t count,
                             std::uint32_t rows, const CoderTables* tables) {
    __shared__ std::uint32_t counts[kWarps][256];
    const std::uint32_t row = blockIdx.x * kWarps + threadIdx.x / kLanes;
    if (row >= rows) return;
    const EncodePlaneTask& p = planes[task_of<&EncodePlaneTask::first_row>(planes, count, row)];
    const std::uint32_t local = row - p.first_row, head = local / p.exact_rows, token = local % p.exact_rows;
    const ExponentModel m = exponent_model(*tables, p.source, p.channels, counts[threadIdx.x / kLanes],
                                           [&](std::uint32_t c) { return element(p, token, head, c); });
    if (lane_id() == 0)
        reinterpret_cast<std::uint16_t*>(memory.workspace + p.row_models)[local] =
            static_cast<std::uint16_t>(m.center | m.table << 8);
}

}  // namespace

cudaError_t launch_analysis(Memory memory, const EncodePlaneTask* planes, Extents n,
                            const RotationTask* rotations, const CoderTables* tables, PlaneChoice* choices,
                            cudaStream_t stream) {
    const Shape per_plane = {div_up(n.planes, kThreads), kThreads}, per_tile = {n.tiles, kThreads};
    const Shape per_channel = {div_up(n.channels, kWarps), kThreads};
    cudaError_t e = launch(clear_largest, per_plane, stream, memory, planes, n.planes);
    if (e != cudaSuccess) return e;
    e = launch(load_tiles, per_tile, stream, memory, planes, n.planes, rotations, choices, false);
    if (e != cudaSuccess) return e;
    e = launch(take_moments, per_channel, stream, memory, planes, n.planes, n.channels);
    if (e != cudaSuccess) return e;
    e = launch(choose_scales, per_plane, stream, memory, planes, n.planes, choices);
    if (e != cudaSuccess) return e;
    e = launch(load_tiles, per_tile, stream, memory, planes, n.planes, rotations, choices, true);
    if (e != cudaSuccess) return e;
    e = launch(analyse_channels, per_channel, stream, memory, planes, n.planes, n.channels, choices, tables);
    if (e != cudaSuccess) return e;
    return launch(analyse_rows, {div_up(n.rows, kWarps), kThreads}, stream, memory, planes, n.planes, n.rows,
                  tables);
}

}  // namespace kvcast::kernels::cuda
