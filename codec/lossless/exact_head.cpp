#include "codec/lossless/exact_head.h"

#include <algorithm>
#include <array>

namespace kvcast {
namespace {

using entropy::ExponentModel;
using kernels::Dtype;

constexpr std::int32_t kLastTable = entropy::kExponentTables - 1;
constexpr std::size_t kRowsAtOnce = 4;  // whose models are chosen together

}  // namespace

void write_exact_row(entropy::BlockWriter& out, Dtype dtype, const void* row, std::size_t count) {
    ExponentModel model = {};
    entropy::cheapest_exponent_models(out.ops(), {row, 0, 1, count, dtype}, {&model, 1});
    out.word(static_cast<std::uint16_t>(model.center | model.table << 8));
    out.floats(model, dtype, count, row);
}

void read_exact_rows(std::span<entropy::BlockReader* const> readers, Dtype dtype, std::span<ExactBody> rows,
                     std::size_t count) {
    std::array<kernels::FloatStrip, entropy::BlockReader::kMostAbreast> strips;
    for (std::size_t i = 0; i < readers.size(); ++i) {
        const std::uint32_t word = readers[i]->word(), center = word & 255u;
        strips[i] = {entropy::exponent_decodings() + (word >> 8 & 15u), center, rows[i].tile};
        rows[i].fits = rows[i].fits && word < 4096 && center <= kernels::exponent_mask(dtype);
    }
    entropy::BlockReader::floats(readers, {strips.data(), readers.size()}, dtype, count, {});
}

void write_exact_body(entropy::BlockWriter& out, Dtype dtype, const void* tile, std::size_t tile_stride,
                      std::size_t channels, std::size_t tokens, ExactModels& models, FetchAhead& ahead) {
    models.centers.resize(channels);
    models.tables.resize(channels);
    const std::size_t stride_bytes = tile_stride * kernels::dtype_bytes(dtype);
    const auto* rows = static_cast<const std::uint8_t*>(tile);
    for (std::size_t c = 0; c < channels; c += kRowsAtOnce) {
        ahead.step();
        std::array<ExponentModel, kRowsAtOnce> chosen;
        const std::size_t some = std::min(kRowsAtOnce, channels - c);
        entropy::cheapest_exponent_models(
            out.ops(), {rows + c * stride_bytes, stride_bytes, some, tokens, dtype}, chosen);
        for (std::size_t k = 0; k < some; ++k) {
            models.centers[c + k] = static_cast<std::int16_t>(chosen[k].center);
            models.tables[c + k] = static_cast<std::int16_t>(chosen[k].table);
        }
    }
    out.vector(models.centers);
    out.vector(models.tables);
    for (std::size_t c = 0; c < channels; ++c) {
        const ExponentModel m = {static_cast<std::uint32_t>(models.centers[c]),
                                 static_cast<std::uint32_t>(models.tables[c])};
        out.floats(m, dtype, tokens, rows + c * stride_bytes);
    }
}

void read_exact_bodies(std::span<entropy::BlockReader* const> readers, Dtype dtype,
                       std::span<ExactBody> bodies, std::size_t tile_stride, std::size_t channels,
                       std::size_t tokens, std::span<ExactModels> models,
                       std::span<kernels::Outgoing> outgoing) {
    const auto last_exponent = static_cast<std::int32_t>(kernels::exponent_mask(dtype));
    std::array<entropy::SideVector, entropy::BlockReader::kMostAbreast> centers, tables;
    for (std::size_t i = 0; i < readers.size(); ++i) {
        models[i].centers.resize(channels);
        models[i].tables.resize(channels);
        centers[i] = {models[i].centers, &bodies[i].fits};
        tables[i] = {models[i].tables, &bodies[i].fits};
    }
    entropy::BlockReader::vectors(readers, {centers.data(), readers.size()}, 0, last_exponent);
    entropy::BlockReader::vectors(readers, {tables.data(), readers.size()}, 0, kLastTable);
    const std::size_t stride_bytes = tile_stride * kernels::dtype_bytes(dtype);
    const kernels::DecodeTable* const decodings = entropy::exponent_decodings();
    std::vector<kernels::FloatStrip>& strips = models[0].strips;
    strips.resize(channels * readers.size());
    kernels::FloatStrip* strip = strips.data();
    for (std::size_t c = 0; c < channels; ++c) {
        for (std::size_t i = 0; i < readers.size(); ++i) {
            *strip++ = {decodings + models[i].tables[c], static_cast<std::uint32_t>(models[i].centers[c]),
                        static_cast<std::uint8_t*>(bodies[i].tile) + c * stride_bytes};
        }
    }
    entropy::BlockReader::floats(readers, strips, dtype, tokens, outgoing);
}

}  // namespace kvcast
