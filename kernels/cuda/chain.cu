// States of all units of some tokens of a chunk, one unit after another, by one block of threads: what units
// are predicted from stays in shared memory, and no launch waits for another. FORMAT.md, section 11.3.
#include <iterator>

#include "kernels/cuda/chain_units.cuh"
#include "kernels/cuda/matrix_ring.cuh"
#include "kernels/cuda/project.cuh"
#include "kernels/cuda/shared_memory.cuh"

namespace kvcast::kernels::cuda {
namespace {

constexpr std::uint32_t kTaskPieces = sizeof(UnitTask) / 16;
static_assert(sizeof(UnitTask) % 16 == 0 && kTaskPieces <= kProjectThreads);

// What a block of threads is about, in shared memory: registers are short.
struct Chain {
    ChainTask task;
    std::uint32_t first_token;
    std::uint32_t tokens;  // of the block
};
// Features and coefficients in shared memory.
template <std::uint32_t Tiles>
__device__ std::byte* place_of(std::uint32_t resident) {
    return dynamic_shared<std::byte>() + resident * Tiles;
}

__device__ void copy_task(UnitTask& to, const UnitTask& from) {
    if (threadIdx.x < kTaskPieces)
        copy_16(reinterpret_cast<std::byte*>(&to) + 16 * threadIdx.x,
                reinterpret_cast<const std::byte*>(&from) + 16 * threadIdx.x);
}

__device__ const ProjectionTerm& transform_of(const UnitTask& unit) {
    return unit.terms[unit.term_count - 1];
}

template <std::uint32_t Tiles>
__device__ void load_token_features(const Chain& c, Memory memory) {
    const std::uint32_t features = c.task.features;
    const auto* rows = reinterpret_cast<const std::int8_t*>(memory.image + c.task.token_rows) +
                       std::uint64_t{c.first_token} * features;
    for (std::uint32_t i = threadIdx.x; i < c.tokens * features; i += kProjectThreads)
        NarrowRows<Tiles>::put(place_of<Tiles>(c.task.resident), i / features, i % features, rows[i]);
}

// A unit's coefficients on their way to SplitRows. A lane copies what it will hold of a fragment to its
// places in both limbs' fragments, and when they have arrived splits them there. Half of the warps do so, one
// of the two that a scheduler has: they fall behind the others, so that one of the two multiplies while the
// other adds up. A block of one tile waits for matrices more than for products: there all warps do.
template <std::uint32_t Tiles>
class Coefficients {
  public:
    __device__ Coefficients(const Chain& c, std::uint32_t warp) : c_(c), warp_(warp) {}

    __device__ void copy(const UnitTask& unit, Memory memory) const {
        const ProjectionTerm& transform = transform_of(unit);
        const std::uint32_t input = lane_id() % 4 * 8, token = lane_id() / 4;
        const std::uint32_t inputs = transform.inputs, stride = transform.stride, tokens = c_.tokens;
        const auto* rows = reinterpret_cast<const std::int16_t*>(memory.workspace + transform.features) +
                           std::uint64_t{c_.first_token + token} * stride + input;
        for_all_fragments(transform, [&](std::uint32_t step, std::uint32_t tile, std::byte* place) {
            if (step * kUnitStep + input >= inputs) return;
            const std::uint32_t before = tile * kTokenTile;
            const auto* from = rows + before * stride + step * kUnitStep;
            if (before + token < tokens) copy_16(place, from);
            if (before + token + 8 < tokens) copy_16(place + kFeatureBytes, from + 8 * stride);
        });
    }

    // After the thread's wait for its copies.
    __device__ void split_copied(const UnitTask& unit) const {
        for_all_fragments(transform_of(unit), [&](std::uint32_t, std::uint32_t, std::byte* place) {
            auto& low = *reinterpret_cast<uint4*>(place);
            auto& high = *reinterpret_cast<uint4*>(place + kFeatureBytes);
            const Features<2> f = split(low, high);
            low = {f.limbs[0].r[0], f.limbs[0].r[1], f.limbs[0].r[2], f.limbs[0].r[3]};
            high = {f.limbs[1].r[0], f.limbs[1].r[1], f.limbs[1].r[2], f.limbs[1].r[3]};
        });
    }

  private:
    // This warp's part of them.
    template <typename Work>
    __device__ __forceinline__ void for_all_fragments(const ProjectionTerm& transform, Work work) const {
        constexpr std::uint32_t warps = kProjectThreads / kLanes / (Tiles == 1 ? 1 : 2);
        if (warp_ >= warps) return;
        const std::uint32_t count = div_up(transform.inputs, kUnitStep) * Tiles;
        std::byte* first = place_of<Tiles>(transform.resident) + fragment_slot(lane_id());
        KVCAST_UNROLL(1)
        for (std::uint32_t i = warp_; i < count; i += warps)
            work(i / Tiles, i % Tiles, first + i * 2 * kFeatureBytes);
    }

    const Chain& c_;
    std::uint32_t warp_;
};

// Finds out which steps of a unit's coefficients are worth multiplying: the last warp, which splits none
// where others do not. Made well before it is asked, its loads are no wait.
template <std::uint32_t Tiles>
class CodedSteps {
  public:
    __device__ CodedSteps(const Chain& c, const UnitTask& unit, Memory memory, bool wanted)
        : wanted_(wanted) {
        if (!wanted) return;
        const auto* masks = reinterpret_cast<const std::uint32_t*>(memory.workspace + unit.masks);
        for (std::uint32_t i = 0; i < kLoads; ++i) {
            const std::uint32_t token = i * kLanes + lane_id();
            if (token < c.tokens) masks_[i] = masks[c.first_token + token];
        }
    }
    __device__ void tell(ChainUnit& unit) const {
        if (!wanted_) return;
        std::uint32_t any = 0;
        for (const std::uint32_t mask : masks_) any |= mask;
        const std::uint32_t steps =
            coded_steps(__reduce_or_sync(kFullWarp, any), transform_of(unit.task).inputs);
        if (lane_id() == 0) unit.coded_steps = steps;
    }

    // This warp's business.
    static __device__ bool mine(std::uint32_t warp) { return warp + 1 == kProjectThreads / kLanes; }

  private:
    static constexpr std::uint32_t kLoads = div_up(Tiles * kTokenTile, kLanes);
    bool wanted_;
    std::uint32_t masks_[kLoads] = {};
};

// The terms of all units one after another as a warp multiplies them. What there is once for each output is
// loaded a term before its use.
template <std::uint32_t Tiles, std::uint32_t Chunks>
class Terms {
  public:
    __device__ Terms(const ChainUnit* units, std::uint32_t output, MatrixRing<Chunks>& ring)
        : order_(units), output_(output), ring_(ring) {
        load_shifts(shifts_);
    }

    // Adds the next one.
    __device__ __forceinline__ void add(Totals<Tiles>& totals) {
        const ProjectionTerm& term = order_.term();
        const std::uint32_t steps = output_ < order_.unit().width ? order_.steps() : 0;
        order_.next(ring_.end());
        Shifts next;
        if (!kShort) load_shifts(next);
        if (steps != 0) {
            const Factors f = {places_ + term.resident * Tiles, term.narrow, term.limbs, steps};
            LimbSums<Tiles> sums;
            multiply<true>(f, 0, sums);
            const std::uint32_t chunk = kChunkSlots * slot_steps(f.limbs);
            KVCAST_UNROLL(1)
            for (std::uint32_t step = chunk; step < steps; step += chunk) multiply<false>(f, step, sums);
            if (kShort) load_shifts(next);
            totals.add(sums, shifts_);
        } else if (kShort) {
            load_shifts(next);
        }
        shifts_ = next;
    }

  private:
    // The highest blocks are short of registers, and have long sums to add up while something is loaded.
    static constexpr bool kShort = Tiles == kMostHeight;

    struct Factors {
        const std::byte* features;
        bool narrow;
        std::uint32_t limbs;  // of the matrix
        std::uint32_t steps;
    };

    __device__ __forceinline__ void load_shifts(Shifts& shifts) const {
        shifts.load(order_.term().shifts, output_ < order_.unit().width ? output_ : 0);
    }

    // The chunk from step `step` on.
    template <bool Begins>
    __device__ __forceinline__ void multiply(const Factors& f, std::uint32_t step, LimbSums<Tiles>& sums) {
        const std::byte* chunk = ring_.take();
        if (f.narrow) {
            multiply_rows<Begins>(NarrowRows<Tiles>{f.features}, f, step, chunk, sums);
        } else {
            multiply_rows<Begins>(SplitRows<Tiles>{f.features}, f, step, chunk, sums);
        }
    }
    template <bool Begins, typename Rows>
    __device__ __forceinline__ void multiply_rows(const Rows& rows, const Factors& f, std::uint32_t step,
                                                  const std::byte* chunk, LimbSums<Tiles>& sums) {
        if (f.limbs == 2) {
            multiply_chunk<Begins, 2>(rows, f.steps, step, chunk, sums);
        } else {
            multiply_chunk<Begins, 1>(rows, f.steps, step, chunk, sums);
        }
    }

    // A whole chunk's steps follow one another without questions, and what sums begin with is no work of its
    // own; the highest blocks lack the registers for that.
    template <bool Begins, std::uint32_t Limbs, typename Rows>
    __device__ __forceinline__ void multiply_chunk(const Rows& rows, std::uint32_t steps, std::uint32_t step,
                                                   const std::byte* chunk, LimbSums<Tiles>& sums) {
        constexpr std::uint32_t slot = slot_steps(Limbs), all = kChunkSlots * slot;
        if (!kShort && steps - step >= all) {
            if (Begins) sums.template begin_unused<Rows, Limbs>(shifts_);
            multiply_slot<Begins, Limbs>(rows, step, step + all, load_slot(chunk, 0), shifts_, sums);
            KVCAST_UNROLL(kChunkSlots)
            for (std::uint32_t i = 1; i < kChunkSlots; ++i)
                multiply_slot<false, Limbs>(rows, step + i * slot, step + all, load_slot(chunk, i), {}, sums);
        } else {
            if (Begins) sums.start(shifts_);
            const std::uint32_t end = lesser(steps, step + all);
            KVCAST_UNROLL(1)
            for (std::uint32_t i = 0; step + i * slot < end; ++i)
                multiply_slot<false, Limbs>(rows, step + i * slot, steps, load_slot(chunk, i), {}, sums);
        }
    }

    std::byte* places_ = fixed_shared(place_of<Tiles>(0));
    TermOrder order_;
    std::uint32_t output_;
    MatrixRing<Chunks>& ring_;
    Shifts shifts_;
};

#ifdef KVCAST_SIMT

inline std::uint32_t saturated_pair(std::int32_t first, std::int32_t second) {
    return static_cast<std::uint16_t>(saturate16(first)) |
           std::uint32_t{static_cast<std::uint16_t>(saturate16(second))} << 16;
}

inline std::uint32_t saturated_bytes(const std::int32_t (&v)[4]) {
    std::uint32_t bytes = 0;
    for (unsigned i = 0; i < 4; ++i) {
        const std::int32_t byte = v[i] < -128 ? -128 : v[i] > 127 ? 127 : v[i];
        bytes |= static_cast<std::uint32_t>(byte & 255) << 8 * i;
    }
    return bytes;
}

#else

__device__ __forceinline__ std::uint32_t saturated_pair(std::int32_t first, std::int32_t second) {
    std::uint32_t pair;
    asm("cvt.pack.sat.s16.s32 %0, %1, %2;" : "=r"(pair) : "r"(second), "r"(first));
    return pair;
}

__device__ __forceinline__ std::uint32_t saturated_bytes(const std::int32_t (&v)[4]) {
    std::uint32_t bytes;
    asm("{\n.reg .b32 upper;\n"
        "cvt.pack.sat.s8.s32.b32 upper, %4, %3, 0;\n"
        "cvt.pack.sat.s8.s32.b32 %0, %2, %1, upper;\n}"
        : "=r"(bytes)
        : "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]));
    return bytes;
}

#endif

// What there is for each of a unit's channels; it comes to shared memory with the unit's coefficients.
struct alignas(16) Channels {
    std::uint32_t of[kProjectOutputs];

    __device__ void copy(const UnitTask& unit) {
        const std::uint32_t first = threadIdx.x * 4;
        if (first < limb_tiles(unit.width) * kOutputTile) copy_16(of + first, unit.channels + first);
    }

    // Sums begin with the bias.
    template <std::uint32_t Tiles>
    __device__ __forceinline__ void start(Totals<Tiles>& totals, const WarpPlace& at) const {
        for_all_sums<Tiles>([&](std::uint32_t m, std::uint32_t n, std::uint32_t i) {
            totals.v[m][n][i] = bias_of(of[at.output_of(n, i)]);
        });
    }
};

// The features of four states, those of channels from `first` on, a multiple of 4.
__device__ __forceinline__ std::uint32_t four_features(const uint2& states, const Channels& channels,
                                                       std::uint32_t first) {
    const uint4 words = *reinterpret_cast<const uint4*>(channels.of + first);
    const std::uint32_t of[4] = {words.x, words.y, words.z, words.w};
    std::int32_t features[4];
    KVCAST_UNROLL(4)
    for (std::uint32_t i = 0; i < 4; ++i) {
        const auto state = static_cast<std::int16_t>((i < 2 ? states.x : states.y) >> i % 2 * 16);
        features[i] = rounded_distance(state, bias_of(of[i]), feature_factor_of(of[i]));
    }
    return saturated_bytes(features);
}

// States to the workspace, and their features to shared memory where units are predicted from them. Of a
// tile's sums two neighbouring lanes exchange halves: each then has four outputs of a token.
template <std::uint32_t Tiles>
__device__ __forceinline__ void put_states(const Chain& c, const UnitTask& unit, const Channels& channels,
                                           Memory memory, const WarpPlace& at, const Totals<Tiles>& totals) {
    const std::uint32_t lane = lane_id(), later = lane % 2;  // by 8 tokens
    const std::uint32_t row = lane / 4 + 8 * later, half = lane % 4 / 2;
    const std::uint32_t width = unit.width, stride = unit.stride, resident = unit.resident, tokens = c.tokens;
    auto* states = reinterpret_cast<std::int16_t*>(memory.workspace + unit.states) +
                   std::uint64_t{c.first_token + row} * stride + at.output + 4 * half;
    KVCAST_UNROLL(kOutputTiles)  // so that totals lie in registers
    for (std::uint32_t n = 0; n < kOutputTiles; ++n) {
        const std::uint32_t first = at.output + n * kOutputTile;
        if (first >= width) break;
        std::byte* words = place_of<Tiles>(resident) + first / kUnitStep * Tiles * kFeatureBytes +
                           fragment_slot(lane / 4 * 4 + first % kUnitStep / 8) + (later + 2 * half) * 4;
        KVCAST_UNROLL(Tiles)
        for (std::uint32_t m = 0; m < Tiles; ++m) {
            const auto& sums = totals.v[m][n];
            const std::uint32_t now = saturated_pair(sums[0], sums[1]);
            const std::uint32_t then = saturated_pair(sums[2], sums[3]);
            const std::uint32_t other = __shfl_xor_sync(kFullWarp, later != 0 ? now : then, 1);
            const uint2 four = later != 0 ? uint2{other, then} : uint2{now, other};
            if (m * kTokenTile + row < tokens)
                *reinterpret_cast<uint2*>(states + m * kTokenTile * stride + n * kOutputTile) = four;
            if (resident == kNone) continue;
            *reinterpret_cast<std::uint32_t*>(words + m * kFeatureBytes) =
                four_features(four, channels, first + 4 * half);
        }
    }
}

// The unit whose states are put last, the one whose sums begin, and the one after that.
constexpr std::uint32_t kUnitsWithChannels = 3;

// What a block of threads has at hand beside its places in shared memory.
struct AtHand {
    ChainUnit units[kUnitsAtHand];
    Channels channels[kUnitsWithChannels];  // of units by turns
    Chain chain;
};
static_assert(sizeof(AtHand) <= kChainTaskBytes);

// Behind the places in shared memory there is the ring.
template <std::uint32_t Tiles, std::uint32_t Chunks>
__global__ void __launch_bounds__(kProjectThreads, 1)
    chain_tiles(Memory memory, const ChainTask* chains, const ChainTile* tiles, const UnitTask* tasks,
                std::uint32_t ring_at) {
    __shared__ AtHand shared;
    AtHand& held = *(Tiles == kMostHeight ? &shared : fixed_shared(&shared));
    Chain& c = held.chain;
    ChainUnit(&units)[kUnitsAtHand] = held.units;
    const auto channels_of = [&](std::uint32_t u) -> Channels& {
        return held.channels[u % kUnitsWithChannels];
    };
    if (threadIdx.x == 0) {
        const ChainTile tile = tiles[blockIdx.x];
        c.task = chains[tile.chain];
        c.first_token = tile.first_token;
        c.tokens = lesser(Tiles * kTokenTile, c.task.tokens - tile.first_token);
    }
    __syncthreads();
    tasks += c.task.first_unit;
    const std::uint32_t count = c.task.units, warp = warp_id();
    const auto at_hand = [&](std::uint32_t u) -> ChainUnit& { return units[u % kUnitsAtHand]; };
    for (std::uint32_t u = 0; u < kUnitsAhead && u < count; ++u) copy_task(units[u].task, tasks[u]);
    commit_copies();
    load_token_features<Tiles>(c, memory);
    wait_copies<0>();
    __syncthreads();
    const WarpPlace at = {warp * kWarpOutputs};
    const Coefficients<Tiles> coefficients(c, warp);
    coefficients.copy(units[0].task, memory);
    channels_of(0).copy(units[0].task);
    commit_copies();
    const bool counts = CodedSteps<Tiles>::mine(warp);
    for (std::uint32_t u = 0; u < 2 && u < count; ++u)
        CodedSteps<Tiles>(c, units[u].task, memory, counts).tell(units[u]);
    __syncthreads();
    MatrixRing<Chunks> ring(dynamic_shared<std::byte>() + ring_at + warp * Chunks * kChunkSlots * kSlotBytes,
                            units, at.output);
    ring.begin(&at_hand(lesser(2, count)));
    Terms<Tiles, Chunks> terms(units, at.output, ring);
    wait_copies<Chunks - 1>();
    coefficients.split_copied(units[0].task);
    Totals<Tiles> totals;
    // The predictions of a unit and, while other warps still make its states, the transform of the next one.
    for (std::uint32_t u = 0; u <= count; ++u) {
        __syncthreads();  // there are coefficients, and the features of all units before the predicted one
        const UnitTask& predicted = at_hand(u + kUnitsAtHand - 1).task;
        if (u + 1 < count) {
            coefficients.copy(at_hand(u + 1).task, memory);
            channels_of(u + 1).copy(at_hand(u + 1).task);
        }
        if (u + kUnitsAhead < count) copy_task(at_hand(u + kUnitsAhead).task, tasks[u + kUnitsAhead]);
        commit_copies();
        ring.mark();
        const CodedSteps<Tiles> coded(c, at_hand(u + 2).task, memory, counts && u + 2 < count);
        ring.extend(&at_hand(lesser(u + 2, count)));
        const std::uint32_t predictions = u == 0 ? 0 : predicted.term_count - 1;
        for (std::uint32_t k = 0; k <= predictions; ++k) {
            if (k == predictions) {
                if (u != 0) put_states<Tiles>(c, predicted, channels_of(u - 1), memory, at, totals);
                if (u == count) break;
                channels_of(u).start(totals, at);
            }
            terms.add(totals);
        }
        coded.tell(at_hand(u + 2));
        ring.wait_for_mark();
        if (u + 1 < count) coefficients.split_copied(at_hand(u + 1).task);
    }
    wait_copies<0>();
}

template <std::uint32_t Tiles, std::uint32_t Chunks>
cudaError_t launch_tiles(Memory memory, const ChainBatch& batch, cudaStream_t stream) {
    const std::size_t ring_at = Tiles * batch.shared_bytes;
    const std::size_t shared_bytes = ring_at + ring_bytes(Chunks);
    return launch(chain_tiles<Tiles, Chunks>, {batch.tile_count, kProjectThreads, shared_bytes}, stream,
                  memory, batch.chains, batch.tiles, batch.units, static_cast<std::uint32_t>(ring_at));
}

template <std::uint32_t Tiles>
cudaError_t launch_height(Memory memory, const ChainBatch& batch, cudaStream_t stream) {
    static_assert(std::size(kRingChunks) == 3);
    // The highest blocks are short of registers, and multiply for long enough with any ring.
    if constexpr (Tiles == kMostHeight)
        return launch_tiles<Tiles, kRingChunks[2]>(memory, batch, stream);
    else
        switch (batch.chunks) {
            case kRingChunks[0]:
                return launch_tiles<Tiles, kRingChunks[0]>(memory, batch, stream);
            case kRingChunks[1]:
                return launch_tiles<Tiles, kRingChunks[1]>(memory, batch, stream);
            case kRingChunks[2]:
                return launch_tiles<Tiles, kRingChunks[2]>(memory, batch, stream);
            default:
                return cudaErrorInvalidValue;
        }
}

}  // namespace

cudaError_t launch_chain(Memory memory, const ChainBatch& batch, cudaStream_t stream) {
    if (batch.tile_count == 0) return cudaSuccess;
    static_assert(kMostHeight == 4);
    switch (batch.height) {
        case 1:
            return launch_height<1>(memory, batch, stream);
        case 2:
            return launch_height<2>(memory, batch, stream);
        case 3:
            return launch_height<3>(memory, batch, stream);
        case 4:
            return launch_height<4>(memory, batch, stream);
        default:
            return cudaErrorInvalidValue;
    }
}

}  // namespace kvcast::kernels::cuda
