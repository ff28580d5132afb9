// Decoding of the profiles delta and lossless into planes that lie as they usually do (PlaneTask), two warps
// per block. One reads: it follows the coder's states, each of which waits for the one before, and does
// nothing else. The other one writes: it makes values of symbols and raw bits, turns them, and stores rows
// (direct_rows.cuh) while the first one is a channel ahead.
//
// A channel's codes are handed over in shared memory, in two places in turns: who comes to the barrier behind
// channel c has written the codes of c, or has used those of c - 1. RoPE's partner of a channel comes half a
// head later: the first half waits in the workspace, as states, then as values until the head is read.
#include "kernels/cuda/direct_rows.cuh"
#include "kernels/cuda/head.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/octet.cuh"
#include "kernels/cuda/pack.cuh"
#include "kernels/cuda/platform.cuh"

namespace kvcast::kernels::cuda {
namespace {

// A channel that is handed over.
struct ChannelCodes {
    std::uint32_t symbols[2][kLanes];
    std::uint32_t planes[2][kLanes];
    std::uint32_t escaped;
};

// What two warps share.
struct PairMemory {
    DirectRows::Memory rows;
    WordRing::Memory ring;
    ChannelCodes codes[2];
    // What is left of the pair's last head, if it is turned: the first halves of pairs of channels, as output
    // bits, in the workspace.
    const std::int16_t* kept;
    std::uint32_t kept_runs;  // of kDirectChannels channels
    std::uint32_t kept_stride;
};

// Pairs of warps of a block of threads have a barrier each.
constexpr std::uint32_t kMostPairs = kBarriers;
constexpr std::uint32_t kPairThreads = 2 * kLanes;

constexpr std::uint32_t pair_bytes(std::uint32_t most_channels) {
    constexpr std::uint32_t unit = alignof(PairMemory);
    return div_up(static_cast<std::uint32_t>(sizeof(PairMemory)) + channel_bytes(most_channels), unit) * unit;
}

// Before the pairs': what all share.
struct SharedHead {
    ReaderTables tables;
    LastMeeting done;  // with channels
};
constexpr auto kSharedHead = static_cast<std::uint32_t>(sizeof(SharedHead));
constexpr std::uint32_t shared_bytes(std::uint32_t pairs, std::uint32_t most_channels) {
    constexpr std::uint32_t unit = alignof(SharedHead);
    return div_up(kSharedHead + pairs * pair_bytes(most_channels), unit) * unit;
}

struct Pair {
    PairMemory& memory;
    Channel* channels;
    std::uint32_t barrier;

    // Both warps, behind a channel or at another place that both know.
    __device__ __forceinline__ void meet() const { barrier_sync(barrier, kPairThreads); }
    __device__ __forceinline__ ChannelCodes& codes(std::uint32_t channel) const {
        return memory.codes[channel % 2];
    }
};

// ---- reading

// A channel of any kind.
__device__ __forceinline__ void read_any(WarpReader& in, const PlaneTask& p, Channel channel,
                                         std::int16_t* place, ChannelCodes& codes) {
    if (channel.zero()) return;
    if (channel.planes() > WarpReader::kBytePlanes) {
        read_wide(in, channel, p.guard_bits, p.body_tokens, place);
        return;
    }
    const bool escaped = read_codes(in, channel.coding(), p.body_tokens, lane_place(place),
                                    [&](std::uint32_t half, const WarpReader::CodedQuad& quad) {
                                        codes.symbols[half][lane_id()] = quad.symbols;
                                        codes.planes[half][lane_id()] = quad.planes;
                                    });
    if (lane_id() == 0) codes.escaped = escaped ? 1 : 0;
}

// A channel of more than seven groups: the usual case.
template <bool Raw>
__device__ __forceinline__ void read_usual(WarpReader& in, const StepCoding& c, std::uint32_t last,
                                           std::int16_t* place, ChannelCodes& codes) {
    const bool escaped = read_usual_codes<Raw>(in, c, last, lane_place(place),
                                               [&](std::uint32_t half, const WarpReader::CodedQuad& quad) {
                                                   codes.symbols[half][lane_id()] = quad.symbols;
                                                   if constexpr (Raw)
                                                       codes.planes[half][lane_id()] = quad.planes;
                                               });
    if (lane_id() == 0) codes.escaped = escaped ? 1 : 0;
}

// False, in all lanes, where side information is out of range.
__device__ __forceinline__ bool read_head(WarpReader& in, const PlaneTask& p, std::uint32_t head,
                                          const Pair& pair, std::byte* workspace) {
    HeadReader side(in, p, head, pair.channels);
    bool fits = side.exact_rows(p.exact_direct, workspace);
    fits = side.side_vectors() && fits;
    side.find_channels();
    pair.meet();
    auto* place = reinterpret_cast<std::int16_t*>(body_of(p, head, workspace));
    const bool usual = p.body_tokens > kSevenGroups;
    Channel channel = pair.channels[0];
    KVCAST_UNROLL(1)
    for (std::uint32_t c = 0; c < p.channels; ++c, place += p.body_stride) {
        if (!usual || channel.zero() || channel.planes() > WarpReader::kBytePlanes) {
            read_any(in, p, channel, place, pair.codes(c));
        } else if (channel.planes() == 0) {
            read_usual<false>(in, channel.coding(), p.body_tokens - kSevenGroups, place, pair.codes(c));
        } else {
            read_usual<true>(in, channel.coding(), p.body_tokens - kSevenGroups, place, pair.codes(c));
        }
        channel = pair.channels[lesser(c + 1, p.channels - 1)];
        pair.meet();
    }
    pair.meet();  // the channels have been used, too
    return fits;
}

// ---- writing

// A lane's angles of a pair of channels, cosines in the lower halves. Behind the body they mean nothing.
class Angles {
  public:
    __device__ __forceinline__ Angles(const RotationTask* r, const PlaneTask& p, const std::byte* workspace) {
        if (r == nullptr) return;
        table_ = reinterpret_cast<const std::uint32_t*>(workspace + r->table) + p.exact_rows + lane_id();
        stride_ = r->pair_stride;
    }
    __device__ __forceinline__ void load(std::uint32_t pair, std::uint32_t (&angles)[kLaneTokens]) const {
        const std::uint32_t* row = table_ + std::uint64_t{pair} * stride_;
        KVCAST_UNROLL(8)
        for (std::uint32_t g = 0; g < kLaneTokens; ++g) angles[g] = row[g * kLanes];
    }

  private:
    const std::uint32_t* table_ = nullptr;
    std::uint32_t stride_ = 0;
};

// What becomes of a plane's channels.
enum class Way : std::uint8_t { kElements, kStates, kTurned };

template <Way W>
class HeadWriter {
  public:
    __device__ __forceinline__ HeadWriter(const PlaneTask& plane, std::uint32_t head, const Pair& pair,
                                          const RotationTask* rotation, std::byte* workspace)
        : p_(plane),
          pair_(pair),
          turns_(rotation, plane, workspace),
          place_(lane_place(reinterpret_cast<std::int16_t*>(body_of(plane, head, workspace)))),
          values_of_(plane.scale),
          rows_(pair.memory.rows,
                {plane.out, head * plane.out.head_bytes, plane.exact_rows, plane.body_tokens}) {}

    __device__ __forceinline__ void write() {
        pair_.meet();  // the channels are known
        if constexpr (W == Way::kTurned) {
            const std::uint32_t pairs = p_.channels / 2;
            write_first_ones(pairs);
            write_second_ones(pairs);
            pair_.meet();  // codes and channels have been used
            if (lane_id() == 0) {
                pair_.memory.kept = place_;  // lane 0's
                pair_.memory.kept_runs = pairs / kDirectChannels;
                pair_.memory.kept_stride = p_.body_stride;
            }
            __syncwarp();
        } else {
            KVCAST_UNROLL(1)
            for (std::uint32_t c = 0; c < p_.channels; c += 2) {
                const Octet even = unturned(c), odd = unturned(c + 1);
                rows_.put(c, even, odd);
            }
            pair_.meet();  // codes and channels have been used
        }
    }

  private:
    // A lane's place in the workspace.
    __device__ __forceinline__ std::int16_t* place(std::uint32_t channel) const {
        return place_ + std::uint64_t{channel} * p_.body_stride;
    }

    // First channels of pairs wait, as states.
    __device__ __forceinline__ void write_first_ones(std::uint32_t pairs) const {
        std::int16_t* own = place_;
        KVCAST_UNROLL(1)
        for (std::uint32_t c = 0; c < pairs; ++c, own += p_.body_stride) {
            pair_.meet();
            std::int32_t s[kLaneTokens];
            states(c, s);
            keep(own, packed(s));
        }
    }
    // With their partners they become values, and wait again. What the next pair needs is asked for before
    // this one is stored.
    struct Waiting {
        Octet first;
        std::uint32_t angles[kLaneTokens];
    };
    __device__ __forceinline__ void write_second_ones(std::uint32_t pairs) {
        Waiting waiting;
        ask_for(0, waiting);
        KVCAST_UNROLL(1)
        for (std::uint32_t c = 0; c < pairs; c += 2) {
            const Octet even = turned(c, pairs, waiting), odd = turned(c + 1, pairs, waiting);
            rows_.put(pairs + c, even, odd);
        }
    }
    __device__ __forceinline__ void ask_for(std::uint32_t c, Waiting& waiting) const {
        waiting.first = kept(place(c));
        turns_.load(c, waiting.angles);
    }
    __device__ __forceinline__ Octet turned(std::uint32_t c, std::uint32_t pairs, Waiting& waiting) const {
        pair_.meet();
        std::int32_t s[kLaneTokens];
        states(pairs + c, s);
        Octet first = waiting.first;
        const Octet second = turn(first, s, waiting.angles);
        ask_for(lesser(c + 1, pairs - 1), waiting);
        keep(place(c), first);
        return second;
    }

    // A channel that is not turned, as output bits.
    __device__ __forceinline__ Octet unturned(std::uint32_t c) const {
        pair_.meet();
        if constexpr (W == Way::kElements)
            return values_.elements(pair_.channels[c].center(), codes(c), place(c));
        std::int32_t s[kLaneTokens];
        states(c, s);
        Octet octet;
        KVCAST_UNROLL(4)
        for (std::uint32_t i = 0; i < kLaneTokens / 2; ++i)
            octet.words[i] = values_of_.of_biased(s[2 * i], s[2 * i + 1]);
        return octet;
    }

    __device__ __forceinline__ OctetCodes codes(std::uint32_t channel) const {
        const ChannelCodes& c = pair_.codes(channel);
        const std::uint32_t lane = lane_id();
        return {
            {c.symbols[0][lane], c.symbols[1][lane]}, {c.planes[0][lane], c.planes[1][lane]}, c.escaped != 0};
    }

    // A channel's states, with kFloatBias if they become values as they are.
    __device__ __forceinline__ void states(std::uint32_t c, std::int32_t (&out)[kLaneTokens]) const {
        constexpr std::int32_t bias = W == Way::kStates ? kFloatBias : 0;
        const Channel channel = pair_.channels[c];
        if (!channel.zero() && channel.planes() <= WarpReader::kBytePlanes) {
            values_.states(channel, p_.guard_bits, codes(c), place(c), bias, out);
            return;
        }
        const Octet octet = channel.zero() ? constant(channel.center()) : kept(place(c));
        KVCAST_UNROLL(4)
        for (std::uint32_t i = 0; i < kLaneTokens / 2; ++i) {
            out[2 * i] = low_half(octet.words[i]) + bias;
            out[2 * i + 1] = high_half(octet.words[i]) + bias;
        }
    }

    // States of a pair's channels to values: those of the first one in place.
    __device__ __forceinline__ Octet turn(Octet& first, const std::int32_t (&second)[kLaneTokens],
                                          const std::uint32_t (&angles)[kLaneTokens]) const {
        Octet out;
        KVCAST_UNROLL(4)
        for (std::uint32_t i = 0; i < kLaneTokens / 2; ++i) {
            const std::uint32_t a = first.words[i];
            const Rotated even = rotate(low_half(a), second[2 * i], angle_of(angles[2 * i]));
            const Rotated odd = rotate(high_half(a), second[2 * i + 1], angle_of(angles[2 * i + 1]));
            first.words[i] = values_of_.of_biased(even.a + kFloatBias, odd.a + kFloatBias);
            out.words[i] = values_of_.of_biased(even.b + kFloatBias, odd.b + kFloatBias);
        }
        return out;
    }
    static __device__ __forceinline__ SinCos angle_of(std::uint32_t word) {
        return {static_cast<std::int16_t>(word), static_cast<std::int16_t>(word >> 16)};
    }

    const PlaneTask& p_;
    const Pair& pair_;
    Angles turns_;
    std::int16_t* place_;
    FusedStateValues values_of_;
    OctetValues values_;
    DirectRows rows_;
};

// Half of a run of what is left of a pair's head.
__device__ __forceinline__ void store_kept_half(const PairMemory& pair, std::uint32_t run,
                                                std::uint32_t half) {
    const std::uint32_t channel = run * kDirectChannels, stride = pair.kept_stride;
    store_kept_run(pair.rows.rows, channel, half, lane_place(pair.kept + std::uint64_t{channel} * stride),
                   stride);
}

__device__ __forceinline__ void write_head(const PlaneTask& p, std::uint32_t head, const Pair& pair,
                                           const RotationTask* rotations, std::byte* workspace) {
    KVCAST_UNROLL(1)
    for (std::uint32_t i = 0; i < 2 * pair.memory.kept_runs; ++i) store_kept_half(pair.memory, i / 2, i % 2);
    __syncwarp();
    if (lane_id() == 0) pair.memory.kept_runs = 0;
    if (!p.quantised) {
        HeadWriter<Way::kElements>(p, head, pair, nullptr, workspace).write();
    } else if (p.rotation == kNone) {
        HeadWriter<Way::kStates>(p, head, pair, nullptr, workspace).write();
    } else {
        HeadWriter<Way::kTurned>(p, head, pair, rotations + p.rotation, workspace).write();
    }
}

// ---- blocks

__global__ void __launch_bounds__(kMostPairs* kPairThreads, 1)
    decode_direct(std::byte* workspace, const PlaneTask* planes, const BlockTask* blocks, std::uint32_t count,
                  const RotationTask* rotations, std::uint32_t most_channels, const BucketTable* tables,
                  std::uint32_t* status) {
    auto& head = *dynamic_shared<SharedHead>();
    auto* pair_memories = reinterpret_cast<std::byte*>(&head) + kSharedHead;
    const auto memory_of = [&](std::uint32_t pair) -> PairMemory& {
        return *reinterpret_cast<PairMemory*>(pair_memories + pair * pair_bytes(most_channels));
    };
    const std::uint32_t pairs = blockDim.x / kPairThreads, warp = warp_id();
    const bool reads = warp < pairs;
    const std::uint32_t own = reads ? warp : warp - pairs, index = blockIdx.x * pairs + own;
    PairMemory& memory = memory_of(own);
    if (threadIdx.x == 0) head.done.prepare(2 * pairs);
    if (!reads && lane_id() == 0) memory.kept_runs = 0;
    const std::uint32_t place = head.tables.load(tables);
    if (index < count && blocks[index].direct) {
        const BlockTask block = blocks[index];
        const Pair pair = {memory, reinterpret_cast<Channel*>(&memory + 1), own};
        if (reads) {
            WarpReader in(block.begin, block.bytes, memory.ring, place);
            bool fits = true;
            for_heads(block, planes, [&](const PlaneTask& plane, std::uint32_t h) {
                fits = read_head(in, plane, h, pair, workspace) && fits;
            });
            const std::uint32_t faults = in.close() | (fits ? 0u : kOutOfRange);
            if (lane_id() == 0) status[block.status] = faults;
        } else {
            for_heads(block, planes, [&](const PlaneTask& plane, std::uint32_t h) {
                write_head(plane, h, pair, rotations, workspace);
            });
        }
    }
    // Heads that are turned take longer than others: what is left of them is for all warps.
    head.done.meet();
    const std::uint32_t most_runs = most_channels / 2 / kDirectChannels;
    KVCAST_UNROLL(1)
    for (std::uint32_t i = warp; i < 2 * pairs * most_runs; i += 2 * pairs) {
        const PairMemory& of = memory_of(i / (2 * most_runs));
        const std::uint32_t run = i / 2 % most_runs;
        if (run < of.kept_runs) store_kept_half(of, run, i % 2);
    }
}

}  // namespace

cudaError_t launch_decode_direct(Memory memory, const DecodeBatch& batch, cudaStream_t stream) {
    if (batch.count == 0) return cudaSuccess;
    DeviceLimits device = {};
    if (const cudaError_t e = device_limits(device); e != cudaSuccess) return e;
    // All multiprocessors, then all that one has room for.
    std::uint32_t pairs = lesser(div_up(batch.count, device.multiprocessors), kMostPairs);
    while (pairs > 1 && shared_bytes(pairs, batch.most_channels) > device.shared_bytes) --pairs;
    const std::uint32_t bytes = shared_bytes(pairs, batch.most_channels);
    return launch(decode_direct, {div_up(batch.count, pairs), pairs * kPairThreads, bytes}, stream,
                  memory.workspace, batch.planes, batch.blocks, batch.count, batch.rotations,
                  batch.most_channels, batch.tables, batch.status);
}

}  // namespace kvcast::kernels::cuda
