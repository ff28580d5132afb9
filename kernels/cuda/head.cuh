// What a warp reads of a head of the profiles delta and lossless before its channels: rows that are stored
// exactly, and how every channel is read. FORMAT.md, section 7.
#pragma once

#include "kernels/cuda/exact_rows.cuh"
#include "kernels/cuda/platform.cuh"
#include "kernels/cuda/rows.cuh"
#include "kernels/cuda/tasks.h"
#include "kernels/cuda/warp_rans.cuh"

namespace kvcast::kernels::cuda {

// How a channel is read, and what its symbols stand for. At first its side information lies there: up to
// three numbers.
class alignas(16) Channel {
  public:
    static constexpr std::uint32_t kNumbers = 8;

    Channel() = default;
    // Of states, which are center + guarded values.
    __device__ Channel(const ClassReader& c, std::int32_t center, std::uint32_t guard_bits)
        : center_(center), step_(1 << (guard_bits + (c.planes <= WarpReader::kBytePlanes ? c.planes : 0))) {
        least_ = center - kSymbolZero * step_ - c.half * (1 << guard_bits);
        const bool inside = least_ >= -32768 && least_ + static_cast<std::int32_t>(kEscape) * step_ <= 32767;
        coding_ = c.table << 8 | (inside ? kInside : 0) | c.planes << 1 | (c.zero ? 1 : 0);
    }
    // Of elements, whose exponents are center - values.
    __device__ Channel(const StepCoding& c, std::int32_t center)
        : coding_(c.table << 8 | c.planes << 1), center_(center), step_(0), least_(0) {}

    __device__ __forceinline__ StepCoding coding() const { return {coding_ >> 8, planes()}; }
    __device__ __forceinline__ std::uint32_t planes() const { return coding_ >> 1 & 31u; }
    __device__ __forceinline__ bool zero() const { return (coding_ & 1u) != 0; }
    __device__ __forceinline__ ClassReader reader() const { return {coding(), (1 << planes()) / 2, zero()}; }
    // A state, or an exponent.
    __device__ __forceinline__ std::int32_t center() const { return center_; }

    // With at most kBytePlanes raw bits: from symbol to symbol of states; the state of symbol 0 and raw bits
    // 0; whether no symbol but an escape needs saturation.
    __device__ __forceinline__ std::int32_t step() const { return step_; }
    __device__ __forceinline__ std::int32_t least() const { return least_; }
    __device__ __forceinline__ bool inside() const { return (coding_ & kInside) != 0; }

  private:
    static constexpr std::uint32_t kInside = 64;

    std::uint32_t coding_;  // the table's place, then bits
    std::int32_t center_;
    std::int32_t step_;
    std::int32_t least_;
};
static_assert(sizeof(Channel) == Channel::kNumbers * sizeof(std::int16_t));

// Shared memory that a warp's channels take.
constexpr std::uint32_t channel_bytes(std::uint32_t most_channels) {
    return most_channels * static_cast<std::uint32_t>(sizeof(Channel));
}

// Where the stored bits, or states, of a head's body begin in the workspace.
__device__ __forceinline__ std::byte* body_of(const PlaneTask& p, std::uint32_t head, std::byte* workspace) {
    return workspace + p.body +
           std::uint64_t{head} * p.channels * p.body_stride * element_bytes(!p.quantised, p.source);
}

// work(plane, head of it) for all heads of a block, planes being copies: stores cannot change them.
template <typename Work>
__device__ __forceinline__ void for_heads(const BlockTask& block, const PlaneTask* planes, Work work) {
    const std::uint32_t first_heads = planes[block.plane].heads;
    KVCAST_UNROLL(1)
    for (std::uint32_t head = block.first_head; head < block.end_head; ++head) {
        const bool second = head >= first_heads;
        const PlaneTask plane = planes[block.plane + (second ? 1 : 0)];
        work(plane, head - (second ? first_heads : 0));
    }
}

// Its functions are called by all lanes of a warp together.
class HeadReader {
  public:
    __device__ __forceinline__ HeadReader(WarpReader& in, const PlaneTask& plane, std::uint32_t head,
                                          Channel* channels)
        : in_(in), p_(plane), head_(head), channels_(channels) {}

    // To the workspace, or, if `direct`, to the plane's rows. False, in all lanes, where a model is out of
    // range.
    __device__ __forceinline__ bool exact_rows(bool direct, std::byte* workspace) {
        const auto row_bytes = std::uint64_t{element_bytes(true, p_.source)} * p_.channels;
        std::byte* rows = workspace + p_.rows + head_ * row_bytes * p_.exact_rows;
        const auto row = [&](std::uint32_t t) {
            if (!direct) return rows + t * row_bytes;
            return reinterpret_cast<std::byte*>(row_of(p_.out, t) + head_ * p_.out.head_bytes);
        };
        return read_exact_rows(in_, p_.source, p_.exact_rows, p_.channels,
                               [&](std::uint32_t t, std::uint32_t c, std::uint32_t bits) {
                                   put_bits(row(t), p_.source, c, bits);
                               });
    }

    // Classes, of anchors too, and means; or centers and tables. False, in all lanes, where one is out of
    // range.
    __device__ __forceinline__ bool side_vectors() {
        bool fits = true;
        KVCAST_UNROLL(1)
        for (std::uint32_t i = 0; i < (p_.quantised ? 3u : 2u); ++i) {
            if (p_.quantised && i == 1 && p_.anchor_group == 0) continue;
            const bool means = p_.quantised && i == 2;
            const auto last = static_cast<std::int32_t>(p_.quantised ? kClasses - 1
                                                        : i == 0     ? exponent_mask(p_.source)
                                                                     : 15);
            fits = in_.vector(p_.channels, means ? -kMeanLimit : 0, means ? kMeanLimit : last, numbers(0) + i,
                              Channel::kNumbers) &&
                   fits;
        }
        return fits;
    }

    // Channels, in the place of their side information.
    __device__ __forceinline__ void find_channels() {
        KVCAST_UNROLL(1)
        for (std::uint32_t c = lane_id(); c < p_.channels; c += kLanes) channels_[c] = channel_of(c);
        __syncwarp();
    }

    // From its side information.
    __device__ __forceinline__ Channel channel_of(std::uint32_t c) const {
        const std::int16_t* n = numbers(c);
        if (p_.quantised) {
            const ClassReader reader = in_.reader_of(static_cast<unsigned>(n[0]));
            return {reader, mean_state(n[2], p_.guard_bits), p_.guard_bits};
        }
        const std::uint32_t table = in_.exponents_of(static_cast<std::uint32_t>(n[1]));
        return {{table, mantissa_bits(p_.source) + 1}, n[0]};
    }
    // Of the tokens between anchors.
    __device__ __forceinline__ ClassReader delta_of(std::uint32_t c) const {
        return in_.reader_of(static_cast<unsigned>(numbers(c)[1]));
    }

  private:
    __device__ __forceinline__ std::int16_t* numbers(std::uint32_t c) const {
        return reinterpret_cast<std::int16_t*>(channels_) + c * Channel::kNumbers;
    }

    WarpReader& in_;
    const PlaneTask& p_;
    std::uint32_t head_;
    Channel* channels_;
};

}  // namespace kvcast::kernels::cuda
