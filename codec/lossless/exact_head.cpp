#include "codec/lossless/exact_head.h"

#include <array>

namespace kvcast {
namespace {

using entropy::ExponentModel;
using kernels::Dtype;

ExponentModel model_of(Dtype dtype, std::span<const std::uint32_t> bits) {
    const unsigned mantissa = kernels::mantissa_bits(dtype);
    const std::uint32_t range = kernels::exponent_mask(dtype);
    std::array<std::uint32_t, 256> counts = {};
    for (const std::uint32_t b : bits) ++counts[b >> mantissa & range];
    return entropy::cheapest_exponent_model(std::span(counts).first(range + 1));
}

constexpr std::int32_t kLastTable = entropy::kExponentTables - 1;

}  // namespace

void write_exact_row(entropy::BlockWriter& out, Dtype dtype, std::span<const std::uint32_t> bits) {
    const ExponentModel model = model_of(dtype, bits);
    out.word(static_cast<std::uint16_t>(model.center | model.table << 8));
    out.floats(model, dtype, bits);
}

bool read_exact_row(entropy::BlockReader& in, Dtype dtype, std::span<std::uint32_t> bits) {
    const std::uint32_t word = in.word();
    const ExponentModel model = {word & 255u, word >> 8 & 15u};
    in.floats(model, dtype, bits.size(), bits.data());
    return word < 4096 && model.center <= kernels::exponent_mask(dtype);
}

void write_exact_body(entropy::BlockWriter& out, Dtype dtype, const std::uint32_t* tile,
                      std::size_t tile_stride, std::size_t channels, std::size_t tokens,
                      ExactModels& models) {
    models.centers.resize(channels);
    models.tables.resize(channels);
    for (std::size_t c = 0; c < channels; ++c) {
        const ExponentModel m = model_of(dtype, {tile + c * tile_stride, tokens});
        models.centers[c] = static_cast<std::int16_t>(m.center);
        models.tables[c] = static_cast<std::int16_t>(m.table);
    }
    out.vector(models.centers);
    out.vector(models.tables);
    for (std::size_t c = 0; c < channels; ++c) {
        const ExponentModel m = {static_cast<std::uint32_t>(models.centers[c]),
                                 static_cast<std::uint32_t>(models.tables[c])};
        out.floats(m, dtype, {tile + c * tile_stride, tokens});
    }
}

bool read_exact_body(entropy::BlockReader& in, Dtype dtype, std::uint32_t* tile, std::size_t tile_stride,
                     std::size_t channels, std::size_t tokens, ExactModels& models) {
    models.centers.resize(channels);
    models.tables.resize(channels);
    const auto last_exponent = static_cast<std::int32_t>(kernels::exponent_mask(dtype));
    const bool centers_fit = in.vector(models.centers, 0, last_exponent);
    const bool tables_fit = in.vector(models.tables, 0, kLastTable);
    for (std::size_t c = 0; c < channels; ++c) {
        const ExponentModel m = {static_cast<std::uint32_t>(models.centers[c]),
                                 static_cast<std::uint32_t>(models.tables[c])};
        in.floats(m, dtype, tokens, tile + c * tile_stride);
    }
    return centers_fit && tables_fit;
}

}  // namespace kvcast
