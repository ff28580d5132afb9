#include <algorithm>
#include <cstring>

#include "kernels/backends.h"
#include "kernels/ops.h"

namespace kvcast::kernels {
namespace {

constexpr std::size_t kOutputs = 16;  // of a pair, a quad or a tile
constexpr std::size_t kTileInputs = 64;

struct Plain {
    std::span<const std::int16_t> entries;  // [outputs][inputs]
    std::size_t outputs;
    std::size_t inputs;

    std::size_t rows() const { return (outputs + kOutputs - 1) / kOutputs; }
    std::size_t columns(std::size_t of) const { return (inputs + of - 1) / of; }
};

// To [outputs by 16][inputs by 4 bytes][output]: what each row of `bytes` [outputs][row_bytes] has there. The
// last bytes of a row may be fewer.
void interleave(const std::uint8_t* bytes, std::size_t outputs, std::size_t row_bytes, std::uint8_t* out) {
    constexpr std::size_t kStep = 4;
    const std::size_t columns = (row_bytes + kStep - 1) / kStep;
    for (std::size_t o = 0; o < outputs; ++o) {
        const std::uint8_t* row = bytes + o * row_bytes;
        std::uint8_t* to = out + (o / kOutputs * columns * kOutputs + o % kOutputs) * kStep;
        std::size_t at = 0;
        for (; at + kStep <= row_bytes; at += kStep) std::memcpy(to + at * kOutputs, row + at, kStep);
        if (at < row_bytes) std::memcpy(to + at * kOutputs, row + at, row_bytes - at);
    }
}

std::vector<MatrixPair> pack_pairs(const Plain& m) {
    std::vector<MatrixPair> pairs(m.rows() * m.columns(2));
    interleave(reinterpret_cast<const std::uint8_t*>(m.entries.data()), m.outputs,
               m.inputs * sizeof(std::int16_t), reinterpret_cast<std::uint8_t*>(pairs.data()));
    return pairs;
}

std::vector<MatrixQuad> pack_quads(const Plain& m) {
    constexpr int kZero = 128;
    std::vector<std::uint8_t> bytes(m.entries.size());
    std::transform(m.entries.begin(), m.entries.end(), bytes.begin(),
                   [](int entry) { return static_cast<std::uint8_t>(entry + kZero); });
    std::vector<MatrixQuad> quads(m.rows() * m.columns(4));
    for (MatrixQuad& quad : quads) std::memset(&quad, kZero, sizeof quad);
    interleave(bytes.data(), m.outputs, m.inputs, reinterpret_cast<std::uint8_t*>(quads.data()));
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
    for (std::size_t o = 0; o < m.outputs; ++o) {
        for (std::size_t i = 0; i < m.inputs; ++i) {
            const auto entry = static_cast<std::uint16_t>(m.entries[o * m.inputs + i]);
            MatrixTile* tile = &tiles[(o / kOutputs * columns + i / kTileInputs) * limbs];
            const std::size_t at = place_in_tile(o % kOutputs, i % kTileInputs);
            if (wide) tile++->bytes[at] = static_cast<std::uint8_t>(entry >> 8);
            tile->bytes[at] = static_cast<std::uint8_t>(entry);
        }
    }
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
