// From predictions to coefficients and gains of the klt profile, as codec/klt/klt_encoder.cpp has it,
// operation by operation: both write the same bytes. Floats are rounded once per operation (no contraction),
// and sums of products go over the channels in order.
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

// States of a token's channel, if they fit, less what is predicted.
__device__ void take_residual(const Unit& u, Memory memory, std::uint32_t token, std::uint32_t channel,
                              float value) {
    const std::uint64_t at = u.index(token) + channel;
    const float state = value * u.task.inverse_unit;
    const bool fits = klt_state_fits(state);
    if (!fits) u.set_unfit(memory, token);
    const std::int32_t sum = reinterpret_cast<const std::int32_t*>(memory.workspace + u.task.sums)[at];
    reinterpret_cast<float*>(memory.workspace + u.task.residual)[at] =
        fits ? state - static_cast<float>(sum) : 0.0f;
}

// One warp per token of a unit.
__global__ void take_residuals(Memory memory, KltBatch batch, KltWave wave, const RotationTask* rotations) {
    const std::uint32_t item = blockIdx.x * kWarps + threadIdx.x / kLanes;
    if (item >= wave.tokens) return;
    const Unit u(batch, wave.units[task_of<&KltUnitTask::first_token>(wave.units, wave.count, item)]);
    const KltSourceTask& p = u.plane;
    const std::uint32_t token = item - u.task.first_token, heads = p.heads / p.parts;
    const RotationTask* r = p.rotation == kNone ? nullptr : rotations + p.rotation;
    const std::uint32_t slots = slots_of(p.channels, r == nullptr ? 0 : r->pairs);
    for (std::uint32_t i = lane_id(); i < heads * slots; i += kLanes) {
        const std::uint32_t head = i / slots, index = i % slots, first = head * p.channels;
        const Slot slot = slot_of(index, r);
        const std::uint8_t* row = row_of(p.in, token) + (u.task.part * heads + head) * p.in.head_bytes;
        const float x = from_bits(p.source, element_of(row, p.source, slot.first));
        if (!slot.pair) {
            take_residual(u, memory, token, first + slot.first, x);
            continue;
        }
        const float y = from_bits(p.source, element_of(row, p.source, slot.second));
        const auto* angles = reinterpret_cast<const SinCos*>(memory.workspace + r->table);
        const TurnedBack v = turned_back(x, y, angles[index * r->columns + token]);
        take_residual(u, memory, token, first + slot.first, v.a);
        take_residual(u, memory, token, first + slot.second, v.b);
    }
}

// ---- coefficients

// A block of threads makes 64 coefficients of 64 tokens, a thread 4 x 4 of them; channels go by in steps
// through shared memory. On the multiply-add units, not the tensor cores: every sum is that of the CPU.
constexpr std::uint32_t kAnalyseThreads = 256;
constexpr std::uint32_t kChannels = 16;  // of a step
constexpr std::uint32_t kOwn = 4;        // tokens, and coefficients, of a thread
constexpr std::uint32_t kAcross = kUnitOutputs / kOwn;

struct AnalysisTile {
    float residual[kChannels][kUnitTokens + 1];
    float matrix[kChannels][kUnitOutputs];
};

struct Sums4x4 {
    float sum[kOwn][kOwn];
};

__device__ void load_step(AnalysisTile& tile, const Unit& u, Memory memory, std::uint32_t first_token,
                          std::uint32_t first_output, std::uint32_t first_channel) {
    const auto* residual = reinterpret_cast<const float*>(memory.workspace + u.task.residual);
    for (std::uint32_t i = threadIdx.x; i < kChannels * kUnitTokens; i += kAnalyseThreads) {
        const std::uint32_t t = i / kChannels, k = i % kChannels, channel = first_channel + k;
        const bool inside = first_token + t < u.chunk.tokens && channel < u.width();
        tile.residual[k][t] = inside ? residual[u.index(first_token + t) + channel] : 0.0f;
    }
    for (std::uint32_t i = threadIdx.x; i < kChannels * kUnitOutputs; i += kAnalyseThreads) {
        const std::uint32_t k = i / kUnitOutputs, o = i % kUnitOutputs, channel = first_channel + k;
        const bool inside = channel < u.width() && first_output + o < u.width();
        tile.matrix[k][o] =
            inside ? u.task.analysis[std::uint64_t{channel} * u.width() + first_output + o] : 0.0f;
    }
}

__device__ void multiply_step(const AnalysisTile& tile, std::uint32_t channels, Sums4x4& own) {
    const std::uint32_t t = threadIdx.x / kAcross * kOwn, o = threadIdx.x % kAcross * kOwn;
    for (std::uint32_t k = 0; k < channels; ++k) {
        for (std::uint32_t i = 0; i < kOwn; ++i) {
            for (std::uint32_t j = 0; j < kOwn; ++j)
                own.sum[i][j] += tile.residual[k][t + i] * tile.matrix[k][o + j];
        }
    }
}

// One token's sums to coefficients in steps.
__device__ void quantise_own(const Unit& u, Memory memory, std::uint32_t token, std::uint32_t first_output,
                             const float (&sums)[kOwn]) {
    const unsigned multiplier = u.chunk.multipliers[u.level(memory, token)];
    const float inverse_step = 1 / static_cast<float>(multiplier);
    const std::uint32_t active = u.active(memory, token);
    std::int16_t* q = u.q(memory, token);
    for (std::uint32_t j = 0; j < kOwn && first_output + j < active; ++j) {
        const KltQuantised v = klt_quantised(sums[j], inverse_step, multiplier);
        if (!v.fits) u.set_unfit(memory, token);
        q[first_output + j] = v.q;
    }
}

__global__ void analyse_tiles(Memory memory, KltBatch batch, KltWave wave) {
    __shared__ AnalysisTile tile;
    const Unit u(batch, wave.units[task_of<&KltUnitTask::first_tile>(wave.units, wave.count, blockIdx.x)]);
    const std::uint32_t local = blockIdx.x - u.task.first_tile;
    const std::uint32_t across = div_up(u.task.most_active, kUnitOutputs);
    const std::uint32_t first_token = local / across * kUnitTokens;
    const std::uint32_t first_output = local % across * kUnitOutputs;
    Sums4x4 own = {};
    for (std::uint32_t channel = 0; channel < u.width(); channel += kChannels) {
        load_step(tile, u, memory, first_token, first_output, channel);
        __syncthreads();
        const std::uint32_t left = u.width() - channel;
        multiply_step(tile, left < kChannels ? left : kChannels, own);
        __syncthreads();
    }
    const std::uint32_t t = threadIdx.x / kAcross * kOwn, o = threadIdx.x % kAcross * kOwn;
    for (std::uint32_t i = 0; i < kOwn; ++i) {
        if (first_token + t + i < u.chunk.tokens)
            quantise_own(u, memory, first_token + t + i, first_output + o, own.sum[i]);
    }
}

// ---- gains

__device__ std::uint64_t coefficient_cost(const CoderTables& tables, unsigned spread_class, std::int32_t q) {
    const std::int32_t magnitude = q < 0 ? -q : q;
    if (spread_class == 0) return std::uint64_t{kKltLostCost} * static_cast<std::uint32_t>(magnitude);
    return value_cost(tables, spread_class, magnitude <= kKltSymmetricCost ? magnitude : q);
}

// The gain with which a token's coefficients cost least, in all lanes.
__device__ std::int16_t cheapest_gain(const CoderTables& tables, const std::int8_t* classes,
                                      std::uint32_t active, const std::int16_t* q) {
    std::uint64_t costs[kKltGainsTried] = {};
    for (std::uint32_t j = lane_id(); j < active; j += kLanes) {
        for (std::int32_t n = 0; n < kKltGainsTried; ++n)
            costs[n] += coefficient_cost(tables, klt_class(classes[j], klt_gain_tried(n)), q[j]);
    }
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

// One warp per token of a unit: the gain that suits it best.
__global__ void choose_gains(Memory memory, KltBatch batch, KltWave wave) {
    const std::uint32_t item = blockIdx.x * kWarps + threadIdx.x / kLanes;
    if (item >= wave.tokens) return;
    const Unit u(batch, wave.units[task_of<&KltUnitTask::first_token>(wave.units, wave.count, item)]);
    const CodedToken t(u, memory, item - u.task.first_token);
    const std::int16_t gain = cheapest_gain(*batch.tables, t.classes, t.active, t.q);
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
    auto* scaled = reinterpret_cast<std::int16_t*>(memory.workspace + u.task.scaled) + u.index(token);
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

cudaError_t launch_klt_quantise(Memory memory, const KltBatch& batch, const KltWave& wave,
                                const RotationTask* rotations, cudaStream_t stream) {
    const Shape per_token = {div_up(wave.tokens, kWarps), kThreads};
    cudaError_t e = launch(take_residuals, per_token, stream, memory, batch, wave, rotations);
    if (e != cudaSuccess) return e;
    e = launch(analyse_tiles, {wave.tiles, kAnalyseThreads}, stream, memory, batch, wave);
    if (e != cudaSuccess) return e;
    e = launch(choose_gains, per_token, stream, memory, batch, wave);
    if (e != cudaSuccess) return e;
    e = launch(level_gains, {wave.count, kLanes}, stream, memory, batch, wave);
    if (e != cudaSuccess) return e;
    return launch(scale_coefficients, per_token, stream, memory, batch, wave);
}

}  // namespace kvcast::kernels::cuda
