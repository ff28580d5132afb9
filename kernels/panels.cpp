#include <algorithm>

#include "kernels/backends.h"
#include "kernels/ops.h"

namespace kvcast::kernels {
namespace {

constexpr std::size_t kTileOutputs = 16;
constexpr std::size_t kTileInputs = 64;

// Where a tile has an entry, in bytes.
std::size_t place_of(std::size_t output, std::size_t input) {
    const std::size_t place = input % 32 * 2 + input / 32;
    return place / 4 * kTileInputs + output * 4 + place % 4;
}

}  // namespace

std::vector<MatrixPanel> pack_panels(std::span<const std::int16_t> matrix, std::size_t outputs,
                                     std::size_t inputs) {
    const std::size_t pairs = (inputs + 1) / 2;
    std::vector<MatrixPanel> panels((outputs + 15) / 16 * pairs);
    for (std::size_t o = 0; o < outputs; ++o) {
        for (std::size_t i = 0; i < inputs; ++i)
            panels[o / 16 * pairs + i / 2].lanes[o % 16][i % 2] = matrix[o * inputs + i];
    }
    return panels;
}

TiledMatrix tile_matrix(std::span<const std::int16_t> matrix, std::size_t outputs, std::size_t inputs) {
    TiledMatrix out;
    if (!amx_available()) return out;
    const auto entries = matrix.first(outputs * inputs);
    out.wide = std::any_of(entries.begin(), entries.end(), [](int e) { return e < -128 || e > 127; });
    const std::size_t limbs = out.wide ? 2 : 1, blocks = (inputs + kTileInputs - 1) / kTileInputs;
    out.tiles.resize((outputs + kTileOutputs - 1) / kTileOutputs * blocks * limbs);
    for (std::size_t o = 0; o < outputs; ++o) {
        for (std::size_t i = 0; i < inputs; ++i) {
            const auto entry = static_cast<std::uint16_t>(entries[o * inputs + i]);
            MatrixTile* tile = &out.tiles[(o / kTileOutputs * blocks + i / kTileInputs) * limbs];
            const std::size_t at = place_of(o % kTileOutputs, i % kTileInputs);
            if (out.wide) tile++->bytes[at] = static_cast<std::uint8_t>(entry >> 8);
            tile->bytes[at] = static_cast<std::uint8_t>(entry);
        }
    }
    return out;
}

}  // namespace kvcast::kernels
