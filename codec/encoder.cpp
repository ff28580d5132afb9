#include "codec/encoder.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "codec/chunk_plan.h"
#include "codec/delta/quantised_head.h"
#include "codec/klt/klt_encoder.h"
#include "codec/lossless/exact_head.h"
#include "codec/rope/rope_table.h"

namespace kvcast {
namespace {

// Buffers of one worker; they grow to the largest layer seen and stay.
struct Workspace {
    explicit Workspace(const kernels::Ops& ops) : writer(ops) {}

    entropy::BlockWriter writer;
    std::vector<float> tile;            // [channel of the layer][body token]
    std::vector<std::int16_t> symbols;  // the same shape
    std::vector<std::uint32_t> bits;    // the same shape, exact planes
    std::vector<std::uint32_t> rows;    // exact rows of the layer
    QuantisedScratch quantised;
    ExactModels models;
};

// One chunk on its way; layers only write their own part of it.
struct Job {
    const ChunkInput& input;
    const EncodeOptions& options;
    const kernels::Ops& ops;
    ChunkHeader& header;
    const RopeTable& rope;
    std::vector<std::vector<std::uint8_t>>& blocks;  // [layer]
    std::vector<entropy::BlockCost>* costs;          // [layer], or null

    std::size_t exact_rows() const { return header.delta.exact_rows; }
    std::size_t body_tokens() const { return header.tokens - exact_rows(); }
};

// A head of a layer: which plane, where its channels lie.
struct HeadPlace {
    std::size_t plane;
    std::size_t dim;
    std::size_t column;        // first channel within the plane
    std::size_t layer_column;  // first channel within the layer's planes side by side
};

std::vector<HeadPlace> head_places(const Layout& layout) {
    std::vector<HeadPlace> places;
    std::size_t layer_column = 0;
    for (std::size_t p = 0; p < layout.planes.size(); ++p) {
        for (std::size_t h = 0; h < layout.planes[p].heads; ++h) {
            const std::size_t dim = layout.planes[p].head_dim;
            places.push_back({p, dim, h * dim, layer_column});
            layer_column += dim;
        }
    }
    return places;
}

class LayerEncoder {
  public:
    LayerEncoder(const Job& job, std::size_t layer, Workspace& w)
        : job_(job), layer_(layer), w_(w), layout_(*job.input.layout), places_(head_places(layout_)) {}

    void run() {
        const std::size_t width = places_.back().layer_column + places_.back().dim;
        w_.tile.resize(std::max(w_.tile.size(), width * job_.body_tokens()));
        w_.symbols.resize(std::max(w_.symbols.size(), width * job_.body_tokens()));
        w_.bits.resize(std::max(w_.bits.size(), width * job_.body_tokens()));
        w_.rows.resize(std::max(w_.rows.size(), width * job_.exact_rows()));
        for (std::size_t p = 0; p < layout_.planes.size(); ++p) params(p) = plan(p);
        write_blocks();
    }

  private:
    PlaneParams& params(std::size_t plane) {
        return job_.header.planes[layer_ * layout_.planes.size() + plane];
    }

    const std::uint8_t* element(const HeadPlace& h, std::size_t token) const {
        const PlaneRows& rows = job_.input.planes[layer_ * layout_.planes.size() + h.plane];
        return static_cast<const std::uint8_t*>(rows.rows) + token * rows.row_bytes +
               h.column * kernels::dtype_bytes(layout_.dtype);
    }

    std::size_t row_bytes(const HeadPlace& h) const {
        return job_.input.planes[layer_ * layout_.planes.size() + h.plane].row_bytes;
    }

    float* tile(const HeadPlace& h) { return w_.tile.data() + h.layer_column * job_.body_tokens(); }

    // Loads a plane's body and decides how it is coded.
    PlaneParams plan(std::size_t plane) {
        if (job_.header.profile == Profile::kLossless || job_.body_tokens() == 0) return {};
        const bool turned = plane == 0 && job_.header.unrotated;
        float largest = 0;
        for (const HeadPlace& h : places_) {
            if (h.plane != plane) continue;
            job_.ops.load_head({element(h, job_.exact_rows()), row_bytes(h), layout_.dtype,
                                job_.body_tokens(), h.dim,
                                turned ? job_.rope.rotation(job_.exact_rows()) : kernels::Rotation{}, tile(h),
                                job_.body_tokens()});
            largest = std::max(largest, job_.ops.max_magnitude(tile(h), h.dim * job_.body_tokens()));
        }
        const double step = std::isfinite(largest) ? wanted_step(plane, largest) : 0;
        return choose_params(step, largest, job_.header.delta);
    }

    double wanted_step(std::size_t plane, float largest) {
        const LayerSteps& multipliers = job_.options.layer_steps;
        const double multiplier =
            multipliers.empty() ? 1 : multipliers[layer_ * layout_.planes.size() + plane];
        return kDeltaSteps[job_.header.level - 1] * multiplier * deviation(plane, largest);
    }

    // Standard deviation of a plane about its channel means, by integer sums, so that it is the same on every
    // backend.
    double deviation(std::size_t plane, float largest) {
        if (largest < 0x1p-100f || largest > 0x1p100f) return 0;
        const std::size_t tokens = job_.body_tokens();
        const float scale = kernels::power_of_two(20 - std::ilogb(largest));
        double sum = 0;
        for (const HeadPlace& h : places_) {
            if (h.plane != plane) continue;
            for (std::size_t c = 0; c < h.dim; ++c) {
                const kernels::Moments m = job_.ops.moments(tile(h) + c * tokens, tokens, scale);
                const auto total = static_cast<double>(m.sum);
                sum += static_cast<double>(m.sum_of_squares) - total * total / static_cast<double>(tokens);
            }
        }
        const auto values = static_cast<double>(layout_.planes[plane].width() * tokens);
        return std::sqrt(std::max(0.0, sum) / values) / scale;
    }

    void write_blocks() {
        const std::size_t per_block = job_.header.block_heads;
        const std::size_t blocks = job_.header.blocks_per_layer();
        std::vector<std::uint8_t>& out = job_.blocks[layer_];
        out.clear();
        for (std::size_t b = 0; b < blocks; ++b) {
            const std::size_t stop = std::min((b + 1) * per_block, places_.size());
            for (std::size_t h = b * per_block; h < stop; ++h) write_head(places_[h]);
            const std::size_t before = out.size();
            w_.writer.finish(out, job_.costs != nullptr ? &(*job_.costs)[layer_] : nullptr);
            job_.header.block_bytes[layer_ * blocks + b] = static_cast<std::uint32_t>(out.size() - before);
        }
        job_.header.layer_crc[layer_] = crc32(out);
    }

    void write_head(const HeadPlace& h) {
        write_exact_rows(h);
        const std::size_t tokens = job_.body_tokens();
        if (tokens == 0) return;
        if (params(h.plane).mode == PlaneMode::kQuantised) {
            write_quantised_head(w_.writer, job_.ops, job_.header.delta, params(h.plane), tile(h),
                                 {h.dim, tokens, tokens}, w_.symbols.data() + h.layer_column * tokens,
                                 w_.quantised);
            return;
        }
        std::uint32_t* bits = w_.bits.data() + h.layer_column * tokens;
        job_.ops.load_bits(element(h, job_.exact_rows()), row_bytes(h), layout_.dtype, tokens, h.dim, bits,
                           tokens);
        write_exact_body(w_.writer, layout_.dtype, bits, tokens, h.dim, tokens, w_.models);
    }

    void write_exact_rows(const HeadPlace& h) {
        for (std::size_t t = 0; t < job_.exact_rows(); ++t) {
            std::uint32_t* bits = w_.rows.data() + h.layer_column * job_.exact_rows() + t * h.dim;
            job_.ops.load_bits(element(h, t), row_bytes(h), layout_.dtype, 1, h.dim, bits, 1);
            write_exact_row(w_.writer, layout_.dtype, {bits, h.dim});
        }
    }

    const Job& job_;
    std::size_t layer_;
    Workspace& w_;
    const Layout& layout_;
    std::vector<HeadPlace> places_;
};

}  // namespace

struct ChunkEncoder::State {
    EncodeOptions options;
    const kernels::Ops* ops;
    std::vector<Workspace> workspaces;
    std::vector<std::vector<std::uint8_t>> blocks;
    KltEncoder klt;
    std::shared_ptr<const KltAnalysis> analysis;  // made for the first klt chunk
};

ChunkEncoder::ChunkEncoder(EncodeOptions options, const kernels::Ops& ops)
    : state_(new State{std::move(options), &ops, {}, {}, KltEncoder(ops), nullptr}) {}
ChunkEncoder::~ChunkEncoder() = default;
ChunkEncoder::ChunkEncoder(ChunkEncoder&&) noexcept = default;
ChunkEncoder& ChunkEncoder::operator=(ChunkEncoder&&) noexcept = default;

Status ChunkEncoder::encode(const ChunkInput& input, Executor& executor, std::vector<std::uint8_t>& object,
                            Hash& chain, EncodeReport* report) {
    State& s = *state_;
    if (Status bad = check_input(input, s.options); !bad.ok()) return bad;
    ChunkHeader header = plan_header(input, s.options);
    const RopeTable rope =
        header.unrotated ? RopeTable(header.layout.rope, header.position(), 1, header.tokens) : RopeTable();
    const std::size_t layers = header.layout.layers;
    while (s.workspaces.size() < executor.workers()) s.workspaces.emplace_back(*s.ops);
    s.blocks.resize(layers);
    std::vector<entropy::BlockCost> costs(report != nullptr ? layers : 0);
    if (header.profile == Profile::kKlt) {
        if (s.analysis == nullptr) {
            auto made = KltAnalysis::make(s.options.calibration);
            if (!made.ok()) return made.status();
            s.analysis = std::move(made.value());
        }
        Status coded = s.klt.encode(input, *s.analysis, header, rope, executor, s.blocks, costs);
        if (!coded.ok()) return coded;
    } else {
        const Job job = {
            input, s.options, *s.ops, header, rope, s.blocks, report != nullptr ? &costs : nullptr};
        executor.run(layers, [&](std::size_t layer, std::size_t worker) {
            LayerEncoder(job, layer, s.workspaces[worker]).run();
        });
    }

    Result<std::vector<std::uint8_t>> head = write_header(header);
    if (!head.ok()) return head.status();
    object = std::move(head.value());
    if (report != nullptr) *report = {object.size(), header.payload_bytes(), {}};
    for (const entropy::BlockCost& c : costs) {
        report->ideal.payload += c.payload;
        report->ideal.side += c.side;
    }
    for (const auto& blocks : s.blocks) object.insert(object.end(), blocks.begin(), blocks.end());
    chain = header.chain;
    return {};
}

}  // namespace kvcast
