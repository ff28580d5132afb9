#include "codec/klt/klt_decoder.h"

#include <algorithm>

#include "codec/lossless/exact_head.h"

namespace kvcast {
namespace {

// Least and largest value; 0 is among them.
std::pair<std::int16_t, std::int16_t> extremes(std::span<const std::int16_t> values) {
    std::int16_t least = 0, most = 0;
    for (const std::int16_t v : values) {
        least = std::min(least, v);
        most = std::max(most, v);
    }
    return {least, most};
}

}  // namespace

void KltDecoder::begin(const Chunk& chunk) {
    chunk_ = chunk;
    next_layer_ = 0;
    bytes_ = {};
    body_ = body_tokens(*chunk.header);
    slices_ = body_slices(*chunk.header, body_, kSliceTokens);
    reader_.reset();
    set_ = chunk.calibration->set_of_level(chunk.header->level);
    states_.reset(*chunk.calibration, *set_, chunk.header->token_ids);
    id_slices_ = slices_of(states_.ids(), kSliceTokens);
    const CalibrationData& data = chunk.calibration->data();
    prepared_layers_ = 0;
    const std::size_t units = data.units_per_layer();
    for (Symbols& symbols : symbols_) {
        symbols.gains.resize(units);
        symbols.coefficients.resize(units);
        for (auto& gains : symbols.gains) gains.resize(body_.size());
        std::size_t at = 0;
        for (std::size_t p = 0; p < data.layout.planes.size(); ++p) {
            for (std::size_t i = 0; i < data.parts[p]; ++i)
                symbols.coefficients[at++].resize(chunk.header->tokens * data.part_width(p));
        }
    }
}

bool KltDecoder::read_exact_rows(std::span<const PlaneBuffer> planes) {
    const ChunkHeader& h = *chunk_.header;
    const Dtype source = h.layout.dtype;
    entropy::BlockReader* const reader = &*reader_;
    ExactBody row;
    for (std::size_t p = 0; p < h.layout.planes.size(); ++p) {
        const std::size_t dim = h.layout.planes[p].head_dim;
        row_.resize(std::max(row_.size(), dim * kernels::dtype_bytes(source)));
        row.tile = row_.data();
        const auto turned = p == 0 ? chunk_.shift->rotation() : kernels::Rotation{};
        for (std::size_t head = 0; head < h.layout.planes[p].heads; ++head) {
            for (const std::uint32_t t : h.klt.exact_tokens) {
                kvcast::read_exact_rows({&reader, 1}, source, {&row, 1}, dim);
                if (planes.empty()) continue;
                auto* out = static_cast<std::uint8_t*>(planes[p].rows) + t * planes[p].row_bytes +
                            head * dim * kernels::dtype_bytes(chunk_.dtype);
                chunk_.ops->store_exact(
                    {row_.data(), 1, 1, dim, turned, source, chunk_.dtype, out, planes[p].row_bytes});
            }
        }
    }
    return row.fits;
}

bool KltDecoder::read_gains(Symbols& symbols) {
    bool fits = true;
    for (auto& gains : symbols.gains) fits = reader_->vector(gains, kGainLow, kGainHigh) && fits;
    return fits;
}

// Decodes a strip's coefficients, one after another, into the rows of its tokens.
void KltDecoder::read_strip(const TokenStrip& strip, std::span<const std::int8_t> classes,
                            std::int16_t* coefficients) {
    const entropy::ClassDecoding* const decodings = entropy::class_decodings();
    const std::size_t width = classes.size(), coded = leading_coded(classes, strip.gain);
    strips_.clear();
    tile_.resize(std::max(tile_.size(), width * kernels::kLanes));
    for (std::size_t i = 0; i < coded; ++i) {
        const auto& d = decodings[klt_class(classes[i], strip.gain)];
        strips_.push_back({d.table, d.shift, strip.count, tile_.data() + i * kernels::kLanes});
    }
    reader_->strips(strips_);
    std::int16_t* rows[kernels::kLanes] = {};
    for (std::size_t i = 0; i < strip.count; ++i) {
        rows[i] = coefficients + token_strips_.tokens(strip)[i] * width;
        std::fill(rows[i] + coded, rows[i] + width, std::int16_t{0});
    }
    chunk_.ops->strips_to_rows(tile_.data(), coded, rows, strip.count);
}

void KltDecoder::read_coefficients(std::size_t layer, Symbols& symbols) {
    const CalibrationData& data = chunk_.calibration->data();
    std::size_t at = 0;
    for (std::size_t p = 0; p < data.layout.planes.size(); ++p) {
        for (std::size_t part = 0; part < data.parts[p]; ++part, ++at) {
            const CalibrationUnit& unit = set_->unit(layer, p, part);
            token_strips_.make(*chunk_.header, body_, symbols.gains[at]);
            for (const TokenStrip& strip : token_strips_.strips())
                read_strip(strip, unit.classes_of(strip.level), symbols.coefficients[at].data());
        }
    }
}

// What a slice's coefficients are to be multiplied by. Multiples that exceed 16 bits, which no encoder
// writes, are saturated in place.
unsigned KltDecoder::multiplier_of(TokenSlice slice, std::span<std::int16_t> coefficients) const {
    const CalibrationData& data = chunk_.calibration->data();
    const unsigned multiplier = data.levels[level_index(*chunk_.header, slice.first)].multiplier;
    const auto [least, most] = extremes(coefficients);
    const int largest = std::max(-int{least}, int{most});
    if (largest * static_cast<int>(multiplier) <= 32767) return multiplier;
    for (std::int16_t& q : coefficients) q = kernels::scaled_coefficient(q, multiplier);
    return 1;
}

void KltDecoder::store_slice(TokenSlice slice, std::size_t plane, const PlaneBuffer& out) const {
    const Layout& layout = chunk_.header->layout;
    const std::size_t dim = layout.planes[plane].head_dim, width = layout.planes[plane].width();
    const std::int16_t* states = states_.plane(plane) + slice.first * width;
    const bool turned = plane == 0 && chunk_.header->unrotated;
    const auto rotation = turned ? chunk_.absolute->rotation(slice.first) : kernels::Rotation{};
    const std::size_t parts = chunk_.calibration->data().parts[plane];
    const std::size_t heads_per_part = layout.planes[plane].heads / parts;
    auto* rows = static_cast<std::uint8_t*>(out.rows) + slice.first * out.row_bytes;
    for (std::size_t head = 0; head < layout.planes[plane].heads; ++head) {
        const auto scale = set_->unit(next_layer_, plane, head / heads_per_part).scale;
        chunk_.ops->store_states({states + head * dim, width, slice.count, dim, rotation, scale, chunk_.dtype,
                                  rows + head * dim * kernels::dtype_bytes(chunk_.dtype), out.row_bytes});
    }
}

Status KltDecoder::read(std::size_t layer, const Layer& from, Symbols& symbols) {
    const std::size_t run = chunk_.header->klt.run_layers;
    if (layer % run == 0) {
        reader_.emplace(*chunk_.ops, from.block);
        bytes_.states += kBlockStateBytes;
    } else {
        reader_->next_piece(from.block);
    }
    const std::size_t before = reader_->left();
    const bool rows_fit = read_exact_rows(from.planes);
    const std::size_t after_rows = reader_->left();
    const bool gains_fit = read_gains(symbols);
    const std::size_t after_gains = reader_->left();
    read_coefficients(layer, symbols);
    bytes_.exact_tokens += before - after_rows;
    bytes_.gains += after_rows - after_gains;
    bytes_.coefficients += after_gains - reader_->left();
    const bool last = (layer + 1) % run == 0 || layer + 1 == chunk_.header->layout.layers;
    if (Status s = last ? reader_->close() : reader_->check_used(); !s.ok()) return s;
    if (!rows_fit || !gains_fit) return {ErrorCode::kCorruptBlock, "its side information is out of range"};
    return {};
}

void KltDecoder::reconstruct_slice(TokenSlice slice, std::span<const PlaneBuffer> planes, Scratch& scratch) {
    const CalibrationData& data = chunk_.calibration->data();
    Symbols& symbols = symbols_[next_layer_ % 2];
    std::size_t at = 0;
    for (std::size_t p = 0; p < data.layout.planes.size(); ++p) {
        const std::size_t width = data.part_width(p);
        scratch.sums.resize(std::max(scratch.sums.size(), slice.count * width));
        for (std::size_t part = 0; part < data.parts[p]; ++part, ++at) {
            std::int16_t* coefficients = symbols.coefficients[at].data() + slice.first * width;
            const unsigned multiplier = multiplier_of(slice, {coefficients, slice.count * width});
            states_.predict(*chunk_.ops, next_layer_, p, part, slice, scratch.sums.data());
            states_.reconstruct(*chunk_.ops, next_layer_, p, part, slice, coefficients, multiplier,
                                scratch.sums.data());
        }
        if (!planes.empty()) store_slice(slice, p, planes[p]);
    }
}

Status KltDecoder::layer(const Layer& layer, const Layer* ahead, Executor& executor) {
    const std::size_t planes = chunk_.header->layout.planes.size(), starts = id_slices_.size() * planes;
    const auto make_start = [&](std::size_t of_layer, std::size_t i) {
        states_.make_starts(*chunk_.ops, of_layer, i % planes, id_slices_[i / planes]);
    };
    if (prepared_layers_ == next_layer_) {
        Symbols& symbols = symbols_[next_layer_ % 2];
        symbols.status = read(next_layer_, layer, symbols);
        executor.run(starts, [&](std::size_t i, std::size_t) { make_start(next_layer_, i); });
        ++prepared_layers_;
    }
    if (Status s = symbols_[next_layer_ % 2].status; !s.ok()) return s;

    // Preparing is some tasks beside those of the slices, the longest one first; alone, it would only push
    // their states out of the cache.
    const bool prepares = ahead != nullptr && executor.workers() > 1;
    const std::size_t first_slice = prepares ? 1 + starts : 0;
    scratch_.resize(std::max(scratch_.size(), executor.workers()));
    executor.run(first_slice + slices_.size(), [&](std::size_t i, std::size_t worker) {
        if (i >= first_slice) {
            reconstruct_slice(slices_[i - first_slice], layer.planes, scratch_[worker]);
        } else if (i > 0) {
            make_start(next_layer_ + 1, i - 1);
        } else {
            Symbols& symbols = symbols_[(next_layer_ + 1) % 2];
            symbols.status = read(next_layer_ + 1, *ahead, symbols);
        }
    });
    if (prepares) ++prepared_layers_;
    ++next_layer_;
    return {};
}

}  // namespace kvcast
