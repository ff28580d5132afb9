#include "codec/klt/klt_encoder.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "codec/lossless/exact_head.h"
#include "kernels/klt_choice.h"

namespace kvcast {

struct KltEncoder::Job {
    const ChunkInput& input;
    const KltAnalysis& analysis;
    const CalibrationData& data;
    ChunkHeader& header;
    const RopeTable& rope;
    Calibration::Set set;
    std::size_t units_per_layer;
    std::size_t widest;  // plane's width

    const PlaneRows& rows(std::size_t layer, std::size_t plane) const {
        return input.planes[layer * data.layout.planes.size() + plane];
    }
    std::size_t unit(std::size_t layer, std::size_t plane, std::size_t part) const {
        return layer * units_per_layer + (plane == 0 ? 0 : data.parts[0]) + part;
    }
};

void KltEncoder::load_plane(const Job& job, std::size_t layer, std::size_t plane, TokenSlice slice,
                            Scratch& scratch) {
    const PlaneShape& shape = job.data.layout.planes[plane];
    const PlaneRows& rows = job.rows(layer, plane);
    const Dtype dtype = job.input.layout->dtype;
    scratch.values.resize(std::max(scratch.values.size(), shape.width() * slice.count));
    const bool turned = plane == 0 && job.header.unrotated;
    const auto rotation = turned ? job.rope.rotation(slice.first) : kernels::Rotation{};
    for (std::size_t head = 0; head < shape.heads; ++head) {
        const auto* at = static_cast<const std::uint8_t*>(rows.rows) + slice.first * rows.row_bytes +
                         head * shape.head_dim * kernels::dtype_bytes(dtype);
        ops_.load_rows({at, rows.row_bytes, dtype, slice.count, shape.head_dim, rotation,
                        scratch.values.data() + head * shape.head_dim, shape.width()});
    }
}

// What the prediction of a unit misses, in units of its states: integers with an exponent for each token.
void KltEncoder::take_residual(const Job& job, std::size_t layer, std::size_t plane, std::size_t part,
                               TokenSlice slice, Scratch& s) {
    const std::size_t width = job.data.part_width(plane), row = job.data.layout.planes[plane].width();
    const float inverse_unit = 1 / kernels::unit_of(job.set.unit(layer, plane, part).scale);
    std::int32_t* const sums = sums_of(job, plane, part, slice);
    states_.predict(ops_, layer, plane, part, slice, sums);
    s.residual.resize(std::max(s.residual.size(), width));
    s.integers.resize(std::max(s.integers.size(), slice.count * width));
    s.exponents.resize(slice.count);
    for (std::size_t t = 0; t < slice.count; ++t) {
        const bool fits = ops_.residual(s.values.data() + t * row + part * width, sums + t * width, width,
                                        inverse_unit, kernels::kKltStateMost, s.residual.data());
        if (!fits) unfit_[slice.first + t] = 1;
        s.exponents[t] = ops_.share_exponent(s.residual.data(), width, s.integers.data() + t * width);
    }
}

// Coefficients and the gains that would suit them best.
void KltEncoder::quantise_unit(const Job& job, std::size_t layer, std::size_t plane, std::size_t part,
                               TokenSlice slice, Scratch& s) {
    take_residual(job, layer, plane, part, slice, s);
    const std::size_t width = job.data.part_width(plane), index = job.set.index(layer, plane, part);
    const CalibrationUnit& unit = job.set.unit(layer, plane, part);
    const std::size_t level = level_index(job.header, slice.first);
    const std::size_t active = coded_coefficients(unit, level);
    s.coefficients.resize(std::max(s.coefficients.size(), slice.count * active));
    job.analysis.multiply(ops_, index, s.integers.data(), slice.count, active, s.coefficients.data());
    const auto step = static_cast<float>(job.data.levels[level].multiplier);
    const GainChooser gains(unit.classes_of(level).first(active));
    Unit& out = units_[job.unit(layer, plane, part)];
    for (std::size_t t = 0; t < slice.count; ++t) {
        const std::span<std::int16_t> row(out.q.data() + (slice.first + t) * width, active);
        const float one = job.analysis.fraction(index) * kernels::power_of_two(-s.exponents[t]);
        const bool fits = ops_.round_steps(s.coefficients.data() + t * active, active, one, step,
                                           kernels::kKltCoefficientMost, row.data());
        if (!fits) unfit_[slice.first + t] = 1;
        out.gains[slice.first + t] = gains.cheapest(ops_, row);
    }
}

void KltEncoder::level_gains(const Job& job, Unit& unit, std::span<const std::uint32_t> body) {
    unit.list_gains(body);
    token_strips_.make(job.header, body, unit.coded_gains);
    kvcast::level_gains(token_strips_, unit.gains);
}

// Zeros where a token's gain leaves no bits; states of what is left.
void KltEncoder::reconstruct_unit(const Job& job, std::size_t layer, std::size_t plane, std::size_t part,
                                  TokenSlice slice) {
    const std::size_t width = job.data.part_width(plane);
    const CalibrationUnit& unit = job.set.unit(layer, plane, part);
    const std::size_t level = level_index(job.header, slice.first);
    const std::vector<ClassRun> runs =
        class_runs(unit.classes_of(level).first(coded_coefficients(unit, level)));
    Unit& out = units_[job.unit(layer, plane, part)];
    std::int16_t* const q = out.q.data() + slice.first * width;
    for (std::size_t t = 0; t < slice.count; ++t)
        drop_uncoded(runs, out.gains[slice.first + t], q + t * width);
    states_.reconstruct(ops_, layer, plane, part, slice, q, job.data.levels[level].multiplier,
                        sums_of(job, plane, part, slice));
}

// Room for the predictions of a plane's unit at a slice's tokens. Slices may be at different planes, so that
// their rooms depend on tokens only.
std::int32_t* KltEncoder::sums_of(const Job& job, std::size_t plane, std::size_t part, TokenSlice slice) {
    return sums_.data() + slice.first * job.widest + part * job.data.part_width(plane) * slice.count;
}

// Tokens do not depend on each other but through the gains of their plane: slices go from the end of one
// plane to where the next one's gains are known. Starts of the plane after that are made beside them.
void KltEncoder::quantise_planes(const Job& job, std::span<const TokenSlice> slices,
                                 std::span<const std::uint32_t> body, Executor& executor) {
    const std::size_t planes = job.data.layout.planes.size(), steps = job.data.layout.layers * planes;
    const std::vector<TokenSlice> ids = slices_of(states_.ids(), kSliceTokens);
    const auto make_starts = [&](std::size_t step, TokenSlice slice) {
        if (step < steps) states_.make_starts(ops_, step / planes, step % planes, slice);
    };
    executor.run(ids.size(), [&](std::size_t i, std::size_t) { make_starts(0, ids[i]); });
    for (std::size_t step = 0; step <= steps; ++step) {
        executor.run(ids.size() + slices.size(), [&](std::size_t i, std::size_t worker) {
            if (i < ids.size()) return make_starts(step + 1, ids[i]);
            const TokenSlice slice = slices[i - ids.size()];
            if (step > 0) reconstruct_plane(job, (step - 1) / planes, (step - 1) % planes, slice);
            if (step < steps) quantise_plane(job, step / planes, step % planes, slice, scratch_[worker]);
        });
        if (step == steps) break;
        for (std::size_t part = 0; part < job.data.parts[step % planes]; ++part)
            level_gains(job, units_[job.unit(step / planes, step % planes, part)], body);
    }
}

void KltEncoder::quantise_plane(const Job& job, std::size_t layer, std::size_t plane, TokenSlice slice,
                                Scratch& scratch) {
    load_plane(job, layer, plane, slice, scratch);
    for (std::size_t part = 0; part < job.data.parts[plane]; ++part)
        quantise_unit(job, layer, plane, part, slice, scratch);
}

void KltEncoder::reconstruct_plane(const Job& job, std::size_t layer, std::size_t plane, TokenSlice slice) {
    for (std::size_t part = 0; part < job.data.parts[plane]; ++part)
        reconstruct_unit(job, layer, plane, part, slice);
}

void KltEncoder::write_exact_rows(const Job& job, std::size_t layer, entropy::BlockWriter& writer) {
    const Layout& layout = *job.input.layout;
    for (std::size_t p = 0; p < layout.planes.size(); ++p) {
        const PlaneRows& rows = job.rows(layer, p);
        const std::size_t dim = layout.planes[p].head_dim;
        for (std::size_t head = 0; head < layout.planes[p].heads; ++head) {
            for (const std::uint32_t t : job.header.klt.exact_tokens) {
                const auto* row = static_cast<const std::uint8_t*>(rows.rows) + t * rows.row_bytes +
                                  head * dim * kernels::dtype_bytes(layout.dtype);
                write_exact_row(writer, layout.dtype, row, dim);
            }
        }
    }
}

void KltEncoder::write_coefficients(const CalibrationUnit& from, const ChunkHeader& header,
                                    const std::vector<std::uint32_t>& body, Unit& unit,
                                    entropy::BlockWriter& writer) const {
    const std::size_t width = from.transform.inputs;
    TokenStrips strips;
    strips.make(header, body, unit.coded_gains);
    unit.tiles.resize(strips.strips().size() * width * kernels::kLanes);
    std::int16_t* tile = unit.tiles.data();  // until the run is written
    for (const TokenStrip& strip : strips.strips()) {
        const auto classes = from.classes_of(strip.level);
        const std::size_t coded = leading_coded(classes, strip.gain);
        const std::int16_t* rows[kernels::kLanes] = {};
        for (std::size_t i = 0; i < strip.count; ++i)
            rows[i] = unit.q.data() + strips.tokens(strip)[i] * width;
        ops_.rows_to_strips(rows, strip.count, coded, tile);
        for (std::size_t i = 0; i < coded; ++i)
            writer.strip(klt_class(classes[i], strip.gain), {tile + i * kernels::kLanes, strip.count});
        tile += width * kernels::kLanes;
    }
}

void KltEncoder::write_layer(const Job& job, std::size_t layer, const std::vector<std::uint32_t>& body,
                             entropy::BlockWriter& writer) {
    write_exact_rows(job, layer, writer);
    Unit* const units = units_.data() + layer * job.units_per_layer;
    for (std::size_t u = 0; u < job.units_per_layer; ++u) {
        units[u].list_gains(body);
        writer.vector(units[u].coded_gains);
    }
    for (std::size_t p = 0; p < job.data.layout.planes.size(); ++p) {
        for (std::size_t part = 0; part < job.data.parts[p]; ++part) {
            write_coefficients(job.set.unit(layer, p, part), job.header, body,
                               units_[job.unit(layer, p, part)], writer);
        }
    }
    writer.boundary();
}

Status KltEncoder::encode(const ChunkInput& input, const KltAnalysis& analysis, ChunkHeader& header,
                          const RopeTable& rope, Executor& executor, ChunkAssembly& object,
                          std::span<entropy::BlockCost> costs) {
    const CalibrationData& data = analysis.calibration().data();
    if (Status s = check_klt_options(header, data); !s.ok()) return s;
    const std::size_t units_per_layer = data.units_per_layer();
    std::size_t widest = 0;
    for (const PlaneShape& plane : data.layout.planes) widest = std::max(widest, plane.width());
    const Job job = {input,           analysis, data,
                     header,          rope,     analysis.calibration().set_of_level(header.level),
                     units_per_layer, widest};
    const std::size_t layers = data.layout.layers;
    units_.resize(layers * units_per_layer);
    for (std::size_t l = 0; l < layers; ++l) {
        for (std::size_t p = 0; p < data.layout.planes.size(); ++p) {
            for (std::size_t part = 0; part < data.parts[p]; ++part) {
                Unit& unit = units_[job.unit(l, p, part)];
                unit.q.assign(header.tokens * data.part_width(p), 0);
                unit.gains.assign(header.tokens, 0);
            }
        }
    }
    unfit_.assign(header.tokens, 0);
    states_.reset(analysis.calibration(), job.set, input.token_ids);
    if (scratch_.size() < executor.workers()) scratch_.resize(executor.workers());

    sums_.resize(header.tokens * widest);
    const std::vector<std::uint32_t> chosen = body_tokens(header);
    quantise_planes(job, body_slices(header, chosen, kSliceTokens), chosen, executor);
    add_exact_tokens(header, unfit_);
    const std::vector<std::uint32_t> body = body_tokens(header);
    const std::size_t run = header.klt.run_layers;
    const std::size_t runs = (layers + run - 1) / run;
    while (writers_.size() < executor.workers()) writers_.emplace_back(ops_);
    executor.run(runs, [&](std::size_t i, std::size_t worker) {
        const std::size_t first = i * run, stop = std::min(layers, first + run);
        for (std::size_t l = first; l < stop; ++l) write_layer(job, l, body, writers_[worker]);
        std::vector<entropy::BlockWriter::Bytes> blocks(stop - first);
        entropy::BlockWriter::Block coded = {
            .writer = &writers_[worker], .ideal = costs.empty() ? nullptr : &costs[first], .pieces = blocks};
        FetchAhead nothing;
        entropy::BlockWriter::finish_all({&coded, 1}, nothing);
        for (std::size_t l = first; l < stop; ++l) {
            header.block_bytes[l] = static_cast<std::uint32_t>(blocks[l - first].size());
            header.layer_crc[l] = crc32(blocks[l - first]);
        }
        object.add(i, {&coded.bytes, 1});
    });
    return {};
}

}  // namespace kvcast
