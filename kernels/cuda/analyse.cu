// What encoding finds out about planes before it prepares their strips: tiles and scales. The arithmetic is
// the CPU encoder's, operation by operation, so that both write the same bytes: floats are rounded once per
// operation (no contraction), sums are integers, and the few sums of doubles go in the CPU's order.
#include "kernels/cuda/encode_launch.h"
#include "kernels/cuda/moments.cuh"
#include "kernels/cuda/platform.cuh"
#include "kernels/cuda/rows.cuh"
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

// A channel's squares about its mean.
__device__ double squares_about_mean(const Moments& m, std::uint32_t count) {
    const auto total = static_cast<double>(m.sum);
    return static_cast<double>(m.sum_of_squares) - total * total / static_cast<double>(count);
}

// Standard deviation of a plane about its channel means, in all lanes. They share the divisions; the sum of
// doubles is in channel order, as on the CPU.
__device__ double deviation(const EncodePlaneTask& p, const Moments* moments, float scale) {
    const std::uint32_t channels = p.heads * p.channels;
    double sum = 0;
    for (std::uint32_t at = 0; at < channels; at += kLanes) {
        const std::uint32_t own = at + lane_id(), n = channels - at < kLanes ? channels - at : kLanes;
        const double squares = own < channels ? squares_about_mean(moments[own], p.body_tokens) : 0;
        for (std::uint32_t i = 0; i < n; ++i) sum += __shfl_sync(kFullWarp, squares, static_cast<int>(i));
    }
    const auto values = static_cast<double>(std::uint64_t{channels} * p.body_tokens);
    return sqrt((sum > 0.0 ? sum : 0.0) / values) / static_cast<double>(scale);
}

// One warp per plane.
__global__ void choose_scales(Memory memory, const EncodePlaneTask* planes, PlaneChoice* choices) {
    const EncodePlaneTask& p = planes[blockIdx.x];
    PlaneChoice& choice = choices[blockIdx.x];
    if (lane_id() == 0) choice = {0, 0, {128, 0}};
    if (p.lossless || p.body_tokens == 0) return;
    const std::uint32_t largest = *reinterpret_cast<const std::uint32_t*>(memory.workspace + p.largest);
    const bool finite = largest < 0x7f800000u;
    const float scale = moment_scale(largest);
    const double spread =
        scale == 0 ? 0 : deviation(p, reinterpret_cast<const Moments*>(memory.workspace + p.moments), scale);
    const std::uint32_t magnitude = finite ? largest : 0x7f800000u;
    const PlaneScale chosen = choose_scale(finite ? p.relative_step * spread : 0,
                                           std::bit_cast<float>(magnitude), p.least_guard_bits);
    if (lane_id() == 0) choice = {chosen.quantised ? 1u : 0u, chosen.guard_bits, chosen.scale};
}

}  // namespace

cudaError_t launch_analysis(Memory memory, const EncodePlaneTask* planes, Extents n,
                            const RotationTask* rotations, PlaneChoice* choices, cudaStream_t stream) {
    const Shape per_plane = {div_up(n.planes, kThreads), kThreads}, per_tile = {n.tiles, kThreads};
    const Shape per_channel = {div_up(n.channels, kWarps), kThreads};
    cudaError_t e = launch(clear_largest, per_plane, stream, memory, planes, n.planes);
    if (e != cudaSuccess) return e;
    e = launch(load_tiles, per_tile, stream, memory, planes, n.planes, rotations, choices, false);
    if (e != cudaSuccess) return e;
    e = launch(take_moments, per_channel, stream, memory, planes, n.planes, n.channels);
    if (e != cudaSuccess) return e;
    e = launch(choose_scales, {n.planes, kLanes}, stream, memory, planes, choices);
    if (e != cudaSuccess) return e;
    return launch(load_tiles, per_tile, stream, memory, planes, n.planes, rotations, choices, true);
}

}  // namespace kvcast::kernels::cuda
