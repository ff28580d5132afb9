// What encoding finds out about planes before it prepares their strips: tiles and scales. The arithmetic is
// the CPU encoder's, operation by operation, so that both write the same bytes: floats are rounded once per
// operation (no contraction), sums are integers, and the few sums of doubles go in the CPU's order.
#include "kernels/cuda/compiler.cuh"
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

using TileBits = std::uint32_t[kStoreTokens][kStoreSlots + 1];

constexpr std::uint32_t kRounds = kStoreTokens / kWarps;  // a warp's tokens, and then its slots, of a tile

// One tile: 32 tokens by 32 slots of a head.
template <Dtype kType>
struct TileLoad {
    const EncodePlaneTask& p;
    const RotationTask* r;
    std::uint32_t head;
    std::uint32_t slots;  // of the head
    std::uint32_t first_slot;
    std::uint32_t first_token;  // of the body

    // Lanes are slots: elements from the plane's rows to shared memory, all of a thread's at once.
    __device__ __forceinline__ void read(TileBits& first, TileBits& second) const {
        const std::uint32_t warp = threadIdx.x / kLanes, own = first_slot + lane_id();
        const Slot slot = slot_of(own < slots ? own : 0, r);
        const std::uint8_t* rows[kRounds];
        KVCAST_UNROLL(8)
        for (std::uint32_t k = 0; k < kRounds; ++k) {
            const std::uint32_t token = first_token + k * kWarps + warp;
            const bool inside = own < slots && token < p.body_tokens;
            rows[k] = inside ? row_of(p.in, p.exact_rows + token) + head * p.in.head_bytes : nullptr;
        }
        std::uint32_t x[kRounds], y[kRounds];
        KVCAST_UNROLL(8)
        for (std::uint32_t k = 0; k < kRounds; ++k) {
            x[k] = rows[k] != nullptr ? element_of(rows[k], kType, slot.first) : 0;
            y[k] = rows[k] != nullptr && slot.pair ? element_of(rows[k], kType, slot.second) : 0;
        }
        KVCAST_UNROLL(8)
        for (std::uint32_t k = 0; k < kRounds; ++k) {
            first[k * kWarps + warp][lane_id()] = x[k];
            second[k * kWarps + warp][lane_id()] = y[k];
        }
    }

    // Lanes are tokens: from shared memory to the tile. The largest magnitude, as bits.
    __device__ __forceinline__ std::uint32_t write(Memory memory, const TileBits& first,
                                                   const TileBits& second) const {
        const std::uint32_t token = first_token + lane_id();
        const auto* angles =
            r == nullptr ? nullptr : reinterpret_cast<const SinCos*>(memory.workspace + r->table);
        std::uint32_t largest = 0;  // magnitudes order like their bits, and NaN above infinity
        const auto see = [&](float value) {
            const std::uint32_t magnitude = std::bit_cast<std::uint32_t>(value) & 0x7fffffffu;
            largest = magnitude > largest ? magnitude : largest;
        };
        KVCAST_UNROLL(4)
        for (std::uint32_t k = 0; k < kRounds; ++k) {
            const std::uint32_t s = k * kWarps + threadIdx.x / kLanes, own = first_slot + s;
            if (own >= slots || token >= p.body_tokens) continue;
            const Slot slot = slot_of(own, r);
            const std::uint32_t x = first[lane_id()][s], y = second[lane_id()][s];
            put_bits(tile_row(memory, p, head, slot.first), kType, token, x);
            if (!slot.pair) {
                see(from_bits(kType, x));
                continue;
            }
            put_bits(tile_row(memory, p, head, slot.second), kType, token, y);
            const SinCos angle = angles[std::uint64_t{own} * r->columns + p.exact_rows + token];
            const TurnedBack v = turned_back(from_bits(kType, x), from_bits(kType, y), angle);
            see(v.a);
            see(v.b);
        }
        return largest;
    }
};

template <Dtype kType>
__device__ __forceinline__ void load_turned_tile(Memory memory, const EncodePlaneTask& p,
                                                 const RotationTask* r, TileBits& first, TileBits& second) {
    const std::uint32_t slots = slots_of(p.channels, r == nullptr ? 0 : r->pairs);
    const std::uint32_t across = div_up(slots, kStoreSlots), down = div_up(p.body_tokens, kStoreTokens);
    const std::uint32_t local = blockIdx.x - p.first_tile;
    const TileLoad<kType> tile = {p,
                                  r,
                                  local / (across * down),
                                  slots,
                                  local % across * kStoreSlots,
                                  local / across % down * kStoreTokens};
    tile.read(first, second);
    __syncthreads();
    const std::uint32_t largest = __reduce_max_sync(kFullWarp, tile.write(memory, first, second));
    if (lane_id() == 0) atomicMax(reinterpret_cast<std::uint32_t*>(memory.workspace + p.largest), largest);
}

template <Dtype kType>
__device__ __forceinline__ void load_tile(Memory memory, const EncodePlaneTask& p,
                                          const RotationTask* rotations, TileBits& first, TileBits& second) {
    if (p.rotation == kNone) {
        load_turned_tile<kType>(memory, p, nullptr, first, second);
        return;
    }
    const RotationTask r = rotations[p.rotation];
    load_turned_tile<kType>(memory, p, &r, first, second);
}

// Stored bits of all planes, channel by channel, and the largest magnitude that is in them once they are
// turned back. Tasks are copied: the compiler would read what it points to again after every store.
__global__ void load_tiles(Memory memory, const EncodePlaneTask* planes, std::uint32_t count,
                           const RotationTask* rotations) {
    __shared__ TileBits first, second;
    const EncodePlaneTask p = planes[task_of<&EncodePlaneTask::first_tile>(planes, count, blockIdx.x)];
    if (p.source == Dtype::kBf16) {
        load_tile<Dtype::kBf16>(memory, p, rotations, first, second);
    } else if (p.source == Dtype::kF16) {
        load_tile<Dtype::kF16>(memory, p, rotations, first, second);
    } else {
        load_tile<Dtype::kF32>(memory, p, rotations, first, second);
    }
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
