// A matrix of a unit in guarded memory, as kernels take it, and the scalar backend's product with it.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "kernels/cuda/limbs.h"
#include "kernels/ops.h"
#include "tests/simt/simt.h"

namespace kvcast::test {

// An array with one element per output: as many as the tiles of a matrix have.
template <typename T>
std::unique_ptr<simt::Guarded<T>> by_output(std::uint32_t outputs) {
    return std::make_unique<simt::Guarded<T>>(kernels::cuda::limb_tiles(outputs) *
                                              kernels::cuda::kOutputTile);
}

// Any bias that leaves room for sums, any factor of features.
template <typename Random>
void draw_channels(simt::Guarded<std::uint32_t>& channels, Random& random) {
    for (auto& c : channels) {
        const auto bias = static_cast<std::int16_t>(static_cast<int>(random() % 60000) - 30000);
        c = kernels::cuda::channel_word(bias, static_cast<std::int16_t>(128 + random() % 32640));
    }
}

class DeviceMatrix {
  public:
    // `entries` is [output][input]. Shifts are drawn.
    template <typename Random>
    DeviceMatrix(std::vector<std::int16_t> entries, std::uint32_t outputs, Random& random)
        : entries_(std::move(entries)),
          outputs_(outputs),
          inputs_(static_cast<std::uint32_t>(entries_.size() / outputs)),
          shifts_(by_output<std::uint8_t>(outputs)) {
        const kernels::cuda::LimbMatrix limbs = kernels::cuda::to_limbs(entries_, outputs, inputs_);
        limbs_ = limbs.limbs;
        slots_ = limbs.slots;
        bytes_ = std::make_unique<simt::Guarded<std::uint8_t>>(std::span<const std::uint8_t>(limbs.bytes));
        for (auto& s : *shifts_) s = static_cast<std::uint8_t>(4 + random() % 20);
    }

    std::uint32_t limbs() const { return limbs_; }

    void describe(kernels::cuda::ProjectionTerm& term) const {
        term.matrix = bytes_->data();
        term.shifts = shifts_->data();
        term.limbs = limbs_;
        term.slots = slots_;
        term.inputs = inputs_;
    }

    // To sums [token][output].
    void add(const std::int16_t* features, std::size_t stride, std::uint32_t tokens, std::int32_t* sums,
             std::int32_t multiplier = 1) const {
        const kernels::PackedMatrix packed = kernels::pack_matrix(entries_, outputs_, inputs_);
        kernels::scalar_ops().project({features, stride, inputs_, entries_.data(), &packed, shifts_->data(),
                                       outputs_, tokens, sums, outputs_, multiplier});
    }

  private:
    std::vector<std::int16_t> entries_;
    std::uint32_t outputs_;
    std::uint32_t inputs_;
    std::uint32_t limbs_ = 0;
    std::uint32_t slots_ = 0;
    std::unique_ptr<simt::Guarded<std::uint8_t>> shifts_;
    std::unique_ptr<simt::Guarded<std::uint8_t>> bytes_;
};

}  // namespace kvcast::test
