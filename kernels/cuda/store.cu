// Integer RoPE, conversion and the store to contiguous or paged rows. FORMAT.md, sections 6 and 7.3.
//
// A block of threads stores a tile: 256 or 128 tokens of some heads, and of each head 32 pairs of channels
// that RoPE turns or 64 channels that it leaves alone. States come channel by channel in the order of
// body_index() (delta, lossless) or token-major (klt); rows are token-major. Where both are 16-bit elements
// that lie as they usually do, threads take neighbours on both sides; all else goes element by element.
#include "kernels/cuda/launch.h"
#include "kernels/cuda/pack.cuh"
#include "kernels/cuda/platform.cuh"
#include "kernels/cuda/rows.cuh"

namespace kvcast::kernels::cuda {
namespace {

constexpr std::uint32_t kThreads = 512;
static_assert(kThreads / kLanes * 2 == kTilePairs);  // two slots a warp
constexpr std::uint32_t kRotationThreads = 256;
constexpr std::uint32_t kRotationBlocks = 32;  // of a task

__global__ void fill_rotations(Memory memory, const RotationTask* tasks) {
    const RotationTask task = tasks[blockIdx.x / kRotationBlocks];
    const auto* frequencies = reinterpret_cast<const std::uint64_t*>(memory.image + task.frequencies);
    auto* table = reinterpret_cast<SinCos*>(memory.workspace + task.table);
    const std::uint32_t first = blockIdx.x % kRotationBlocks * kRotationThreads + threadIdx.x;
    for (std::uint32_t i = first; i < task.pairs * task.columns; i += kRotationBlocks * kRotationThreads) {
        const std::uint32_t pair = i / task.columns, column = i % task.columns;
        table[pair * task.pair_stride + column * task.column_stride] =
            sin_cos((task.first + column) * frequencies[pair]);
    }
}

// One tile's place in its task.
struct Tile {
    std::uint32_t first_token;  // of the task
    std::uint32_t tokens;
    bool turned;
    std::uint32_t first;  // pair, or channel among those that are not turned
    std::uint32_t count;
    std::uint32_t first_head;
    std::uint32_t end_head;
};

__device__ Tile tile_of(const StoreTask& task, std::uint32_t local) {
    const std::uint32_t across = tiles_across(task), turned = div_up(task.pairs, kTilePairs);
    const std::uint32_t runs = div_up(task.heads, kTileHeads);
    const std::uint32_t column = local % across, run = local / across % runs;
    Tile t = {};
    t.first_token = local / across / runs * tile_tokens(task);
    t.tokens = lesser(tile_tokens(task), task.tokens - t.first_token);
    t.turned = column < turned;
    t.first = t.turned ? column * kTilePairs : (column - turned) * kTileSingles;
    t.count = t.turned ? lesser(kTilePairs, task.pairs - t.first)
                       : lesser(kTileSingles, singles_of(task) - t.first);
    t.first_head = run * kTileHeads;
    t.end_head = lesser(t.first_head + kTileHeads, task.heads);
    return t;
}

// The rows and positions of a tile's tokens, in shared memory.
struct TileRows {
    std::uint8_t* row[kBodyUnit];  // of head 0
    std::uint32_t position[kBodyUnit];
};

__device__ void find_rows(TileRows& rows, const StoreTask& task, const Tile& tile, Memory memory) {
    const std::uint32_t t = threadIdx.x;
    if (t < tile.tokens) {
        const std::uint32_t token = tile.first_token + t;
        rows.position[t] = task.list
                               ? reinterpret_cast<const std::uint32_t*>(memory.image + task.token_list)[token]
                               : task.first_token + token;
        rows.row[t] = row_of(task.out, rows.position[t]);
    }
    __syncthreads();
}

// Angles of a tile's pairs; null where nothing is turned.
struct Angles {
    const SinCos* table = nullptr;
    std::uint32_t pair_stride = 0;
    std::uint32_t column_stride = 0;

    __device__ SinCos at(std::uint32_t pair, std::uint32_t position) const {
        return table[pair * pair_stride + position * column_stride];
    }
};

__device__ Angles angles_of(const RotationTask* rotation, Memory memory) {
    if (rotation == nullptr) return {};
    return {reinterpret_cast<const SinCos*>(memory.workspace + rotation->table), rotation->pair_stride,
            rotation->columns == 1 ? 0 : rotation->column_stride};
}

// The slot of a tile's pair or single channel.
__device__ Slot slot_in(const Tile& tile, const RotationTask* rotation, std::uint32_t index) {
    const std::uint32_t pairs = rotation == nullptr ? 0 : rotation->pairs;
    return slot_of(tile.turned ? tile.first + index : pairs + tile.first + index, rotation);
}

// ---- element by element

class Elements {
  public:
    __device__ Elements(const StoreTask& task, std::uint32_t head, Memory memory)
        : task_(task),
          source_(memory.workspace + task.source +
                  head * task.head_stride * element_bytes(task.exact, task.from)) {}

    __device__ std::uint32_t element(std::uint32_t channel, std::uint32_t token) const {
        const std::uint64_t i = std::uint64_t{channel} * task_.channel_stride +
                                std::uint64_t{task_.octets ? body_index(token) : token} * task_.token_stride;
        if (task_.exact && task_.from == Dtype::kF32)
            return reinterpret_cast<const std::uint32_t*>(source_)[i];
        return reinterpret_cast<const std::uint16_t*>(source_)[i];
    }

    __device__ std::uint32_t plain(std::uint32_t bits) const {
        if (!task_.exact) return to_bits(task_.to, value_of(static_cast<std::int16_t>(bits), task_.scale));
        return task_.from == task_.to ? bits : to_bits(task_.to, from_bits(task_.from, bits));
    }

    // Both elements of a pair, turned.
    __device__ void turn(std::uint32_t& x, std::uint32_t& y, SinCos angle) const {
        if (task_.exact) {
            const float fx = from_bits(task_.from, x), fy = from_bits(task_.from, y);
            x = to_bits(task_.to, rotate_exact(fx, angle.cos, fy, -angle.sin));
            y = to_bits(task_.to, rotate_exact(fy, angle.cos, fx, angle.sin));
            return;
        }
        const Rotated v = rotate(static_cast<std::int16_t>(x), static_cast<std::int16_t>(y), angle);
        x = to_bits(task_.to, value_of(v.a, task_.scale));
        y = to_bits(task_.to, value_of(v.b, task_.scale));
    }

  private:
    const StoreTask& task_;
    const std::byte* source_;
};

__device__ void store_elements(const StoreTask& task, std::uint32_t head, const Tile& tile,
                               const RotationTask* rotation, const TileRows& rows, Memory memory) {
    const Elements elements(task, head, memory);
    const Angles angles = angles_of(rotation, memory);
    for (std::uint32_t i = threadIdx.x; i < tile.tokens * tile.count; i += kThreads) {
        const std::uint32_t t = i / tile.count, s = i % tile.count, token = tile.first_token + t;
        const Slot slot = slot_in(tile, rotation, s);
        auto* row = reinterpret_cast<std::byte*>(rows.row[t] + head * task.out.head_bytes);
        std::uint32_t a = elements.element(slot.first, token);
        if (!slot.pair) {
            put_bits(row, task.to, slot.first, elements.plain(a));
            continue;
        }
        std::uint32_t b = elements.element(slot.second, token);
        elements.turn(a, b, angles.at(tile.first + s, rows.position[t]));
        put_bits(row, task.to, slot.first, a);
        put_bits(row, task.to, slot.second, b);
    }
}

// ---- by words of two neighbours

// Stored bits of the output's own type.
struct StoredBits {
    __device__ __forceinline__ std::uint32_t operator()(std::int32_t low, std::int32_t high) const {
        return halves(low, high);
    }
};

// A tile on its way from channels to tokens, in words of two neighbouring channels: first those of first
// channels, then the others. Two words more, so that rows are aligned and few tokens share a bank.
constexpr std::uint32_t kPitch = kTilePairs + 2;
struct alignas(16) Turning {
    std::uint32_t words[kBodyUnit][kPitch];
};

struct WordPlace {
    const std::uint16_t* source;  // of head 0
    std::uint32_t stride;         // from channel to channel, or from token to token
    std::uint32_t first_channel;  // of the tile's first slot
    std::uint32_t partner;  // from a pair's first channel to its second; of channels that are not turned,
                            // half of the tile's
};

// Of head 0.
__device__ WordPlace word_place(const StoreTask& task, const Tile& tile, const RotationTask* rotation,
                                Memory memory) {
    return {reinterpret_cast<const std::uint16_t*>(memory.workspace + task.source),
            task.way == StoreWay::kOctets ? task.channel_stride : task.token_stride,
            slot_in(tile, rotation, 0).first, tile.turned ? rotation->partner : kTileSingles / 2};
}

__device__ __forceinline__ std::uint32_t load_pair(const std::uint16_t* at) {
    return *reinterpret_cast<const std::uint32_t*>(at);
}

// Whether the channel that is `slot` or, of channels that are not turned, half a tile further, is of the
// tile.
__device__ __forceinline__ bool has_second(const Tile& tile, std::uint32_t slot) {
    return tile.turned || slot + kTileSingles / 2 < tile.count;
}

// Both channels of two neighbouring slots at a token, as output bits: words of two first channels, and of two
// second ones.
struct SlotWords {
    std::uint32_t first;
    std::uint32_t second;
};

template <bool Turned, typename Values>
__device__ __forceinline__ SlotWords slot_words(const Values& values, std::int32_t x0, std::int32_t x1,
                                                std::int32_t y0, std::int32_t y1, SinCos angle0,
                                                SinCos angle1) {
    if constexpr (Turned) {
        const Rotated v = rotate(x0, y0, angle0), w = rotate(x1, y1, angle1);
        return {values(v.a, w.a), values(v.b, w.b)};
    }
    return {values(x0, x1), values(y0, y1)};
}

// What a thread takes of an octet tile: of two neighbouring slots its lane's eight tokens. Its angles are
// those of all heads.
template <bool Turned>
class OwnOctets {
  public:
    __device__ OwnOctets(const Tile& tile, const WordPlace& place, const Angles& angles, const TileRows& rows)
        : slot_(threadIdx.x / kLanes * 2), taken_(slot_ < tile.count), both_(has_second(tile, slot_)) {
        if (!taken_) return;
        offset_ =
            std::uint64_t{place.first_channel + slot_} * place.stride + tile.first_token + lane_id() * 8;
        if constexpr (Turned) {
            KVCAST_UNROLL(8)
            for (std::uint32_t g = 0; g < 8; ++g) {
                const std::uint32_t token = lesser(g * kLanes + lane_id(), tile.tokens - 1);
                for (std::uint32_t i = 0; i < 2; ++i)
                    angle_[i][g] = angles.at(tile.first + slot_ + i, rows.position[token]);
            }
        }
    }

    // Sends for a head's elements.
    __device__ __forceinline__ void load(const std::uint16_t* source, const WordPlace& place) {
        if (!taken_) return;
        const auto* at = source + offset_;
        const std::uint64_t partner = std::uint64_t{place.partner} * place.stride;
        KVCAST_UNROLL(2)
        for (std::uint32_t i = 0; i < 2; ++i, at += place.stride) {
            first_[i] = *reinterpret_cast<const uint4*>(at);
            if (both_) second_[i] = *reinterpret_cast<const uint4*>(at + partner);
        }
    }

    template <typename Values>
    __device__ __forceinline__ void turn(Turning& turning, const Values& values) const {
        if (!taken_) return;
        const std::uint32_t x0[4] = {first_[0].x, first_[0].y, first_[0].z, first_[0].w};
        const std::uint32_t x1[4] = {first_[1].x, first_[1].y, first_[1].z, first_[1].w};
        const std::uint32_t y0[4] = {second_[0].x, second_[0].y, second_[0].z, second_[0].w};
        const std::uint32_t y1[4] = {second_[1].x, second_[1].y, second_[1].z, second_[1].w};
        std::uint32_t* out = turning.words[lane_id()] + slot_ / 2;
        KVCAST_UNROLL(8)
        for (std::uint32_t g = 0; g < 8; ++g) {
            const std::uint32_t w = g / 2;
            const SlotWords words =
                g % 2 == 0 ? slot_words<Turned>(values, low_half(x0[w]), low_half(x1[w]), low_half(y0[w]),
                                                low_half(y1[w]), angle_[0][g], angle_[1][g])
                           : slot_words<Turned>(values, high_half(x0[w]), high_half(x1[w]), high_half(y0[w]),
                                                high_half(y1[w]), angle_[0][g], angle_[1][g]);
            out[g * kLanes * kPitch] = words.first;
            out[g * kLanes * kPitch + kTilePairs / 2] = words.second;
        }
    }

  private:
    std::uint32_t slot_;
    bool taken_;
    bool both_;
    std::uint64_t offset_ = 0;
    SinCos angle_[2][8] = {};
    uint4 first_[2] = {};
    uint4 second_[2] = {};
};

// Tokens of a head, four channels of a token by a thread.
__device__ void write_tile(const Turning& turning, const Tile& tile, const WordPlace& place,
                           const TileRows& rows, std::uint64_t head_offset) {
    constexpr std::uint32_t per_row = kTilePairs / 2;
    const std::uint32_t part = threadIdx.x % per_row, second = part / (per_row / 2);
    const std::uint32_t slot = part % (per_row / 2) * 4;
    if (slot >= tile.count || (second != 0 && !has_second(tile, slot))) return;
    const std::uint64_t offset =
        head_offset + (place.first_channel + slot + second * place.partner) * sizeof(std::uint16_t);
    KVCAST_UNROLL(4)
    for (std::uint32_t t = threadIdx.x / per_row; t < tile.tokens; t += kThreads / per_row) {
        const auto* words = reinterpret_cast<const uint2*>(turning.words[t]) + part;
        *reinterpret_cast<uint2*>(rows.row[t] + offset) = *words;
    }
}

__device__ __forceinline__ void put_pair(std::uint8_t* row, std::uint32_t channel, std::uint32_t word) {
    *reinterpret_cast<std::uint32_t*>(row + channel * sizeof(std::uint16_t)) = word;
}

// Rows on both sides: a thread takes two slots of a token, of all heads of the tile.
template <bool Turned, typename Values>
__device__ void store_slots(const StoreTask& task, const Tile& tile, const WordPlace& first,
                            const Angles& angles, const TileRows& rows, const Values& values) {
    const std::uint32_t s = threadIdx.x % (kTilePairs / 2) * 2;
    if (s >= tile.count) return;
    const bool both = has_second(tile, s);
    for (std::uint32_t t = threadIdx.x / (kTilePairs / 2); t < tile.tokens;
         t += kThreads / (kTilePairs / 2)) {
        SinCos angle[2] = {};
        if constexpr (Turned) {
            for (std::uint32_t i = 0; i < 2; ++i) angle[i] = angles.at(tile.first + s + i, rows.position[t]);
        }
        const auto* at = first.source + tile.first_head * task.head_stride +
                         std::uint64_t{tile.first_token + t} * first.stride + first.first_channel + s;
        std::uint8_t* row = rows.row[t] + tile.first_head * task.out.head_bytes;
        KVCAST_UNROLL(4)
        for (std::uint32_t head = tile.first_head; head < tile.end_head; ++head) {
            const std::uint32_t x = load_pair(at), y = both ? load_pair(at + first.partner) : 0u;
            const SlotWords words = slot_words<Turned>(values, low_half(x), high_half(x), low_half(y),
                                                       high_half(y), angle[0], angle[1]);
            put_pair(row, first.first_channel + s, words.first);
            if (both) put_pair(row, first.first_channel + s + first.partner, words.second);
            at += task.head_stride;
            row += task.out.head_bytes;
        }
    }
}

// Head after head; the next one's elements are under way while a head is written.
template <bool Turned, typename Values>
__device__ void store_octets(Turning& turning, const StoreTask& task, const Tile& tile,
                             const WordPlace& place, const Angles& angles, const TileRows& rows,
                             const Values& values) {
    const std::uint16_t* source = place.source + tile.first_head * task.head_stride;
    OwnOctets<Turned> own(tile, place, angles, rows);
    own.load(source, place);
    KVCAST_UNROLL(1)
    for (std::uint32_t head = tile.first_head; head < tile.end_head; ++head) {
        own.turn(turning, values);
        source += task.head_stride;
        if (head + 1 < tile.end_head) own.load(source, place);
        __syncthreads();
        write_tile(turning, tile, place, rows, head * task.out.head_bytes);
        __syncthreads();
    }
}

template <bool Turned, typename Values>
__device__ void store_words(Turning& turning, const StoreTask& task, const Tile& tile, const WordPlace& place,
                            const Angles& angles, const TileRows& rows, const Values& values) {
    if (task.way == StoreWay::kOctets) {
        store_octets<Turned>(turning, task, tile, place, angles, rows, values);
    } else {
        store_slots<Turned>(task, tile, place, angles, rows, values);
    }
}

template <Dtype To>
__device__ void store_states(Turning& turning, const StoreTask& task, const Tile& tile,
                             const WordPlace& place, const Angles& angles, const TileRows& rows) {
    const StateValues<To> values(task.scale);
    if (tile.turned) {
        store_words<true>(turning, task, tile, place, angles, rows, values);
    } else {
        store_words<false>(turning, task, tile, place, angles, rows, values);
    }
}

__global__ void __launch_bounds__(kThreads, 2)
    store_tiles_of(Memory memory, const StoreTask* tasks, const StoreTile* tiles,
                   const RotationTask* rotations) {
    __shared__ TileRows rows;
    __shared__ Turning turning;
    const StoreTile item = tiles[blockIdx.x];
    const StoreTask& task = tasks[item.task];
    const RotationTask* rotation = task.rotation == kNone ? nullptr : rotations + task.rotation;
    const Tile tile = tile_of(task, item.tile);
    find_rows(rows, task, tile, memory);
    if (task.way == StoreWay::kAny) {
        for (std::uint32_t head = tile.first_head; head < tile.end_head; ++head)
            store_elements(task, head, tile, rotation, rows, memory);
        return;
    }
    const WordPlace place = word_place(task, tile, rotation, memory);
    const Angles angles = angles_of(rotation, memory);
    if (task.exact) {
        store_words<false>(turning, task, tile, place, angles, rows, StoredBits{});
    } else if (task.to == Dtype::kF16) {
        store_states<Dtype::kF16>(turning, task, tile, place, angles, rows);
    } else {
        store_states<Dtype::kBf16>(turning, task, tile, place, angles, rows);
    }
}

}  // namespace

cudaError_t launch_rotations(Memory memory, const RotationTask* tasks, std::uint32_t count,
                             cudaStream_t stream) {
    return launch(fill_rotations, {count * kRotationBlocks, kRotationThreads}, stream, memory, tasks);
}

cudaError_t launch_store(Memory memory, const StoreTask* tasks, const StoreTile* tiles, std::uint32_t count,
                         const RotationTask* rotations, cudaStream_t stream) {
    return launch(store_tiles_of, {count, kThreads}, stream, memory, tasks, tiles, rotations);
}

}  // namespace kvcast::kernels::cuda
