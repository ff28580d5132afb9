#include "codec/device/chain_layout.h"

#include <algorithm>

#include "codec/device/image.h"
#include "kernels/cuda/tasks.h"

namespace kvcast::device {
namespace {

namespace cuda = kernels::cuda;

// How many layers of a plane's features there are at once. Those that a unit of plane q is predicted from,
// `back` layers before, are still there if the unit comes before that of the layer that takes their place.
std::vector<std::size_t> kept_layers(const CalibrationData& data, const Calibration::Set& set) {
    std::vector<std::size_t> kept(data.parts.size());
    for (std::size_t layer = 0; layer < data.layout.layers; ++layer) {
        for (std::size_t q = 0; q < data.parts.size(); ++q) {
            for (std::size_t part = 0; part < data.parts[q]; ++part) {
                for (const PredictionTerm& t : set.unit(layer, q, part).terms) {
                    if (t.source == PredictionTerm::Source::kTokens) continue;
                    kept[t.plane] = std::max(kept[t.plane], t.layers_back + (q >= t.plane ? 1 : 0));
                }
            }
        }
    }
    return kept;
}

bool holds(const CalibrationData& data, std::size_t plane) {
    return data.part_width(plane) <= cuda::kProjectOutputs && data.part_width(plane) % cuda::kOutputTile == 0;
}

}  // namespace

std::size_t ChainLayout::take(std::size_t bytes) {
    const std::size_t offset = bytes_;
    bytes_ += round_up(bytes, 16);
    return offset;
}

std::optional<ChainLayout> ChainLayout::make(const CalibrationData& data, const Calibration::Set& set,
                                             std::size_t most_bytes) {
    ChainLayout out;
    std::uint32_t widest = 0;
    const std::vector<std::size_t> kept = kept_layers(data, set);
    for (std::size_t p = 0; p < data.parts.size(); ++p) {
        if (!holds(data, p)) return std::nullopt;
        const std::uint32_t width = u32(data.part_width(p));
        const std::size_t unit_bytes = cuda::narrow_bytes(width);
        out.planes_.push_back(
            {kept[p], data.parts[p], out.take(kept[p] * data.parts[p] * unit_bytes), unit_bytes});
        widest = std::max(widest, width);
    }
    for (std::uint32_t& offset : out.coefficients_) offset = u32(out.take(cuda::split_bytes(widest)));
    if (data.tokens.features != 0) {
        out.tokens_ = u32(out.take(cuda::narrow_bytes(u32(data.tokens.features))));
    }
    if (out.bytes_ > most_bytes) return std::nullopt;
    return out;
}

std::uint32_t ChainLayout::features(std::size_t layer, std::size_t plane, std::size_t part) const {
    const Plane& p = planes_[plane];
    if (p.layers == 0) return cuda::kNone;
    return u32(p.offset + (layer % p.layers * p.parts + part) * p.unit_bytes);
}

}  // namespace kvcast::device
