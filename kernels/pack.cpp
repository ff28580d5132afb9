#include <algorithm>

#include "kernels/backends.h"
#include "kernels/ops.h"

namespace kvcast::kernels {
namespace {

constexpr std::size_t kOutputs = 16;  // of a pair, a quad or a tile
constexpr std::size_t kTileInputs = 64;

// A matrix and how many of its outputs go together.
struct Plain {
    std::span<const std::int16_t> entries;
    std::size_t outputs;
    std::size_t inputs;

    std::size_t rows() const { return (outputs + kOutputs - 1) / kOutputs; }
    std::size_t columns(std::size_t of) const { return (inputs + of - 1) / of; }
};

// put(entry, its output within 16, the 16 that it is among, its input) for all entries.
template <typename Put>
void for_entries(const Plain& m, Put put) {
    for (std::size_t o = 0; o < m.outputs; ++o) {
        for (std::size_t i = 0; i < m.inputs; ++i)
            put(m.entries[o * m.inputs + i], o % kOutputs, o / kOutputs, i);
    }
}

std::vector<MatrixPair> pack_pairs(const Plain& m) {
    const std::size_t columns = m.columns(2);
    std::vector<MatrixPair> pairs(m.rows() * columns);
    for_entries(m, [&](std::int16_t entry, std::size_t o, std::size_t row, std::size_t i) {
        pairs[row * columns + i / 2].lanes[o][i % 2] = entry;
    });
    return pairs;
}

std::vector<MatrixQuad> pack_quads(const Plain& m) {
    constexpr std::uint8_t kZero = 128;
    const std::size_t columns = m.columns(4);
    std::vector<MatrixQuad> quads(m.rows() * columns);
    for (MatrixQuad& quad : quads) std::fill_n(quad.lanes[0], sizeof quad, kZero);
    for_entries(m, [&](std::int16_t entry, std::size_t o, std::size_t row, std::size_t i) {
        quads[row * columns + i / 4].lanes[o][i % 4] = static_cast<std::uint8_t>(entry + kZero);
    });
    return quads;
}

// Where a tile has an entry, in bytes.
std::size_t place_in_tile(std::size_t output, std::size_t input) {
    const std::size_t place = input % 32 * 2 + input / 32;
    return place / 4 * kTileInputs + output * 4 + place % 4;
}

std::vector<MatrixTile> pack_tiles(const Plain& m, bool wide) {
    const std::size_t limbs = wide ? 2 : 1, columns = m.columns(kTileInputs);
    std::vector<MatrixTile> tiles(m.rows() * columns * limbs);
    for_entries(m, [&](std::int16_t entry, std::size_t o, std::size_t row, std::size_t i) {
        const auto bits = static_cast<std::uint16_t>(entry);
        MatrixTile* tile = &tiles[(row * columns + i / kTileInputs) * limbs];
        const std::size_t at = place_in_tile(o, i % kTileInputs);
        if (wide) tile++->bytes[at] = static_cast<std::uint8_t>(bits >> 8);
        tile->bytes[at] = static_cast<std::uint8_t>(bits);
    });
    return tiles;
}

}  // namespace

PackedMatrix pack_matrix(std::span<const std::int16_t> matrix, std::size_t outputs, std::size_t inputs) {
    const Plain m = {matrix.first(outputs * inputs), outputs, inputs};
    PackedMatrix out;
    out.wide = std::any_of(m.entries.begin(), m.entries.end(), [](int e) { return e < -128 || e > 127; });
    out.pairs = pack_pairs(m);
    if (avx512_available() && !out.wide) out.quads = pack_quads(m);
    if (amx_available()) out.tiles = pack_tiles(m, out.wide);
    return out;
}

}  // namespace kvcast::kernels
