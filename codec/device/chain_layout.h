// Where a chain (kernels/cuda/tasks.h) keeps in shared memory what its units are predicted from.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "codec/klt/calibration.h"

namespace kvcast::device {

// Of a set of units, for one tile of tokens. A plane's features stay for as many layers as a later unit
// reaches back to; after that the next layer's take their place.
class ChainLayout {
  public:
    // Nothing where a chain does not hold the units: parts wider than a block of threads makes at once or
    // not of whole tiles of outputs, or more than `most_bytes`.
    static std::optional<ChainLayout> make(const CalibrationData& data, const Calibration::Set& set,
                                           std::size_t most_bytes);

    // Offsets in bytes, at multiples of 16. Where the features of a unit are; kernels::cuda::kNone for
    // those that nothing is predicted from.
    std::uint32_t features(std::size_t layer, std::size_t plane, std::size_t part) const;
    std::uint32_t tokens() const { return tokens_; }
    // Of the units of a chain by turns.
    std::uint32_t coefficients(std::size_t unit) const { return coefficients_[unit % 2]; }

    std::size_t bytes() const { return bytes_; }

  private:
    struct Plane {
        std::size_t layers = 0;  // that are kept
        std::size_t parts = 0;
        std::size_t offset = 0;
        std::size_t unit_bytes = 0;
    };

    std::size_t take(std::size_t bytes);

    std::vector<Plane> planes_;
    std::uint32_t tokens_ = 0;
    std::array<std::uint32_t, 2> coefficients_ = {};
    std::size_t bytes_ = 0;
};

}  // namespace kvcast::device
