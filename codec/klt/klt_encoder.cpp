#include "codec/klt/klt_encoder.h"

#include <Eigen/LU>
#include <algorithm>
#include <array>
#include <cmath>

#include "codec/lossless/exact_head.h"
#include "kernels/klt_choice.h"

namespace kvcast {
namespace {}  // namespace

std::size_t coded_coefficients(const CalibrationUnit& unit, std::size_t level) {
    const auto width = static_cast<std::uint32_t>(unit.transform.inputs);
    std::uint32_t groups = kernels::klt_groups(width);
    const std::int8_t* classes = unit.classes.data() + level * groups;
    while (groups > 0 && klt_class(classes[groups - 1], kernels::kKltGainMost) == 0) --groups;
    return std::min(kernels::klt_group_begin(groups), width);
}

Result<std::shared_ptr<const KltAnalysis>> KltAnalysis::make(std::shared_ptr<const Calibration> calibration) {
    using Matrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
    auto made = std::make_shared<KltAnalysis>();
    for (const CalibrationUnit& unit : calibration->data().units) {
        const auto n = static_cast<Eigen::Index>(unit.transform.inputs);
        Matrix forward(n, n);
        for (Eigen::Index o = 0; o < n; ++o) {
            for (Eigen::Index i = 0; i < n; ++i) {
                const auto at = static_cast<std::size_t>(o * n + i);
                forward(o, i) = std::ldexp(unit.transform.entries[at],
                                           -int{unit.transform.shifts[static_cast<std::size_t>(o)]});
            }
        }
        const Matrix inverse = forward.partialPivLu().inverse().transpose();
        if (!inverse.allFinite())
            return Status(ErrorCode::kBadArgument, "a transform of the calibration has no inverse");
        std::vector<float>& out = made->matrices_.emplace_back();
        for (Eigen::Index i = 0; i < inverse.size(); ++i)
            out.push_back(static_cast<float>(inverse.data()[i]));
    }
    made->calibration_ = std::move(calibration);
    return std::shared_ptr<const KltAnalysis>(std::move(made));
}

struct KltEncoder::Job {
    const ChunkInput& input;
    const KltAnalysis& analysis;
    const CalibrationData& data;
    ChunkHeader& header;
    const RopeTable& rope;
    Calibration::Set set;
    std::size_t units_per_layer;

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
    const auto rotation = turned ? job.rope.rotation_by_token(slice.first) : kernels::Rotation{};
    for (std::size_t head = 0; head < shape.heads; ++head) {
        const auto* at = static_cast<const std::uint8_t*>(rows.rows) + slice.first * rows.row_bytes +
                         head * shape.head_dim * kernels::dtype_bytes(dtype);
        ops_.load_rows({at, rows.row_bytes, dtype, slice.count, shape.head_dim, rotation,
                        scratch.values.data() + head * shape.head_dim, shape.width()});
    }
}

// What the prediction of a unit misses, in units of its states.
void KltEncoder::take_residual(const Job& job, std::size_t layer, std::size_t plane, std::size_t part,
                               TokenSlice slice, Scratch& s) {
    const std::size_t width = job.data.part_width(plane), row = job.data.layout.planes[plane].width();
    const kernels::Scale scale = job.set.unit(layer, plane, part).scale;
    const float inverse_unit =
        1 / (static_cast<float>(scale.mantissa) * kernels::power_of_two(scale.exponent));
    states_.predict(ops_, layer, plane, part, slice, s.sums.data());
    for (std::size_t t = 0; t < slice.count; ++t) {
        const bool fits =
            ops_.residual(s.values.data() + t * row + part * width, s.sums.data() + t * width, width,
                          inverse_unit, kernels::kKltStateMost, s.residual.data() + t * width);
        if (!fits) unfit_[slice.first + t] = 1;
    }
}

void KltEncoder::quantise_unit(const Job& job, std::size_t layer, std::size_t plane, std::size_t part,
                               TokenSlice slice, Scratch& s) {
    const std::size_t width = job.data.part_width(plane), groups = job.data.groups(plane);
    const std::size_t size = slice.count * width;
    s.sums.resize(std::max(s.sums.size(), size));
    s.residual.resize(std::max(s.residual.size(), size));
    s.coefficients.resize(std::max(s.coefficients.size(), size));
    take_residual(job, layer, plane, part, slice, s);
    const CalibrationUnit& unit = job.set.unit(layer, plane, part);
    const std::size_t level = level_index(job.header, slice.first);
    const std::size_t active = coded_coefficients(unit, level);
    ops_.analyse(s.residual.data(), width, job.analysis.matrix(job.set.index(layer, plane, part)), width,
                 active, slice.count, s.coefficients.data());
    const unsigned multiplier = job.data.levels[level].multiplier;
    const std::int8_t* classes = unit.classes.data() + level * groups;
    Unit& out = units_[job.unit(layer, plane, part)];
    std::int16_t* const q = out.q.data() + slice.first * width;
    for (std::size_t t = 0; t < slice.count; ++t) {
        const std::span<std::int16_t> row(q + t * width, active);
        const bool fits =
            ops_.round_steps(s.coefficients.data() + t * active, active, static_cast<float>(multiplier),
                             kernels::kKltCoefficientMost, row.data());
        if (!fits) unfit_[slice.first + t] = 1;
        const auto gain = static_cast<std::int16_t>(cheapest_klt_gain(ops_, row, classes));
        out.gains[slice.first + t] = gain;
        for (std::uint32_t g = 0; kernels::klt_group_begin(g) < active; ++g) {
            if (klt_class(classes[g], gain) == 0)
                std::fill(q + t * width + kernels::klt_group_begin(g),
                          q + t * width + kernels::klt_group_end(g, static_cast<std::uint32_t>(active)), 0);
        }
    }
    states_.reconstruct(ops_, layer, plane, part, slice, q, multiplier, s.sums.data());
}

void KltEncoder::quantise_layer(const Job& job, std::size_t layer, TokenSlice slice, Scratch& scratch) {
    for (std::size_t p = 0; p < job.data.layout.planes.size(); ++p) {
        load_plane(job, layer, p, slice, scratch);
        for (std::size_t part = 0; part < job.data.parts[p]; ++part)
            quantise_unit(job, layer, p, part, slice, scratch);
    }
}

void KltEncoder::write_exact_rows(const Job& job, std::size_t layer, entropy::BlockWriter& writer) {
    const Layout& layout = *job.input.layout;
    std::size_t at = layer * layout.values_per_token() / layout.layers * job.header.klt.exact_tokens.size();
    for (std::size_t p = 0; p < layout.planes.size(); ++p) {
        const PlaneRows& rows = job.rows(layer, p);
        const std::size_t dim = layout.planes[p].head_dim;
        for (std::size_t head = 0; head < layout.planes[p].heads; ++head) {
            for (const std::uint32_t t : job.header.klt.exact_tokens) {
                const auto* row = static_cast<const std::uint8_t*>(rows.rows) + t * rows.row_bytes +
                                  head * dim * kernels::dtype_bytes(layout.dtype);
                std::uint32_t* bits = exact_bits_.data() + at;
                ops_.load_bits(row, rows.row_bytes, layout.dtype, 1, dim, bits, 1);
                write_exact_row(writer, layout.dtype, {bits, dim});
                at += dim;
            }
        }
    }
}

void KltEncoder::write_layer(const Job& job, std::size_t layer, const std::vector<std::uint32_t>& body,
                             entropy::BlockWriter& writer) {
    write_exact_rows(job, layer, writer);
    Unit* const units = units_.data() + layer * job.units_per_layer;
    for (std::size_t u = 0; u < job.units_per_layer; ++u) {
        units[u].coded_gains.clear();
        for (const std::uint32_t t : body) units[u].coded_gains.push_back(units[u].gains[t]);
        writer.vector(units[u].coded_gains);
    }
    for (std::size_t p = 0; p < job.data.layout.planes.size(); ++p) {
        const std::size_t width = job.data.part_width(p), groups = job.data.groups(p);
        for (std::size_t part = 0; part < job.data.parts[p]; ++part) {
            const Unit& unit = units_[job.unit(layer, p, part)];
            const auto& classes = job.set.unit(layer, p, part).classes;
            for (const std::uint32_t t : body) {
                const std::int8_t* base = classes.data() + level_index(job.header, t) * groups;
                for (std::uint32_t g = 0; g < groups; ++g) {
                    const std::uint32_t begin = kernels::klt_group_begin(g);
                    writer.strip(klt_class(base[g], unit.gains[t]),
                                 {unit.q.data() + t * width + begin,
                                  kernels::klt_group_end(g, static_cast<std::uint32_t>(width)) - begin});
                }
            }
        }
    }
    writer.boundary();
}

Status KltEncoder::encode(const ChunkInput& input, const KltAnalysis& analysis, ChunkHeader& header,
                          const RopeTable& rope, Executor& executor,
                          std::vector<std::vector<std::uint8_t>>& blocks,
                          std::span<entropy::BlockCost> costs) {
    const CalibrationData& data = analysis.calibration().data();
    if (Status s = check_klt_options(header, data); !s.ok()) return s;
    const std::size_t units_per_layer = data.units_per_layer();
    const Job job = {input,          analysis, data,
                     header,         rope,     analysis.calibration().set_of_level(header.level),
                     units_per_layer};
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

    // All layers of a slice in one go: tokens do not depend on each other.
    const std::vector<TokenSlice> slices = body_slices(header, body_tokens(header), kSliceTokens);
    for (std::size_t l = 0; l < layers; ++l) {
        executor.run(slices.size(), [&](std::size_t i, std::size_t worker) {
            quantise_layer(job, l, slices[i], scratch_[worker]);
        });
    }
    for (const std::uint32_t t : header.klt.exact_tokens) unfit_[t] = 1;
    header.klt.exact_tokens.clear();
    for (std::uint32_t t = 0; t < header.tokens; ++t) {
        if (unfit_[t] != 0) header.klt.exact_tokens.push_back(t);
    }
    const std::vector<std::uint32_t> body = body_tokens(header);
    exact_bits_.resize(header.klt.exact_tokens.size() * data.layout.values_per_token());
    const std::size_t run = header.klt.run_layers;
    const std::size_t runs = (layers + run - 1) / run;
    while (writers_.size() < executor.workers()) writers_.emplace_back(ops_);
    executor.run(runs, [&](std::size_t i, std::size_t worker) {
        const std::size_t first = i * run, stop = std::min(layers, first + run);
        std::vector<std::vector<std::uint8_t>*> pieces;
        for (std::size_t l = first; l < stop; ++l) {
            write_layer(job, l, body, writers_[worker]);
            pieces.push_back(&blocks[l]);
        }
        writers_[worker].finish_run(pieces, costs.empty() ? costs : costs.subspan(first, stop - first));
        for (std::size_t l = first; l < stop; ++l) {
            header.block_bytes[l] = static_cast<std::uint32_t>(blocks[l].size());
            header.layer_crc[l] = crc32(blocks[l]);
        }
    });
    return {};
}

}  // namespace kvcast
