// A warp's matrices on their way through shared memory: the slots of all terms of a chain, in the order of
// their use, across terms and units.
//
// A lane copies the bytes that it will use itself, and asks nobody whether they have arrived. Each slot is a
// group of the lane's copies (kernels/cuda/copy.cuh), and there are always as many groups behind the slot
// that is read as the ring has places; so the number of groups that may be open is known where this is
// compiled. Where no slot can be named yet, an empty group takes its turn. Other groups between them do no
// harm: the lane then waits for a slot more than it needs.
#pragma once

#include "kernels/cuda/chain_units.cuh"
#include "kernels/cuda/copy.cuh"
#include "kernels/cuda/shared_memory.cuh"

namespace kvcast::kernels::cuda {

template <std::uint32_t Slots>
class MatrixRing {
  public:
    // At `place`, kSlotBytes for each slot. Of a warp without outputs there is nothing to copy.
    __device__ MatrixRing(std::byte* place, const ChainUnit* units, std::uint32_t output)
        : place_(fixed_shared(place + lane_id() * 16)), order_(units), output_(output) {}

    // Starts with units before `end`, which is their place behind the last one.
    __device__ void begin(const ChainUnit* end) {
        end_ = end;
        begin_term();
        KVCAST_UNROLL(1)
        for (std::uint32_t i = 0; i + 1 < Slots; ++i) send();
    }

    __device__ const ChainUnit* end() const { return end_; }

    // Units before `end` are at hand, and one that was before is no longer when all of its slots are used.
    __device__ __forceinline__ void extend(const ChainUnit* end) {
        end_ = end;
        find_slots();
    }

    // The next slot, of which there must be one. The one before has been used, and another one comes to its
    // place.
    __device__ __forceinline__ MatrixSlot take() {
        KVCAST_UNROLL(1)
        do {
            send();
        } while ((filled_ >> (Slots - 1) & 1) == 0);
        wait_copies<Slots - 1>();
        MatrixSlot slot;
        for (std::uint32_t n = 0; n < kOutputTiles; ++n) {
            const uint4 v = *reinterpret_cast<const uint4*>(place_ + at_ + n * 2 * kFragmentBytes);
            slot.words[n][0] = v.x;
            slot.words[n][1] = v.y;
            slot.words[n][2] = v.z;
            slot.words[n][3] = v.w;
        }
        return slot;
    }

    // How many groups there have been. Until all copies are done that the thread asked for in a group of
    // their own when there had been `sent`.
    __device__ std::uint32_t sent() const { return sent_; }
    __device__ __forceinline__ void wait_since(std::uint32_t sent) const {
        if (sent_ - sent >= Slots / 2) {
            wait_copies<Slots / 2>();
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
        filled_ <<= 1;
        if (left_ != 0) {
            for (std::uint32_t n = 0; n < kOutputTiles; ++n)
                copy_16(place_ + at_ + n * 2 * kFragmentBytes, next_ + n * 2 * kFragmentBytes);
            next_ += kSlotBytes;
            --left_;
            filled_ |= 1;
        }
        commit_copies();
        ++sent_;
        at_ = at_ + kSlotBytes == Slots * kSlotBytes ? 0 : at_ + kSlotBytes;
    }

    std::byte* place_;  // this lane's
    TermOrder order_;   // where copies are
    std::uint32_t output_;
    const ChainUnit* end_ = nullptr;
    std::uint32_t left_ = 0;              // slots of the term that are not on their way
    const std::uint8_t* next_ = nullptr;  // the first of them
    std::uint32_t at_ = 0;                // the place that is read next, and written then
    std::uint32_t filled_ = 0;            // which of the last groups have slots, the last one lowest
    std::uint32_t sent_ = 0;
};

}  // namespace kvcast::kernels::cuda
