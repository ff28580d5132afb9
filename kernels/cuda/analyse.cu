// What encoding finds out about planes before it prepares their strips: tiles and scales. The arithmetic is
// the CPU encoder's, operation by operation, so that both write the same bytes: floats are rounded once per
// operation (no contraction), sums are integers, and the few sums of doubles go in the CPU's order.
#include "kernels/cuda/compiler.cuh"
#include "kernels/cuda/encode_launch.h"
#include "kernels/cuda/load_bands.cuh"
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

constexpr std::uint32_t kTileThreads = 256;
[[maybe_unused]] constexpr std::uint32_t kTileBlocks = 4;  // of threads, at least, at a time
constexpr std::uint32_t kTileWarps = kTileThreads / kLanes;
constexpr std::uint32_t kRounds =
    kStoreTokens / kTileWarps;  // a warp's tokens, and then its slots, of a tile

using TileBits = std::uint32_t[kStoreTokens][kStoreSlots + 1];

// Which tile of all heads a block of threads loads: 64 tokens by 32 slots.
struct TilePlace {
    std::uint32_t slots;  // of a head
    std::uint32_t first_slot;
    std::uint32_t first_token;  // of the body

    __device__ TilePlace(const EncodePlaneTask& p, const RotationTask* r, std::uint32_t index)
        : slots(slots_of(p.channels, r == nullptr ? 0 : r->pairs)) {
        const std::uint32_t across = div_up(slots, kStoreSlots);
        first_slot = index % across * kStoreSlots;
        first_token = index / across * kLoadTokens;
    }
};

// A thread's elements of half a tile as they lie in a plane's rows: lanes are slots. Where they are is found
// out once; heads only differ by a distance.
template <Dtype kType>
class RowElements {
  public:
    __device__ __forceinline__ RowElements(const EncodePlaneTask& p, const RotationTask* r,
                                           const TilePlace& at) {
        const std::uint32_t own = at.first_slot + lane_id();
        const Slot slot = slot_of(own < at.slots ? own : 0, r);
        pair_ = slot.pair;
        partner_ = slot.pair ? (slot.second - slot.first) * dtype_bytes(kType) : 0;
        KVCAST_UNROLL(4)
        for (std::uint32_t k = 0; k < kRounds; ++k) {
            const std::uint32_t token = at.first_token + k * kTileWarps + threadIdx.x / kLanes;
            const bool inside = own < at.slots && token < p.body_tokens;
            first_[k] =
                inside ? row_of(p.in, p.exact_rows + token) + slot.first * dtype_bytes(kType) : nullptr;
        }
    }

    // All loads of a head at once.
    __device__ __forceinline__ void load(std::uint64_t head_offset) {
        KVCAST_UNROLL(4)
        for (std::uint32_t k = 0; k < kRounds; ++k) {
            const bool inside = first_[k] != nullptr;
            x_[k] = inside ? element_of(first_[k] + head_offset, kType, 0) : 0;
            y_[k] = inside && pair_ ? element_of(first_[k] + head_offset + partner_, kType, 0) : 0;
        }
    }

    __device__ __forceinline__ void put(TileBits& first, TileBits& second) const {
        KVCAST_UNROLL(4)
        for (std::uint32_t k = 0; k < kRounds; ++k) {
            const std::uint32_t token = k * kTileWarps + threadIdx.x / kLanes;
            first[token][lane_id()] = x_[k];
            second[token][lane_id()] = y_[k];
        }
    }

  private:
    const std::uint8_t* first_[kRounds];  // of head 0
    std::uint32_t partner_;               // bytes from there to the other element of a pair
    bool pair_;
    std::uint32_t x_[kRounds], y_[kRounds];
};

// A thread's elements of half a tile as they lie in the workspace: lanes are tokens. Angles are those of all
// heads.
template <Dtype kType>
class TileElements {
  public:
    __device__ __forceinline__ TileElements(Memory memory, const EncodePlaneTask& p, const RotationTask* r,
                                            const TilePlace& at) {
        const std::uint32_t token = at.first_token + lane_id();
        const auto* angles =
            r == nullptr ? nullptr : reinterpret_cast<const SinCos*>(memory.workspace + r->table);
        partner_ = r == nullptr ? 0 : std::uint64_t{r->partner} * p.tile_stride;
        KVCAST_UNROLL(4)
        for (std::uint32_t k = 0; k < kRounds; ++k) {
            const std::uint32_t own = at.first_slot + k * kTileWarps + threadIdx.x / kLanes;
            out_[k] = nullptr;
            pair_[k] = false;
            if (own >= at.slots || token >= tile_tokens(p)) continue;
            const Slot slot = slot_of(own, r);
            out_[k] = tile_row(memory, p, 0, slot.first) + tile_place(p, token) * dtype_bytes(kType);
            pair_[k] = slot.pair;
            if (slot.pair) angle_[k] = angles[std::uint64_t{own} * r->columns + p.exact_rows + token];
        }
    }

    // From shared memory to a head's tile.
    __device__ __forceinline__ void write(const TileBits& first, const TileBits& second,
                                          std::uint64_t head_offset) {
        KVCAST_UNROLL(4)
        for (std::uint32_t k = 0; k < kRounds; ++k) {
            if (out_[k] == nullptr) continue;
            const std::uint32_t s = k * kTileWarps + threadIdx.x / kLanes;
            std::byte* const out = out_[k] + head_offset;
            const std::uint32_t x = first[lane_id()][s];
            put_bits(out, kType, 0, x);
            if (!pair_[k]) {
                see(from_bits(kType, x));
                continue;
            }
            const std::uint32_t y = second[lane_id()][s];
            put_bits(out, kType, partner_, y);
            const TurnedBack v = turned_back(from_bits(kType, x), from_bits(kType, y), angle_[k]);
            see(v.a);
            see(v.b);
        }
    }

    // The largest magnitude so far, as bits.
    __device__ std::uint32_t largest() const { return largest_; }

  private:
    __device__ __forceinline__ void see(float value) {
        const std::uint32_t magnitude = std::bit_cast<std::uint32_t>(value) & 0x7fffffffu;
        largest_ = magnitude > largest_ ? magnitude : largest_;
    }

    std::byte* out_[kRounds];  // of head 0
    std::uint64_t partner_;    // elements from there to the other one of a pair
    bool pair_[kRounds];
    SinCos angle_[kRounds] = {};
    std::uint32_t largest_ = 0;  // magnitudes order like their bits, and NaN above infinity
};

// ---- the same where two neighbours are 32 bits that can be read at once, and two tokens 32 that can be
// written

constexpr std::uint32_t kPairRounds = kLoadTokens / 2 / (2 * kTileWarps);

// Two by two, slots lie next to each other, at addresses that are multiples of 4.
template <Dtype kType>
__device__ bool has_paired_slots(const EncodePlaneTask& p, const RotationTask* r) {
    if (dtype_bytes(kType) != 2 || p.channels % 2 != 0 || is_short(p)) return false;
    const std::uint64_t addresses = reinterpret_cast<std::uintptr_t>(p.in.rows) | p.in.row_bytes |
                                    p.in.head_bytes | (p.in.pages == nullptr ? 0 : p.in.page_bytes);
    if (addresses % 4 != 0) return false;
    return r == nullptr || (r->pair_step == 1 && (r->first_channel | r->partner | r->pairs) % 2 == 0);
}

// As RowElements; a lane has two slots, and two tokens of them a round.
class PairedRows {
  public:
    __device__ __forceinline__ PairedRows(const EncodePlaneTask& p, const RotationTask* r,
                                          const TilePlace& at) {
        const std::uint32_t own = at.first_slot + own_slot();
        const Slot slot = slot_of(own < at.slots ? own : 0, r);
        turned_ = r != nullptr;
        pair_ = slot.pair;
        partner_ = slot.pair ? (slot.second - slot.first) * 2 : 0;
        KVCAST_UNROLL(4)
        for (std::uint32_t i = 0; i < 2 * kPairRounds; ++i) {
            const std::uint32_t token = at.first_token + 2 * token_pair(i / 2) + i % 2;
            const bool inside = own < at.slots && token < p.body_tokens;
            first_[i] = inside ? row_of(p.in, p.exact_rows + token) + slot.first * 2 : nullptr;
        }
    }

    __device__ __forceinline__ void load(std::uint64_t head_offset) {
        KVCAST_UNROLL(4)
        for (std::uint32_t i = 0; i < 2 * kPairRounds; ++i) {
            const bool inside = first_[i] != nullptr;
            x_[i] = inside ? word_of(first_[i] + head_offset) : 0;
            y_[i] = inside && pair_ ? word_of(first_[i] + head_offset + partner_) : 0;
        }
    }

    // Tiles of slots by pairs of tokens.
    __device__ __forceinline__ void put(TileBits& first, TileBits& second) const {
        KVCAST_UNROLL(2)
        for (std::uint32_t k = 0; k < kPairRounds; ++k) {
            put_pairs(first, token_pair(k), x_[2 * k], x_[2 * k + 1]);
            if (turned_) put_pairs(second, token_pair(k), y_[2 * k], y_[2 * k + 1]);
        }
    }

  private:
    __device__ static std::uint32_t own_slot() { return lane_id() % 16 * 2; }
    __device__ static std::uint32_t token_pair(std::uint32_t round) {
        return (round * kTileWarps + threadIdx.x / kLanes) * 2 + lane_id() / 16;
    }
    __device__ static std::uint32_t word_of(const std::uint8_t* at) {
        return *reinterpret_cast<const std::uint32_t*>(at);
    }
    __device__ static void put_pairs(TileBits& tile, std::uint32_t pair, std::uint32_t a, std::uint32_t b) {
        tile[own_slot()][pair] = (a & 0xffffu) | b << 16;
        tile[own_slot() + 1][pair] = a >> 16 | (b & 0xffff0000u);
    }

    const std::uint8_t* first_[2 * kPairRounds];  // of head 0
    std::uint32_t partner_;
    bool turned_;
    bool pair_;
    std::uint32_t x_[2 * kPairRounds], y_[2 * kPairRounds];
};

// As TileElements; lanes are pairs of tokens. What is written behind the last token is within tile_stride.
template <Dtype kType>
class PairedTile {
  public:
    __device__ __forceinline__ PairedTile(Memory memory, const EncodePlaneTask& p, const RotationTask* r,
                                          const TilePlace& at) {
        const std::uint32_t token = at.first_token + 2 * lane_id();
        partner_ = r == nullptr ? 0 : std::uint64_t{r->partner} * p.tile_stride * 2;
        KVCAST_UNROLL(4)
        for (std::uint32_t k = 0; k < kRounds; ++k) {
            const std::uint32_t own = at.first_slot + k * kTileWarps + threadIdx.x / kLanes;
            out_[k] = nullptr;
            pair_[k] = false;
            if (own >= at.slots || token >= p.body_tokens) continue;
            const Slot slot = slot_of(own, r);
            out_[k] = tile_row(memory, p, 0, slot.first) + token * 2;
            pair_[k] = slot.pair;
            if (!slot.pair) continue;
            const auto* angles = reinterpret_cast<const std::uint32_t*>(memory.workspace + r->table) +
                                 std::uint64_t{own} * r->columns + p.exact_rows + token;
            angle_[k][0] = angles[0];
            angle_[k][1] = token + 1 < p.body_tokens ? angles[1] : 0;
        }
    }

    __device__ __forceinline__ void write(const TileBits& first, const TileBits& second,
                                          std::uint64_t head_offset) {
        KVCAST_UNROLL(4)
        for (std::uint32_t k = 0; k < kRounds; ++k) {
            if (out_[k] == nullptr) continue;
            const std::uint32_t s = k * kTileWarps + threadIdx.x / kLanes;
            std::byte* const out = out_[k] + head_offset;
            const std::uint32_t x = first[s][lane_id()];
            *reinterpret_cast<std::uint32_t*>(out) = x;
            if (!pair_[k]) {
                see(from_bits(kType, x & 0xffffu));
                see(from_bits(kType, x >> 16));
                continue;
            }
            const std::uint32_t y = second[s][lane_id()];
            *reinterpret_cast<std::uint32_t*>(out + partner_) = y;
            see_turned(x & 0xffffu, y & 0xffffu, angle_[k][0]);
            see_turned(x >> 16, y >> 16, angle_[k][1]);
        }
    }

    __device__ std::uint32_t largest() const { return largest_; }

  private:
    // Of a pair turned back, as turned_back() has it.
    __device__ __forceinline__ void see_turned(std::uint32_t x_bits, std::uint32_t y_bits,
                                               std::uint32_t angle) {
        constexpr float unit = 1.0f / (1 << kTrigBits);
        const float x = from_bits(kType, x_bits), y = from_bits(kType, y_bits);
        const float cos = float_of_low(angle), sin = float_of_low(angle >> 16);
        see((x * cos + y * sin) * unit);
        see((y * cos - x * sin) * unit);
    }
    __device__ __forceinline__ void see(float value) {
        const std::uint32_t magnitude = std::bit_cast<std::uint32_t>(value) & 0x7fffffffu;
        largest_ = magnitude > largest_ ? magnitude : largest_;
    }

    std::byte* out_[kRounds];  // of head 0
    std::uint64_t partner_;    // bytes from there to the other element of a pair
    bool pair_[kRounds];
    std::uint32_t angle_[kRounds][2] = {};
    std::uint32_t largest_ = 0;
};

// The next head's elements are on their way while those of the present one are written.
template <Dtype kType, typename Rows, typename Tile>
__device__ __forceinline__ void load_heads(Memory memory, const EncodePlaneTask& p, const RotationTask* r,
                                           const TilePlace& place, TileBits& first, TileBits& second) {
    Rows in(p, r, place);
    in.load(0);
    Tile out(memory, p, r, place);
    const std::uint64_t head_bytes = std::uint64_t{p.channels} * p.tile_stride * dtype_bytes(kType);
    KVCAST_UNROLL(1)
    for (std::uint32_t head = 0; head < p.heads; ++head) {
        in.put(first, second);
        __syncthreads();
        if (head + 1 < p.heads) in.load((head + 1) * p.in.head_bytes);
        out.write(first, second, head * head_bytes);
        __syncthreads();
    }
    const std::uint32_t largest = __reduce_max_sync(kFullWarp, out.largest());
    if (lane_id() == 0) atomicMax(reinterpret_cast<std::uint32_t*>(memory.workspace + p.largest), largest);
}

template <Dtype kType>
__device__ __forceinline__ void load_turned_tile(Memory memory, const EncodePlaneTask& p,
                                                 const RotationTask* r, TileBits& first, TileBits& second) {
    TilePlace place(p, r, blockIdx.x - p.first_tile);
    if (has_paired_slots<kType>(p, r)) {
        load_heads<kType, PairedRows, PairedTile<kType>>(memory, p, r, place, first, second);
        return;
    }
    KVCAST_UNROLL(1)
    for (std::uint32_t half = 0; half < kLoadTokens / kStoreTokens; ++half, place.first_token += kStoreTokens)
        load_heads<kType, RowElements<kType>, TileElements<kType>>(memory, p, r, place, first, second);
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
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    load_tiles(Memory memory, const EncodePlaneTask* planes, std::uint32_t count,
               const RotationTask* rotations) {
    __shared__ TileBits first, second;
    const EncodePlaneTask p = planes[task_of_warp<&EncodePlaneTask::first_tile>(planes, count, blockIdx.x)];
    if (p.source == Dtype::kBf16) {
        load_tile<Dtype::kBf16>(memory, p, rotations, first, second);
    } else if (p.source == Dtype::kF16) {
        load_tile<Dtype::kF16>(memory, p, rotations, first, second);
    } else {
        load_tile<Dtype::kF32>(memory, p, rotations, first, second);
    }
}

// The same of planes that have bands.
__global__ void __launch_bounds__(kBandThreads, kBandBlocks)
    load_bands(Memory memory, const EncodePlaneTask* planes, std::uint32_t count,
               const RotationTask* rotations) {
    const EncodePlaneTask& p = planes[task_of_warp<&EncodePlaneTask::first_band>(planes, count, blockIdx.x)];
    const std::uint32_t index = blockIdx.x - p.first_band;
    auto* const of_plane = reinterpret_cast<std::uint32_t*>(memory.workspace + p.largest);
    const Band band(memory, p, p.rotation == kNone ? nullptr : rotations + p.rotation, index);
    band.load(p.in, p.exact_rows, index / bands_of(p));
    const std::uint32_t largest = __reduce_max_sync(kFullWarp, band.store());
    if (lane_id() == 0) atomicMax(of_plane, largest);
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

__device__ __forceinline__ void take_short_moments(Memory memory, const EncodePlaneTask& p,
                                                   const RotationTask* r, const DuoRun& run, float scale) {
    const Duo duo = duo_of(p, r, run.index);
    const DuoSource source(memory, p, r, duo);
    // Both are powers of two: where a product of one of them is not exact, that of both is far below 1.
    if (source.turned()) scale *= 1 / DuoSource::kTurnedUnit;
    auto* out = reinterpret_cast<Moments*>(memory.workspace + p.moments);
    const std::uint32_t channels = p.channels, end = uniform(run.end_head);
    std::uint32_t head = uniform(run.first_head);
    DuoSource::Stored next = source.stored(head);
    KVCAST_UNROLL(1)
    for (; head < end; ++head) {
        const auto values = source.long_values(next);
        if (head + 1 < end) next = source.stored(head + 1);
        const Moments m[2] = {moments_of_short(values.of[0], scale), moments_of_short(values.of[1], scale)};
        Moments* of_head = out + std::uint64_t{head} * channels;
        if (lane_id() == 0) of_head[duo.channel[0]] = m[0];
        if (lane_id() == 0 && duo.count == 2) of_head[duo.channel[1]] = m[1];
    }
}

// One warp per run of duos, the last one first: what has been written last is still in the cache.
__global__ void take_moments(Memory memory, const EncodePlaneTask* planes, std::uint32_t count,
                             std::uint32_t runs, const RotationTask* rotations) {
    const std::uint32_t before = blockIdx.x * kWarps + warp_id();
    if (before >= runs) return;
    const std::uint32_t item = runs - 1 - before;
    const EncodePlaneTask& p = planes[task_of_warp<&EncodePlaneTask::first_duo>(planes, count, item)];
    const float scale = moment_scale(*reinterpret_cast<const std::uint32_t*>(memory.workspace + p.largest));
    if (p.lossless || scale == 0) return;
    const RotationTask* r = p.rotation == kNone ? nullptr : rotations + p.rotation;
    const DuoRun run(p, item - p.first_duo);
    if (uniform(is_short(p) ? 1 : 0) != 0) {
        take_short_moments(memory, p, r, run, scale);
        return;
    }
    auto* moments = reinterpret_cast<Moments*>(memory.workspace + p.moments);
    for (std::uint32_t head = run.first_head; head < run.end_head; ++head) {
        for (std::uint32_t i = 2 * run.index; i < 2 * run.index + 2 && i < p.channels; ++i) {
            const Moments m = moments_of_channel(memory, p, r, head, i, scale);
            if (lane_id() == 0) moments[std::uint64_t{head} * p.channels + tile_channel(i, r).channel] = m;
        }
    }
}

// A channel's squares about its mean.
__device__ double squares_about_mean(const Moments& m, std::uint32_t count) {
    const auto total = static_cast<double>(m.sum);
    return static_cast<double>(m.sum_of_squares) - total * total / static_cast<double>(count);
}

constexpr std::uint32_t kScaleThreads = 256;    // of a plane
constexpr std::uint32_t kScaleChannels = 1024;  // that they take at once

// Standard deviation of a plane about its channel means, in the first warp. Threads share the loads and the
// divisions; the sum of doubles is in channel order, as on the CPU.
__device__ double deviation(const EncodePlaneTask& p, const Moments* moments, float scale) {
    __shared__ double squares[kScaleChannels];
    const std::uint32_t channels = p.heads * p.channels;
    double sum = 0;
    for (std::uint32_t at = 0; at < channels; at += kScaleChannels) {
        const std::uint32_t n = channels - at < kScaleChannels ? channels - at : kScaleChannels;
        KVCAST_UNROLL(4)
        for (std::uint32_t i = threadIdx.x; i < n; i += kScaleThreads)
            squares[i] = squares_about_mean(moments[at + i], p.body_tokens);
        __syncthreads();
        if (threadIdx.x < kLanes) {
            KVCAST_UNROLL(16)
            for (std::uint32_t i = 0; i < n; ++i) sum += squares[i];
        }
        __syncthreads();
    }
    const auto values = static_cast<double>(std::uint64_t{channels} * p.body_tokens);
    return sqrt((sum > 0.0 ? sum : 0.0) / values) / static_cast<double>(scale);
}

// One block of threads per plane.
__global__ void choose_scales(Memory memory, const EncodePlaneTask* planes, PlaneChoice* choices) {
    const EncodePlaneTask& p = planes[blockIdx.x];
    PlaneChoice& choice = choices[blockIdx.x];
    if (threadIdx.x == 0) choice = {0, 0, {128, 0}};
    if (p.lossless || p.body_tokens == 0) return;
    const std::uint32_t largest = *reinterpret_cast<const std::uint32_t*>(memory.workspace + p.largest);
    const bool finite = largest < 0x7f800000u;
    const float scale = moment_scale(largest);
    const double spread =
        scale == 0 ? 0 : deviation(p, reinterpret_cast<const Moments*>(memory.workspace + p.moments), scale);
    if (threadIdx.x != 0) return;
    const std::uint32_t magnitude = finite ? largest : 0x7f800000u;
    const PlaneScale chosen = choose_scale(finite ? p.relative_step * spread : 0,
                                           std::bit_cast<float>(magnitude), p.least_guard_bits);
    choice = {chosen.quantised ? 1u : 0u, chosen.guard_bits, chosen.scale};
}

}  // namespace

cudaError_t launch_analysis(Memory memory, const EncodePlaneTask* planes, Extents n,
                            const RotationTask* rotations, PlaneChoice* choices, cudaStream_t stream) {
    const Shape per_plane = {div_up(n.planes, kThreads), kThreads}, per_tile = {n.tiles, kTileThreads};
    const Shape per_band = {n.bands, kBandThreads, Band::kSharedBytes};
    const Shape per_run = {div_up(n.duo_runs, kWarps), kThreads};
    cudaError_t e = launch(clear_largest, per_plane, stream, memory, planes, n.planes);
    if (e != cudaSuccess) return e;
    e = launch(load_tiles, per_tile, stream, memory, planes, n.planes, rotations);
    if (e != cudaSuccess) return e;
    e = launch(load_bands, per_band, stream, memory, planes, n.planes, rotations);
    if (e != cudaSuccess) return e;
    e = launch(take_moments, per_run, stream, memory, planes, n.planes, n.duo_runs, rotations);
    if (e != cudaSuccess) return e;
    return launch(choose_scales, {n.planes, kScaleThreads}, stream, memory, planes, choices);
}

}  // namespace kvcast::kernels::cuda
