// Integer RoPE, conversion and the store to contiguous or paged rows. FORMAT.md, sections 6 and 7.3.
//
// A block of threads stores a tile: 64 tokens of all heads, and of each head 32 pairs of channels that RoPE
// turns or 64 channels that it leaves alone. States come channel-major (delta, lossless) or token-major
// (klt); rows are token-major. Where both are 16-bit elements that lie as they usually do, threads take
// neighbours, two elements to a word, on both sides; all else goes element by element.
#include "kernels/cuda/launch.h"
#include "kernels/cuda/platform.cuh"
#include "kernels/cuda/rows.cuh"

namespace kvcast::kernels::cuda {
namespace {

constexpr std::uint32_t kThreads = 256;
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
};

__device__ Tile tile_of(const StoreTask& task, std::uint32_t local) {
    const std::uint32_t across = tiles_across(task), turned = div_up(task.pairs, kTilePairs);
    const std::uint32_t column = local % across, first_token = local / across * kTileTokens;
    Tile t = {first_token, lesser(kTileTokens, task.tokens - first_token), false, 0, 0};
    t.turned = column < turned;
    t.first = t.turned ? column * kTilePairs : (column - turned) * kTileSingles;
    t.count = t.turned ? lesser(kTilePairs, task.pairs - t.first)
                       : lesser(kTileSingles, singles_of(task) - t.first);
    return t;
}

// The rows and positions of a tile's tokens, in shared memory.
struct TileRows {
    std::uint8_t* row[kTileTokens];  // of head 0
    std::uint32_t position[kTileTokens];
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
        const std::uint64_t i =
            std::uint64_t{channel} * task_.channel_stride + std::uint64_t{token} * task_.token_stride;
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

// States that become bf16 or fp16.
template <Dtype To>
struct StateValues {
    float unit;

    __device__ explicit StateValues(Scale scale)
        : unit(static_cast<float>(scale.mantissa) * power_of_two(scale.exponent)) {}

    // A state has 17 bits and the mantissa 8: the product is exact, as value_of's is, and at most 2^127.
    __device__ std::uint32_t operator()(std::int32_t state) const {
        const float v = static_cast<float>(state) * unit;
        if constexpr (To == Dtype::kF16) {
            return to_f16(v);
        } else {
            const auto u = std::bit_cast<std::uint32_t>(v);
            return (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
        }
    }
};

// Stored bits of the output's own type.
struct StoredBits {
    __device__ std::uint32_t operator()(std::int32_t bits) const { return static_cast<std::uint16_t>(bits); }
};

__device__ __forceinline__ std::int32_t low_half(std::uint32_t word) {
    return static_cast<std::int16_t>(word);
}
__device__ __forceinline__ std::int32_t high_half(std::uint32_t word) {
    return static_cast<std::int32_t>(word) >> 16;
}
__device__ __forceinline__ std::uint32_t halves(std::uint32_t low, std::uint32_t high) {
    return (low & 0xffffu) | high << 16;
}

constexpr std::uint32_t kPitch = kTilePairs / 2 + 1;  // words: two slots each, and one against bank conflicts

// A tile on its way from channels to tokens: words of two neighbouring slots.
struct Turning {
    std::uint32_t words[2][kTileTokens][kPitch];
};

struct WordPlace {
    const std::uint16_t* source;  // of head 0, or of a later one
    std::uint64_t out;            // of the head in its rows, in bytes
    std::uint32_t stride;         // from channel to channel, or from token to token
    std::uint32_t first_channel;  // of the tile's first slot
    std::uint32_t partner;  // from a pair's first channel to its second; of channels that are not turned,
                            // half of the tile's
};

// Of head 0.
__device__ WordPlace word_place(const StoreTask& task, const Tile& tile, const RotationTask* rotation,
                                Memory memory) {
    return {reinterpret_cast<const std::uint16_t*>(memory.workspace + task.source), 0,
            task.way == StoreWay::kAlongTokens ? task.channel_stride : task.token_stride,
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

// Two channels of a slot at one token, as output bits.
struct SlotBits {
    std::uint32_t first;
    std::uint32_t second;
};

template <bool Turned, typename Values>
__device__ __forceinline__ SlotBits slot_bits(const Values& values, std::int32_t x, std::int32_t y,
                                              SinCos angle) {
    if constexpr (Turned) {
        const Rotated v = rotate(x, y, angle);
        return {values(v.a), values(v.b)};
    }
    return {values(x), values(y)};
}

// What a thread takes of a tile that is turned from channels to tokens: two tokens of two neighbouring slots,
// and the same kTurns times. Its angles are those of all heads.
template <bool Turned>
class OwnSlots {
  public:
    __device__ OwnSlots(const Tile& tile, const WordPlace& place, const Angles& angles, const TileRows& rows)
        : tile_(tile), place_(place), token_(threadIdx.x % kLanes * 2) {
        if (!Turned || token_ >= tile.tokens) return;
        const std::uint32_t position[2] = {rows.position[token_],
                                           rows.position[token_ + (token_ + 1 < tile.tokens ? 1 : 0)]};
        for_all([&](std::uint32_t turn, std::uint32_t i, std::uint32_t s) {
            for (std::uint32_t k = 0; k < 2; ++k) angle_[turn][i][k] = angles.at(tile.first + s, position[k]);
        });
    }

    // Sends for a head's elements.
    __device__ void load(const std::uint16_t* source) {
        if (token_ >= tile_.tokens) return;
        for_all([&](std::uint32_t turn, std::uint32_t i, std::uint32_t s) {
            const auto* at =
                source + std::uint64_t{place_.first_channel + s} * place_.stride + tile_.first_token + token_;
            first_[turn][i] = load_pair(at);
            if (has_second(tile_, s))
                second_[turn][i] = load_pair(at + std::uint64_t{place_.partner} * place_.stride);
        });
    }

    // Words of two slots into shared memory.
    template <typename Values>
    __device__ void turn(Turning& turning, const Values& values) const {
        if (token_ >= tile_.tokens) return;
        for (std::uint32_t turn = 0; turn < kTurns; ++turn) {
            if (slot_of(turn) >= tile_.count) break;
            SlotBits bits[2][2];  // [slot][token]
            for (std::uint32_t i = 0; i < 2; ++i) {
                const std::uint32_t x = first_[turn][i], y = second_[turn][i];
                bits[i][0] = slot_bits<Turned>(values, low_half(x), low_half(y), angle_[turn][i][0]);
                bits[i][1] = slot_bits<Turned>(values, high_half(x), high_half(y), angle_[turn][i][1]);
            }
            for (std::uint32_t k = 0; k < 2; ++k) {
                turning.words[0][token_ + k][slot_of(turn) / 2] = halves(bits[0][k].first, bits[1][k].first);
                turning.words[1][token_ + k][slot_of(turn) / 2] =
                    halves(bits[0][k].second, bits[1][k].second);
            }
        }
    }

  private:
    static constexpr std::uint32_t kSlotsAtOnce = kThreads / kLanes * 2;
    static constexpr std::uint32_t kTurns = kTilePairs / kSlotsAtOnce;

    static __device__ std::uint32_t slot_of(std::uint32_t turn) {
        return threadIdx.x / kLanes * 2 + turn * kSlotsAtOnce;
    }

    // work(turn, 0 or 1, slot) for the slots that the tile has.
    template <typename Work>
    __device__ void for_all(Work work) const {
        for (std::uint32_t turn = 0; turn < kTurns; ++turn) {
            if (slot_of(turn) >= tile_.count) break;
            for (std::uint32_t i = 0; i < 2; ++i) work(turn, i, slot_of(turn) + i);
        }
    }

    const Tile& tile_;
    const WordPlace& place_;
    std::uint32_t token_;
    SinCos angle_[kTurns][2][2] = {};
    std::uint32_t first_[kTurns][2] = {};
    std::uint32_t second_[kTurns][2] = {};
};

__device__ __forceinline__ void put_pair(std::uint8_t* row, std::uint32_t channel, std::uint32_t word) {
    *reinterpret_cast<std::uint32_t*>(row + channel * sizeof(std::uint16_t)) = word;
}

__device__ void write_tile(const Turning& turning, const Tile& tile, const WordPlace& place,
                           const TileRows& rows) {
    for (std::uint32_t i = threadIdx.x; i < tile.tokens * (kTilePairs / 2); i += kThreads) {
        const std::uint32_t t = i / (kTilePairs / 2), s = i % (kTilePairs / 2) * 2;
        if (s >= tile.count) continue;
        std::uint8_t* row = rows.row[t] + place.out;
        put_pair(row, place.first_channel + s, turning.words[0][t][s / 2]);
        if (has_second(tile, s))
            put_pair(row, place.first_channel + s + place.partner, turning.words[1][t][s / 2]);
    }
}

// Rows on both sides: a thread takes two slots of a token, of all heads.
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
        const auto* at =
            first.source + std::uint64_t{tile.first_token + t} * first.stride + first.first_channel + s;
        std::uint8_t* row = rows.row[t];
        KVCAST_UNROLL(4)
        for (std::uint32_t head = 0; head < task.heads; ++head) {
            const std::uint32_t x = load_pair(at), y = both ? load_pair(at + first.partner) : 0u;
            const SlotBits low = slot_bits<Turned>(values, low_half(x), low_half(y), angle[0]);
            const SlotBits high = slot_bits<Turned>(values, high_half(x), high_half(y), angle[1]);
            put_pair(row, first.first_channel + s, halves(low.first, high.first));
            if (both) put_pair(row, first.first_channel + s + first.partner, halves(low.second, high.second));
            at += task.head_stride;
            row += task.out.head_bytes;
        }
    }
}

// Head after head. While some warps write one, others turn the next: there are two places to turn them in,
// and a head's elements are under way while the head before is written.
template <bool Turned, typename Values>
__device__ void turn_heads(Turning (&turning)[2], const StoreTask& task, const Tile& tile,
                           const WordPlace& first, const Angles& angles, const TileRows& rows,
                           const Values& values) {
    WordPlace place = first;
    OwnSlots<Turned> own(tile, first, angles, rows);
    own.load(place.source);
    for (std::uint32_t head = 0; head < task.heads; ++head) {
        own.turn(turning[head % 2], values);
        place.source += task.head_stride;
        if (head + 1 < task.heads) own.load(place.source);
        __syncthreads();
        write_tile(turning[head % 2], tile, place, rows);
        place.out += task.out.head_bytes;
    }
}

template <bool Turned, typename Values>
__device__ void store_words(Turning (&turning)[2], const StoreTask& task, const Tile& tile,
                            const WordPlace& place, const Angles& angles, const TileRows& rows,
                            const Values& values) {
    if (task.way == StoreWay::kAlongTokens) {
        turn_heads<Turned>(turning, task, tile, place, angles, rows, values);
    } else {
        store_slots<Turned>(task, tile, place, angles, rows, values);
    }
}

template <Dtype To>
__device__ void store_states(Turning (&turning)[2], const StoreTask& task, const Tile& tile,
                             const WordPlace& place, const Angles& angles, const TileRows& rows) {
    const StateValues<To> values(task.scale);
    if (tile.turned) {
        store_words<true>(turning, task, tile, place, angles, rows, values);
    } else {
        store_words<false>(turning, task, tile, place, angles, rows, values);
    }
}

__global__ void __launch_bounds__(kThreads)
    store_tiles_of(Memory memory, const StoreTask* tasks, const StoreTile* tiles,
                   const RotationTask* rotations) {
    __shared__ TileRows rows;
    __shared__ Turning turning[2];
    const StoreTile item = tiles[blockIdx.x];
    const StoreTask& task = tasks[item.task];
    const RotationTask* rotation = task.rotation == kNone ? nullptr : rotations + task.rotation;
    const Tile tile = tile_of(task, item.tile);
    find_rows(rows, task, tile, memory);
    if (task.way == StoreWay::kAny) {
        for (std::uint32_t head = 0; head < task.heads; ++head)
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
