// Units of a chain as its block of threads has them at hand, and the order in which a warp takes their terms.
#pragma once

#include "kernels/cuda/project.cuh"

namespace kvcast::kernels::cuda {

struct ChainUnit {
    UnitTask task;
    std::uint32_t coded_steps;  // of the transform: those that are worth multiplying

    __device__ std::uint32_t steps(std::uint32_t term) const {
        return term + 1 == task.term_count ? coded_steps : div_up(task.terms[term].inputs, kUnitStep);
    }
};

// Units are described well before they are reached, each in the place of one that is done with: the one
// before the present one, that, and the next ones. What a unit's transform needs is found out one unit later
// than its task arrives.
inline constexpr std::uint32_t kUnitsAhead = 3;
inline constexpr std::uint32_t kUnitsAtHand = kUnitsAhead + 2;

// Terms one after another, of each unit the transform first and then the predictions.
class TermOrder {
  public:
    // At the transform of the first unit.
    __device__ explicit TermOrder(const ChainUnit* units) : units_(units), unit_(units) { enter(); }

    __device__ const UnitTask& unit() const { return unit_->task; }
    __device__ const ProjectionTerm& term() const { return unit_->task.terms[term_]; }
    __device__ std::uint32_t steps() const { return unit_->steps(term_); }

    // Goes on to the next one, unless that belongs to `end`.
    __device__ __forceinline__ bool next(const ChainUnit* end) {
        const std::uint32_t count = unit_->task.term_count;
        const std::uint32_t next = term_ + 1 == count ? 0 : term_ + 1;
        if (next + 1 < count) {
            term_ = next;
            return true;
        }
        const ChainUnit* following = unit_ + 1 == units_ + kUnitsAtHand ? units_ : unit_ + 1;
        if (following == end) return false;
        unit_ = following;
        enter();
        return true;
    }

  private:
    __device__ void enter() { term_ = unit_->task.term_count - 1; }

    const ChainUnit* units_;  // kUnitsAtHand of them, by turns
    const ChainUnit* unit_;
    std::uint32_t term_ = 0;
};

}  // namespace kvcast::kernels::cuda
