// A warp's matrices on their way through shared memory: the slots of all terms of a chain, in the order of
// their use, across terms and units, by chunks of up to kChunkSlots of one term.
//
// A lane copies the bytes that it will use itself, and asks nobody whether they have arrived. Each chunk is a
// group of the lane's copies (kernels/cuda/copy.cuh), and there are always as many groups from the chunk that
// is read on as the ring has places; so the number of groups that may be open is known where this is
// compiled. Where no chunk can be named yet, an empty group takes its turn. Other groups between them do no
// harm: the lane then waits for a chunk more than it needs.
#pragma once

#include "kernels/cuda/chain_units.cuh"
#include "kernels/cuda/copy.cuh"
#include "kernels/cuda/shared_memory.cuh"

namespace kvcast::kernels::cuda {

// A slot of a lane's chunk.
__device__ __forceinline__ MatrixSlot load_slot(const std::byte* chunk, std::uint32_t index) {
    MatrixSlot slot;
    for (std::uint32_t n = 0; n < kOutputTiles; ++n) {
        const std::byte* at = chunk + index * kSlotBytes + n * 2 * kFragmentBytes;
        const uint4 v = *reinterpret_cast<const uint4*>(at);
        slot.words[n][0] = v.x;
        slot.words[n][1] = v.y;
        slot.words[n][2] = v.z;
        slot.words[n][3] = v.w;
    }
    return slot;
}

template <std::uint32_t Chunks>
class MatrixRing {
  public:
    // At `place`, kChunkSlots slots for each chunk. Of a warp without outputs there is nothing to copy.
    __device__ MatrixRing(std::byte* place, const ChainUnit* units, std::uint32_t output)
        : place_(fixed_shared(place + lane_id() * 16)), order_(units), output_(output) {}

    // Starts with units before `end`, which is their place behind the last one.
    __device__ void begin(const ChainUnit* end) {
        end_ = end;
        begin_term();
        KVCAST_UNROLL(1)
        for (std::uint32_t i = 0; i + 1 < Chunks; ++i) send();
    }

    __device__ const ChainUnit* end() const { return end_; }

    // Units before `end` are at hand, and one that was before is no longer when all of its slots are used.
    __device__ __forceinline__ void extend(const ChainUnit* end) {
        end_ = end;
        find_slots();
    }

    // The next chunk, of which there must be one, as this lane has it. The one before has been used, and
    // another one comes to its place.
    __device__ __forceinline__ const std::byte* take() {
        KVCAST_UNROLL(1)
        do {
            send();
        } while ((filled_ >> (Chunks - 1) & 1) == 0);
        wait_copies<Chunks - 1>();
        return place_ + at_;
    }

    // Until all copies are done that the thread asked for, in a group of their own, at the last mark.
    __device__ void mark() { since_ = 0; }
    __device__ __forceinline__ void wait_for_mark() const {
        if (since_ >= Chunks / 2) {
            wait_copies<Chunks / 2>();
        } else {
            wait_copies<0>();
        }
    }

  private:
    __device__ __forceinline__ void begin_term() {
        const ProjectionTerm& term = order_.term();
        left_ = output_ < order_.unit().width ? slots_of_steps(order_.steps(), term.limbs) : 0;
        next_ = slots_at(term, output_, 0);
    }

    // Goes on to a term that has some.
    __device__ __forceinline__ void find_slots() {
        while (left_ == 0 && order_.next(end_)) begin_term();
    }

    __device__ __forceinline__ void send() {
        find_slots();
        filled_ = filled_ << 1 | (left_ != 0 ? 1 : 0);
        KVCAST_UNROLL(kChunkSlots)
        for (std::uint32_t i = 0; i < kChunkSlots; ++i) {
            if (i < left_) copy_slot(i * kSlotBytes);
        }
        commit_copies();
        next_ += kChunkBytes;
        left_ -= lesser(left_, kChunkSlots);
        at_ = at_ + kChunkBytes == Chunks * kChunkBytes ? 0 : at_ + kChunkBytes;
        ++since_;
    }

    __device__ __forceinline__ void copy_slot(std::uint32_t offset) const {
        for (std::uint32_t n = 0; n < kOutputTiles; ++n) {
            const std::uint32_t tile = offset + n * 2 * kFragmentBytes;
            copy_16(place_ + at_ + tile, next_ + tile);
        }
    }

    static constexpr std::uint32_t kChunkBytes = kChunkSlots * kSlotBytes;

    std::byte* place_;  // this lane's
    TermOrder order_;   // where copies are
    std::uint32_t output_;
    const ChainUnit* end_ = nullptr;
    std::uint32_t left_ = 0;              // slots of the term that are not on their way
    const std::uint8_t* next_ = nullptr;  // the first of them
    std::uint32_t at_ = 0;                // the place that is read next, and written then
    std::uint32_t filled_ = 0;            // which of the last groups are chunks, the last one lowest
    std::uint32_t since_ = 0;             // groups since the mark
};

}  // namespace kvcast::kernels::cuda
