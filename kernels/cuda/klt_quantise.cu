// From predictions to coefficients and gains of the klt profile, as codec/klt/klt_encoder.cpp has it,
// operation by operation: both write the same bytes. Floats are rounded once per operation (no contraction).
#include "kernels/cuda/klt_encode_launch.h"
#include "kernels/cuda/platform.cuh"
#include "kernels/cuda/rows.cuh"
#include "kernels/cuda/side_vector.cuh"
#include "kernels/cuda/token_strips.cuh"
#include "kernels/klt_choice.h"

namespace kvcast::kernels::cuda {
namespace {

constexpr std::uint32_t kThreads = 128;
constexpr std::uint32_t kWarps = kThreads / kLanes;

// A unit, its plane and its chunk.
struct Unit {
    const KltUnitTask& task;
    const KltSourceTask& plane;
    const KltChunkTask& chunk;

    __device__ Unit(const KltBatch& batch, const KltUnitTask& unit)
        : task(unit), plane(batch.planes[unit.plane]), chunk(batch.chunks[plane.chunk]) {}

    __device__ std::uint32_t width() const { return plane.part_width; }
    __device__ std::uint8_t level(Memory memory, std::uint32_t token) const {
        return reinterpret_cast<const std::uint8_t*>(memory.image + chunk.levels)[token];
    }
    __device__ std::uint32_t active(Memory memory, std::uint32_t token) const {
        return task.active[reinterpret_cast<const std::uint8_t*>(memory.image + chunk.in_tail)[token]];
    }
    __device__ std::int16_t* q(Memory memory, std::uint32_t token) const {
        return reinterpret_cast<std::int16_t*>(memory.workspace + plane.q) +
               (std::uint64_t{token} * plane.parts + task.part) * plane.part_width;
    }
    __device__ std::int16_t* gains(Memory memory) const {
        return reinterpret_cast<std::int16_t*>(memory.workspace + plane.gains) + task.part * chunk.tokens;
    }
    __device__ float* units(Memory memory) const {
        return reinterpret_cast<float*>(memory.workspace + task.units);
    }
    // An element of arrays [token][width of the plane], the part's first.
    __device__ std::uint64_t index(std::uint32_t token) const {
        return std::uint64_t{token} * plane.parts * plane.part_width;
    }
    __device__ void set_unfit(Memory memory, std::uint32_t token) const {
        atomicOr(reinterpret_cast<std::uint32_t*>(memory.workspace + chunk.unfit) + token, 1u);
    }
};

__global__ void note_chosen(Memory memory, const KltChunkTask* chunks) {
    const KltChunkTask& c = chunks[blockIdx.x];
    const auto* chosen = reinterpret_cast<const std::uint8_t*>(memory.image + c.chosen);
    auto* unfit = reinterpret_cast<std::uint32_t*>(memory.workspace + c.unfit);
    for (std::uint32_t t = threadIdx.x; t < c.tokens; t += kThreads) unfit[t] = chosen[t];
}

// ---- residuals

// What is predicted of a token of a unit, its residuals, and their integers.
struct TokenRows {
    std::int32_t* sums;
    float* residual;
    std::int16_t* features;

    __device__ TokenRows(const Unit& u, Memory memory, std::uint32_t token)
        : sums(reinterpret_cast<std::int32_t*>(memory.workspace + u.task.sums) + u.index(token)),
          residual(reinterpret_cast<float*>(memory.workspace + u.task.products) + u.index(token)),
          features(reinterpret_cast<std::int16_t*>(memory.workspace + u.task.features) + u.index(token)) {}
};

// A channel's state, if it fits, less what is predicted.
__device__ float residual_of(const Unit& u, Memory memory, std::uint32_t token, std::int32_t predicted,
                             float value) {
    const float state = value * u.task.inverse_unit;
    const bool fits = klt_state_fits(state);
    if (!fits) u.set_unfit(memory, token);
    return fits ? state - static_cast<float>(predicted) : 0.0f;
}

// Residuals of a token. Returns the greatest magnitude of those of this lane.
__device__ float take_residuals(const Unit& u, Memory memory, std::uint32_t token, const RotationTask* r,
                                const TokenRows& rows) {
    const KltSourceTask& p = u.plane;
    const std::uint32_t heads = p.heads / p.parts, slots = slots_of(p.channels, r == nullptr ? 0 : r->pairs);
    float largest = 0;
    const auto take = [&](std::uint32_t channel, float value) {
        const float residual = residual_of(u, memory, token, rows.sums[channel], value);
        rows.residual[channel] = residual;
        largest = fmaxf(largest, fabsf(residual));
    };
    for (std::uint32_t i = lane_id(); i < heads * slots; i += kLanes) {
        const std::uint32_t head = i / slots, index = i % slots, first = head * p.channels;
        const Slot slot = slot_of(index, r);
        const std::uint8_t* row = row_of(p.in, token) + (u.task.part * heads + head) * p.in.head_bytes;
        const float x = from_bits(p.source, element_of(row, p.source, slot.first));
        if (!slot.pair) {
            take(first + slot.first, x);
            continue;
        }
        const float y = from_bits(p.source, element_of(row, p.source, slot.second));
        const auto* angles = reinterpret_cast<const SinCos*>(memory.workspace + r->table);
        const TurnedBack v = turned_back(x, y, angles[index * r->columns + token]);
        take(first + slot.first, v.a);
        take(first + slot.second, v.b);
    }
    return largest;
}

// One warp per token of a unit.
__global__ void make_residuals(Memory memory, KltBatch batch, KltWave wave, const RotationTask* rotations) {
    const std::uint32_t item = blockIdx.x * kWarps + threadIdx.x / kLanes;
    if (item >= wave.tokens) return;
    const Unit u(batch, wave.units[task_of<&KltUnitTask::first_token>(wave.units, wave.count, item)]);
    const std::uint32_t token = item - u.task.first_token;
    const RotationTask* r = u.plane.rotation == kNone ? nullptr : rotations + u.plane.rotation;
    const TokenRows rows(u, memory, token);
    // Magnitudes compare as their bits do.
    const float own = take_residuals(u, memory, token, r, rows);
    const float largest =
        std::bit_cast<float>(__reduce_max_sync(kFullWarp, std::bit_cast<std::uint32_t>(own)));
    __syncwarp();  // residuals are read by other lanes
    const int exponent = shared_exponent(largest);
    const float factor = power_of_two(exponent);
    if (lane_id() == 0) u.units(memory)[token] = u.task.fraction * power_of_two(-exponent);
    for (std::uint32_t c = lane_id(); c < u.width(); c += kLanes) {
        rows.features[c] =
            static_cast<std::int16_t>(static_cast<std::int32_t>(round_even(rows.residual[c] * factor)));
    }
}

// ---- gains

__device__ std::uint64_t coefficient_cost(const CoderTables& tables, unsigned spread_class, std::int32_t q) {
    const std::int32_t magnitude = q < 0 ? -q : q;
    if (spread_class == 0) return std::uint64_t{kKltLostCost} * static_cast<std::uint32_t>(magnitude);
    return value_cost(tables, spread_class, magnitude <= kKltSymmetricCost ? magnitude : q);
}

using GainCosts = std::uint64_t[kKltGainsTried];

// The gain with which a token's coefficients cost least, in all lanes, from what those of this lane cost.
__device__ std::int16_t cheapest_gain(const GainCosts& costs) {
    std::int32_t best = 0;
    std::uint64_t least = ~std::uint64_t{0};
    for (std::int32_t n = 0; n < kKltGainsTried; ++n) {
        const std::uint64_t cost = sum_of_lanes(costs[n]);
        if (cost < least) best = n;
        least = cost < least ? cost : least;
    }
    return klt_gain_tried(best);
}

// Of a unit's token, and its classes.
struct CodedToken {
    std::uint32_t active;
    const std::int8_t* classes;  // [coefficient], at gain 0
    std::uint32_t level;
    std::int16_t* gain;
    std::int16_t* q;

    __device__ CodedToken(const Unit& u, Memory memory, std::uint32_t token)
        : active(u.active(memory, token)),
          classes(u.plane.classes),
          level(u.level(memory, token)),
          gain(u.gains(memory) + token),
          q(u.q(memory, token)) {
        classes += (std::uint64_t{u.task.part} * u.chunk.level_count + level) * u.width();
    }
};

// One warp per token of a unit: its coefficients, and the gain that suits them best.
__global__ void quantise_tokens(Memory memory, KltBatch batch, KltWave wave) {
    const std::uint32_t item = blockIdx.x * kWarps + threadIdx.x / kLanes;
    if (item >= wave.tokens) return;
    const Unit u(batch, wave.units[task_of<&KltUnitTask::first_token>(wave.units, wave.count, item)]);
    const std::uint32_t token = item - u.task.first_token;
    const CodedToken t(u, memory, token);
    const auto* products =
        reinterpret_cast<const std::int32_t*>(memory.workspace + u.task.products) + u.index(token);
    const float unit = u.units(memory)[token];
    const float inverse_step = 1 / static_cast<float>(u.chunk.multipliers[t.level]);
    GainCosts costs = {};
    for (std::uint32_t j = lane_id(); j < t.active; j += kLanes) {
        const KltQuantised v = klt_quantised(products[j], unit, inverse_step);
        if (!v.fits) u.set_unfit(memory, token);
        t.q[j] = v.q;
        for (std::int32_t n = 0; n < kKltGainsTried; ++n)
            costs[n] += coefficient_cost(*batch.tables, klt_class(t.classes[j], klt_gain_tried(n)), v.q);
    }
    const std::int16_t gain = cheapest_gain(costs);
    if (lane_id() == 0) *t.gain = gain;
}

// One warp per unit: all tokens of a strip get the gain of the one in its middle. Tokens that are exact by
// choice are in no strip.
__global__ void level_gains(Memory memory, KltBatch batch, KltWave wave) {
    __shared__ std::uint32_t places[kStripKeys];
    const Unit u(batch, wave.units[blockIdx.x]);
    const auto* chosen = reinterpret_cast<const std::uint8_t*>(memory.image + u.chunk.chosen);
    const auto* in_tail = reinterpret_cast<const std::uint8_t*>(memory.image + u.chunk.in_tail);
    std::int16_t* gains = u.gains(memory);
    const StripOrder order = sort_tokens(
        u.chunk.tokens,
        [&](std::uint32_t t) { return chosen[t] != 0 ? kLeftOut : strip_key(gains[t], in_tail[t] != 0); },
        places, reinterpret_cast<std::uint32_t*>(memory.workspace + u.task.order));
    StripRange strip = {};
    for (std::uint32_t first = 0; first < order.count; first += strip.count) {
        strip = strip_from(order, first);
        const std::int16_t gain = gains[order.tokens[first + strip.count / 2]];
        __syncwarp();  // before it is overwritten
        if (lane_id() < strip.count) gains[order.tokens[first + lane_id()]] = gain;
    }
}

// One warp per token of a unit: zeros where its gain leaves no bits; coefficients as the transform takes
// them.
__global__ void scale_coefficients(Memory memory, KltBatch batch, KltWave wave) {
    const std::uint32_t item = blockIdx.x * kWarps + threadIdx.x / kLanes;
    if (item >= wave.tokens) return;
    const Unit u(batch, wave.units[task_of<&KltUnitTask::first_token>(wave.units, wave.count, item)]);
    const std::uint32_t token = item - u.task.first_token;
    const CodedToken t(u, memory, token);
    const std::int16_t gain = *t.gain;
    const unsigned multiplier = u.chunk.multipliers[t.level];
    auto* scaled = reinterpret_cast<std::int16_t*>(memory.workspace + u.task.features) + u.index(token);
    for (std::uint32_t j = lane_id(); j < u.task.most_active; j += kLanes) {
        const bool coded = j < t.active && klt_class(t.classes[j], gain) != 0;
        if (j < t.active && !coded) t.q[j] = 0;
        scaled[j] = coded ? scaled_coefficient(t.q[j], multiplier) : std::int16_t{0};
    }
}

}  // namespace

cudaError_t launch_klt_begin(Memory memory, const KltBatch& batch, cudaStream_t stream) {
    return launch(note_chosen, {batch.chunk_count, kThreads}, stream, memory, batch.chunks);
}

cudaError_t launch_klt_residuals(Memory memory, const KltBatch& batch, const KltWave& wave,
                                 const RotationTask* rotations, cudaStream_t stream) {
    return launch(make_residuals, {div_up(wave.tokens, kWarps), kThreads}, stream, memory, batch, wave,
                  rotations);
}

cudaError_t launch_klt_quantise(Memory memory, const KltBatch& batch, const KltWave& wave,
                                cudaStream_t stream) {
    const Shape per_token = {div_up(wave.tokens, kWarps), kThreads};
    cudaError_t e = launch(quantise_tokens, per_token, stream, memory, batch, wave);
    if (e != cudaSuccess) return e;
    e = launch(level_gains, {wave.count, kLanes}, stream, memory, batch, wave);
    if (e != cudaSuccess) return e;
    return launch(scale_coefficients, per_token, stream, memory, batch, wave);
}

}  // namespace kvcast::kernels::cuda
