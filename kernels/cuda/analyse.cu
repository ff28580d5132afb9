// What encoding finds out about planes before it prepares their strips: tiles and scales. The arithmetic is
// the CPU encoder's, operation by operation, so that both write the same bytes: floats are rounded once per
// operation (no contraction), sums are integers, and the few sums of doubles go in the CPU's order.
#include "kernels/cuda/encode_launch.h"
#include "kernels/cuda/moments.cuh"
#include "kernels/cuda/platform.cuh"
#include "kernels/cuda/rows.cuh"
#include "kernels/cuda/short_channels.cuh"
#include "kernels/cuda/tile_values.cuh"
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

// A tile of 32 tokens by 32 slots: stored bits, channel by channel, and the largest magnitude that is in them
// once they are turned back.
__global__ void load_tiles(Memory memory, const EncodePlaneTask* planes, std::uint32_t count,
                           const RotationTask* rotations) {
    __shared__ std::uint32_t first[kStoreTokens][kStoreSlots + 1];
    __shared__ std::uint32_t second[kStoreTokens][kStoreSlots + 1];
    const EncodePlaneTask& p = planes[task_of<&EncodePlaneTask::first_tile>(planes, count, blockIdx.x)];
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

    std::uint32_t largest = 0;  // magnitudes order like their bits, and NaN above infinity
    const auto see = [&](float value) {
        const std::uint32_t magnitude = std::bit_cast<std::uint32_t>(value) & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
    };
    for (std::uint32_t i = threadIdx.x; i < kStoreTokens * kStoreSlots; i += kThreads) {
        const std::uint32_t s = i / kStoreTokens, t = i % kStoreTokens;
        const std::uint32_t token = first_token + t;
        if (first_slot + s >= slots || token >= p.body_tokens) continue;
        const Slot slot = slot_of(first_slot + s, r);
        put_bits(tile_row(memory, p, head, slot.first), p.source, token, first[t][s]);
        if (slot.pair) put_bits(tile_row(memory, p, head, slot.second), p.source, token, second[t][s]);
        if (p.lossless) continue;
        const float x = from_bits(p.source, first[t][s]);
        if (!slot.pair) {
            see(x);
            continue;
        }
        const SinCos angle = reinterpret_cast<const SinCos*>(
            memory.workspace + r->table)[(first_slot + s) * r->columns + p.exact_rows + token];
        const TurnedBack v = turned_back(x, from_bits(p.source, second[t][s]), angle);
        see(v.a);
        see(v.b);
    }
    largest = __reduce_max_sync(kFullWarp, largest);
    if (lane_id() == 0) atomicMax(reinterpret_cast<std::uint32_t*>(memory.workspace + p.largest), largest);
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

__device__ Moments moments_of_short(const float (&values)[kBatchGroups], float scale) {
    std::int32_t sum = 0;
    std::int64_t squares = 0;
    KVCAST_UNROLL(8)
    for (const float x : values) {
        const std::int32_t v = nearest_integer(x * scale);
        sum += v;
        squares += std::int64_t{v} * v;
    }
    return {sum_of_signed(sum), sum_of_long(static_cast<std::uint64_t>(squares))};
}

__device__ KVCAST_APART Moments moments_of_channel(Memory memory, const EncodePlaneTask& p,
                                                   const RotationTask* r, std::uint32_t head,
                                                   std::uint32_t index, float scale) {
    return moments_of(p.body_tokens, scale, TileValues(memory, p, r, head, tile_channel(index, r)));
}

// One warp per duo.
__global__ void take_moments(Memory memory, const EncodePlaneTask* planes, std::uint32_t count,
                             std::uint32_t duos, const RotationTask* rotations) {
    const std::uint32_t item = blockIdx.x * kWarps + threadIdx.x / kLanes;
    if (item >= duos) return;
    const EncodePlaneTask& p = planes[task_of<&EncodePlaneTask::first_duo>(planes, count, item)];
    const float scale = moment_scale(*reinterpret_cast<const std::uint32_t*>(memory.workspace + p.largest));
    if (p.lossless || scale == 0) return;
    const RotationTask* r = p.rotation == kNone ? nullptr : rotations + p.rotation;
    const std::uint32_t local = item - p.first_duo, head = local / duos_of(p), index = local % duos_of(p);
    auto* moments = reinterpret_cast<Moments*>(memory.workspace + p.moments) + head * p.channels;
    if (is_short(p)) {
        const Duo duo = duo_of(p, r, index);
        const DuoValues values(memory, p, r, head, duo);
        const Moments m[2] = {moments_of_short(values.of[0], scale), moments_of_short(values.of[1], scale)};
        if (lane_id() == 0) moments[duo.channel[0]] = m[0];
        if (lane_id() == 0 && duo.count == 2) moments[duo.channel[1]] = m[1];
        return;
    }
    for (std::uint32_t i = 2 * index; i < 2 * index + 2 && i < p.channels; ++i) {
        const Moments m = moments_of_channel(memory, p, r, head, i, scale);
        if (lane_id() == 0) moments[tile_channel(i, r).channel] = m;
    }
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
    const Shape per_duo = {div_up(n.duos, kWarps), kThreads};
    cudaError_t e = launch(clear_largest, per_plane, stream, memory, planes, n.planes);
    if (e != cudaSuccess) return e;
    e = launch(load_tiles, per_tile, stream, memory, planes, n.planes, rotations);
    if (e != cudaSuccess) return e;
    e = launch(take_moments, per_duo, stream, memory, planes, n.planes, n.duos, rotations);
    if (e != cudaSuccess) return e;
    return launch(choose_scales, {n.planes, kLanes}, stream, memory, planes, choices);
}

}  // namespace kvcast::kernels::cuda
