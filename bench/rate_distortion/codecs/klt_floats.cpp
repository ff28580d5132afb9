// What the integers of the klt profile's reconstruction cost: the same closed loop on states of binary32,
// neither rounded nor saturated, and by exact angles. All else is the profile's own: matrices, classes,
// gains, strips, exact tokens, output rounded once to the cache's element type. Bits are those of real
// headers and blocks with the symbols that come of it.
#include <fmt/format.h>

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numbers>
#include <numeric>

#include "bench/rate_distortion/point.h"
#include "codec/chunk_plan.h"
#include "codec/klt/gain.h"
#include "codec/klt/klt_analysis.h"
#include "codec/klt/klt_chunk.h"
#include "codec/lossless/exact_head.h"
#include "kernels/klt_choice.h"
#include "tools/common/calibration_file.h"

namespace kvcast::bench {
namespace {

template <typename T>
using RowMajor = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using Rows = RowMajor<float>;  // [token][channel]

Rows matrix_of(const ShiftedMatrix& m) {
    Rows out(m.outputs, m.inputs);
    for (std::size_t o = 0; o < m.outputs; ++o) {
        const float unit = kernels::power_of_two(-int{m.shifts[o]});
        for (std::size_t i = 0; i < m.inputs; ++i) out(o, i) = m.entries[o * m.inputs + i] * unit;
    }
    return out;
}

Rows token_features_of(const TokenTable& table, std::span<const std::int32_t> token_ids) {
    RowMajor<std::int16_t> features(token_ids.size(), table.features);
    for (std::size_t t = 0; t < token_ids.size(); ++t) table.unpack(token_ids[t], features.row(t).data());
    return features.cast<float>();
}

// Turns rows of plane 0, the first of which is at `position`: forwards where sign is 1, back where it is -1.
void turn(const Layout& layout, std::uint64_t position, double sign, Rows& rows) {
    const Rope& rope = layout.rope;
    const std::size_t dim = layout.planes[0].head_dim;
    for (std::size_t t = 0; t < static_cast<std::size_t>(rows.rows()); ++t) {
        for (std::size_t p = 0; p < rope.pairs(); ++p) {
            const std::uint64_t phase = (position + t) * rope.frequencies[p];
            const double angle = static_cast<double>(phase) * 0x1p-64 * 2 * std::numbers::pi;
            const double cosine = std::cos(angle), sine = sign * std::sin(angle);
            for (std::size_t head = 0; head < layout.planes[0].heads; ++head) {
                float& a = rows(t, head * dim + rope.offset + p * rope.pair_step());
                float& b = (&a)[rope.partner()];
                const double x = a, y = b;
                a = static_cast<float>(x * cosine - y * sine);
                b = static_cast<float>(y * cosine + x * sine);
            }
        }
    }
}

class FloatChunk {
  public:
    FloatChunk(const ChunkInput& input, const EncodeOptions& options, const KltAnalysis& analysis)
        : input_(input),
          analysis_(analysis),
          data_(analysis.calibration().data()),
          set_(analysis.calibration().set_of_level(options.level)),
          header_(plan_header(input, options)),
          level_(options.level - 1),
          chosen_(body_tokens(header_)),
          features_(token_features_of(data_.tokens, input.token_ids)),
          unfit_(header_.tokens),
          writer_(ops_) {}

    // Replaces what is not stored exactly. Returns the chunk's bits.
    double code(std::span<const PlaneBuffer> out) {
        for (std::size_t l = 0; l < data_.layout.layers; ++l) {
            for (std::size_t p = 0; p < data_.layout.planes.size(); ++p) code_plane(l, p);
        }
        add_exact_tokens(header_, unfit_);
        body_ = body_tokens(header_);
        for (std::size_t l = 0; l < data_.layout.layers; ++l) {
            for (std::size_t p = 0; p < data_.layout.planes.size(); ++p)
                store(l, p, out[l * data_.layout.planes.size() + p]);
        }
        write_blocks();
        return 8.0 * static_cast<double>(write_header(header_).value().size() + header_.payload_bytes());
    }

  private:
    struct Unit {
        RowMajor<std::int16_t> q;         // [token][coefficient]
        std::vector<std::int16_t> gains;  // [token]
    };

    const PlaneRows& rows(std::size_t layer, std::size_t plane) const {
        return input_.planes[layer * data_.layout.planes.size() + plane];
    }

    float unit_of(std::size_t layer, std::size_t plane, std::size_t channel) const {
        return kernels::value_of(1, set_.unit(layer, plane, channel / data_.part_width(plane)).scale);
    }

    std::vector<std::int16_t> gains_of(const Unit& unit, const std::vector<std::uint32_t>& body) const {
        std::vector<std::int16_t> out;
        for (const std::uint32_t t : body) out.push_back(unit.gains[t]);
        return out;
    }

    // A plane in units of its states, before RoPE.
    Rows load(std::size_t layer, std::size_t plane) const {
        Rows out(header_.tokens, data_.layout.planes[plane].width());
        const PlaneRows& from = rows(layer, plane);
        const Dtype dtype = header_.layout.dtype;
        const std::size_t size = kernels::dtype_bytes(dtype);
        for (std::size_t t = 0; t < header_.tokens; ++t) {
            for (Eigen::Index c = 0; c < out.cols(); ++c) {
                std::uint32_t bits = 0;
                std::memcpy(&bits, static_cast<const std::byte*>(from.rows) + t * from.row_bytes + c * size,
                            size);
                out(t, c) = kernels::from_bits(dtype, bits);
            }
        }
        if (plane == 0 && header_.unrotated) turn(header_.layout, header_.position(), -1, out);
        for (Eigen::Index c = 0; c < out.cols(); ++c) out.col(c) /= unit_of(layer, plane, c);
        return out;
    }

    void store(std::size_t layer, std::size_t plane, const PlaneBuffer& to) const {
        Rows values = states_[layer * data_.layout.planes.size() + plane];
        for (Eigen::Index c = 0; c < values.cols(); ++c) values.col(c) *= unit_of(layer, plane, c);
        if (plane == 0 && header_.unrotated) turn(header_.layout, header_.position(), 1, values);
        const Dtype dtype = header_.layout.dtype;
        const std::size_t size = kernels::dtype_bytes(dtype);
        for (const std::uint32_t t : body_) {
            for (Eigen::Index c = 0; c < values.cols(); ++c) {
                const std::uint32_t bits = kernels::to_bits(dtype, values(t, c));
                std::memcpy(static_cast<std::byte*>(to.rows) + t * to.row_bytes + c * size, &bits, size);
            }
        }
    }

    Rows predicted(std::size_t layer, std::size_t plane, std::size_t part) const {
        const CalibrationUnit& unit = set_.unit(layer, plane, part);
        Rows out = bias_of(unit).replicate(static_cast<Eigen::Index>(header_.tokens), 1);
        for (const PredictionTerm& term : unit.terms) {
            const Rows matrix = matrix_of(term.matrix) * static_cast<float>(kernels::kFeatureWeight);
            if (term.source == PredictionTerm::Source::kTokens) {
                out.noalias() += features_ * matrix.transpose();
            } else {
                const std::size_t from = layer - term.layers_back;
                const Rows& source = states_[from * data_.layout.planes.size() + term.plane];
                const Rows states = source.middleCols(part * matrix.cols(), matrix.cols());
                out.noalias() += features_of(set_.unit(from, term.plane, part), states) * matrix.transpose();
            }
        }
        return out;
    }

    static Eigen::RowVectorXf bias_of(const CalibrationUnit& unit) {
        const Eigen::Map<const Eigen::Matrix<std::int16_t, 1, Eigen::Dynamic>> bias(
            unit.bias.data(), static_cast<Eigen::Index>(unit.bias.size()));
        return bias.cast<float>();
    }

    // Neither rounded nor cut off.
    static Rows features_of(const CalibrationUnit& unit, const Rows& states) {
        Rows out = states.rowwise() - bias_of(unit);
        for (Eigen::Index c = 0; c < out.cols(); ++c)
            out.col(c) *=
                std::ldexp(static_cast<float>(unit.feature_factors[static_cast<std::size_t>(c)]), -15);
        return out;
    }

    void code_plane(std::size_t layer, std::size_t plane) {
        const Rows states = load(layer, plane);
        Rows& out = states_.emplace_back(states.rows(), states.cols());
        const auto width = static_cast<Eigen::Index>(data_.part_width(plane));
        for (std::size_t part = 0; part < data_.parts[plane]; ++part) {
            const Rows prediction = predicted(layer, plane, part);
            const auto columns = [&](auto& of) { return of.middleCols(part * width, width); };
            const Unit& unit = quantise(layer, plane, part, residual(columns(states), prediction));
            const Rows transform = matrix_of(set_.unit(layer, plane, part).transform);
            const auto multiplier = static_cast<float>(data_.levels[level_].multiplier);
            columns(out) = prediction + unit.q.cast<float>() * multiplier * transform.transpose();
        }
    }

    Rows residual(const Rows& states, const Rows& prediction) {
        Rows out = states - prediction;
        for (Eigen::Index t = 0; t < out.rows(); ++t) {
            for (Eigen::Index c = 0; c < out.cols(); ++c) {
                if (kernels::klt_state_fits(states(t, c))) continue;
                unfit_[t] = 1;
                out(t, c) = 0;
            }
        }
        return out;
    }

    const Unit& quantise(std::size_t layer, std::size_t plane, std::size_t part, const Rows& residual) {
        const CalibrationUnit& from = set_.unit(layer, plane, part);
        const std::size_t active = coded_coefficients(from, level_), index = set_.index(layer, plane, part);
        const float inverse_step =
            analysis_.fraction(index) / static_cast<float>(data_.levels[level_].multiplier);
        const Rows steps =
            residual * matrix_of(analysis_.matrix(index)).topRows(active).transpose() * inverse_step;
        const GainChooser gains(from.classes_of(level_).first(active));
        Unit& unit = units_.emplace_back();
        unit.q.setZero(residual.rows(), residual.cols());
        unit.gains.resize(header_.tokens);
        const float most = kernels::kKltCoefficientMost / static_cast<float>(data_.levels[level_].multiplier);
        for (const std::uint32_t t : chosen_) {
            const std::span<std::int16_t> q(unit.q.row(t).data(), active);
            for (std::size_t i = 0; i < active; ++i) {
                const bool fits = std::abs(steps(t, i)) <= most;
                if (!fits) unfit_[t] = 1;
                q[i] = static_cast<std::int16_t>(std::nearbyint(fits ? steps(t, i) : 0.0f));
            }
            unit.gains[t] = gains.cheapest(ops_, q);
        }
        TokenStrips strips;
        strips.make(header_, chosen_, gains_of(unit, chosen_));
        level_gains(strips, unit.gains);
        const std::vector<ClassRun> runs = class_runs(from.classes_of(level_).first(active));
        for (const std::uint32_t t : chosen_) drop_uncoded(runs, unit.gains[t], unit.q.row(t).data());
        return unit;
    }

    void write_blocks() {
        const std::size_t run = header_.klt.run_layers, layers = data_.layout.layers;
        for (std::size_t first = 0; first < layers; first += run) {
            const std::size_t count = std::min(run, layers - first);
            for (std::size_t l = first; l < first + count; ++l) write_layer(l);
            std::vector<entropy::BlockWriter::Bytes> blocks(count);
            entropy::BlockWriter::Block coded = {.writer = &writer_, .pieces = blocks};
            FetchAhead nothing;
            entropy::BlockWriter::finish_all({&coded, 1}, nothing);
            strips_.clear();
            for (std::size_t i = 0; i < count; ++i)
                header_.block_bytes[first + i] = static_cast<std::uint32_t>(blocks[i].size());
        }
    }

    void write_layer(std::size_t layer) {
        const std::size_t units = data_.units_per_layer();
        for (std::size_t p = 0; p < data_.layout.planes.size(); ++p) write_exact_rows(layer, p);
        const auto of_layer = std::span(units_).subspan(layer * units, units);
        for (const Unit& unit : of_layer) writer_.vector(gains_of(unit, body_));
        const Unit* unit = of_layer.data();
        for (std::size_t p = 0; p < data_.layout.planes.size(); ++p) {
            for (std::size_t part = 0; part < data_.parts[p]; ++part)
                write_coefficients(set_.unit(layer, p, part), *unit++);
        }
        writer_.boundary();
    }

    void write_exact_rows(std::size_t layer, std::size_t plane) {
        const PlaneShape& shape = data_.layout.planes[plane];
        const PlaneRows& from = rows(layer, plane);
        const Dtype dtype = header_.layout.dtype;
        for (std::size_t head = 0; head < shape.heads; ++head) {
            for (const std::uint32_t t : header_.klt.exact_tokens) {
                write_exact_row(writer_, dtype,
                                static_cast<const std::byte*>(from.rows) + t * from.row_bytes +
                                    head * shape.head_dim * kernels::dtype_bytes(dtype),
                                shape.head_dim);
            }
        }
    }

    void write_coefficients(const CalibrationUnit& from, const Unit& unit) {
        TokenStrips strips;
        strips.make(header_, body_, gains_of(unit, body_));
        const auto classes = from.classes_of(level_);
        for (const TokenStrip& strip : strips.strips()) {
            for (std::size_t i = 0; i < leading_coded(classes, strip.gain); ++i) {
                std::vector<std::int16_t>& values = strips_.emplace_back();
                for (const std::uint32_t t : strips.tokens(strip)) values.push_back(unit.q(t, i));
                writer_.strip(klt_class(classes[i], strip.gain), values);
            }
        }
    }

    const kernels::Ops& ops_ = kernels::best_ops();
    const ChunkInput& input_;
    const KltAnalysis& analysis_;
    const CalibrationData& data_;
    Calibration::Set set_;
    ChunkHeader header_;
    std::size_t level_;                  // counted from 0
    std::vector<std::uint32_t> chosen_;  // tokens that are coded where they can be
    std::vector<std::uint32_t> body_;    // those that were
    Rows features_;
    std::vector<Rows> states_;         // [layer][plane]
    std::vector<Unit> units_;          // [layer][plane][part]
    std::vector<std::uint8_t> unfit_;  // [token]
    entropy::BlockWriter writer_;
    std::vector<std::vector<std::int16_t>> strips_;  // until the run is written
};

Coded code(const tools::KvCache& cache, const Setup& setup, const EncodeOptions& options) {
    const auto analysis = KltAnalysis::make(options.calibration);
    if (!analysis.ok()) throw tools::Error(analysis.status().message());
    Coded out = {cache, 0};
    const std::size_t chunks = (cache.tokens() + setup.chunk_tokens - 1) / setup.chunk_tokens;
    std::vector<double> bits(chunks);
    setup.executor->run(chunks, [&](std::size_t i, std::size_t) {
        const std::size_t first = i * setup.chunk_tokens;
        const std::size_t count = std::min(setup.chunk_tokens, cache.tokens() - first);
        const std::vector<PlaneRows> rows = cache.rows(first);
        const ChunkInput input = {
            &cache.layout, cache.model,         "", std::span(cache.token_ids).subspan(first, count),
            first,         cache.base_position, {}, rows};
        bits[i] = FloatChunk(input, options, *analysis.value()).code(out.decoded.buffers(first));
    });
    out.bits = std::accumulate(bits.begin(), bits.end(), 0.0);
    return out;
}

std::vector<Point> points(const Setup& setup) {
    std::vector<Point> out;
    if (setup.calibration.empty()) return out;
    const auto calibration = tools::load_calibration(setup.calibration);
    for (unsigned level = 1; level <= calibration->data().levels.size(); ++level) {
        out.push_back({"kvcast klt, reconstructed in floats", fmt::format("level {}", level), false,
                       [level, calibration](const tools::KvCache& cache, const Setup& s) {
                           EncodeOptions options;
                           options.profile = Profile::kKlt;
                           options.level = level;
                           options.sinks = kKltSinks;
                           options.calibration = calibration;
                           return code(cache, s, options);
                       }});
    }
    return out;
}

const Registration registration(points);

}  // namespace
}  // namespace kvcast::bench
