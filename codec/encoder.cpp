#include "codec/encoder.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "codec/aligned_vector.h"
#include "codec/chunk_assembly.h"
#include "codec/chunk_plan.h"
#include "codec/delta/quantised_head.h"
#include "codec/fetch_ahead.h"
#include "codec/klt/klt_encoder.h"
#include "codec/lossless/exact_head.h"
#include "codec/rope/rope_table.h"

namespace kvcast {
namespace {

constexpr std::size_t kAbreast = entropy::BlockWriter::kMostAbreast;

// Buffers of one worker; they grow to the largest layer seen and stay. What a writer refers to stays apart
// for each of the blocks that are coded side by side.
struct Workspace {
    struct Part {
        explicit Part(const kernels::Ops& ops) : writer(ops) {}

        entropy::BlockWriter writer;
        AlignedVector<std::int16_t> symbols;   // [channel of the layer][body token], rows Job::stride() apart
        AlignedVector<std::uint8_t> elements;  // the same shape, exact planes
    };

    explicit Workspace(const kernels::Ops& ops) : parts{Part(ops), Part(ops), Part(ops), Part(ops)} {}

    AlignedVector<float> tile;  // the same shape again
    std::array<Part, kAbreast> parts;
    QuantisedScratch quantised;
    ExactModels models;
    FetchAhead ahead;
};

// One chunk on its way; layers only write their own part of it.
struct Job {
    const ChunkInput& input;
    const EncodeOptions& options;
    const kernels::Ops& ops;
    ChunkHeader& header;
    const RopeTable& rope;
    ChunkAssembly& object;
    std::vector<entropy::BlockCost>* costs;  // [layer], or null
    bool alone;                              // one worker does it all

    std::size_t exact_rows() const { return header.delta.exact_rows; }
    std::size_t body_tokens() const { return header.tokens - exact_rows(); }
    std::size_t stride() const { return line_stride(body_tokens()); }  // of tiles
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
    // What is coded of the layer refers to `part` of the workspace. Where `followed`, the same worker takes
    // the next layer next.
    LayerEncoder(const Job& job, std::size_t layer, Workspace& w, std::size_t part, bool followed)
        : job_(job),
          layer_(layer),
          followed_(followed),
          w_(w),
          part_(w.parts[part]),
          layout_(*job.input.layout),
          places_(head_places(layout_)) {}

    // Loads the layer and decides how each plane is coded.
    void begin() {
        const std::size_t width = places_.back().layer_column + places_.back().dim;
        w_.tile.resize(std::max(w_.tile.size(), width * job_.stride()));
        part_.symbols.resize(std::max(part_.symbols.size(), width * job_.stride()));
        const std::size_t bytes = width * job_.stride() * kernels::dtype_bytes(layout_.dtype);
        part_.elements.resize(std::max(part_.elements.size(), bytes));
        for (std::size_t p = 0; p < layout_.planes.size(); ++p) params(p) = plan(p);
        fetch_after(layout_.planes.size() - 1, width);
    }

    // Takes the heads of a block down.
    void take_down(std::size_t block, entropy::BlockWriter& writer) {
        const std::size_t stop = std::min((block + 1) * job_.header.block_heads, places_.size());
        for (std::size_t h = block * job_.header.block_heads; h < stop; ++h) write_head(places_[h], writer);
    }

    // What the layer's blocks should cost.
    entropy::BlockCost* cost() { return job_.costs != nullptr ? &(*job_.costs)[layer_] : nullptr; }

    // Notes the layer's blocks one after another.
    void note(std::size_t block, std::span<const std::uint8_t> bytes) {
        job_.header.block_bytes[layer_ * job_.header.blocks_per_layer() + block] =
            static_cast<std::uint32_t>(bytes.size());
        std::uint32_t& crc = job_.header.layer_crc[layer_];
        crc = crc32(bytes, crc);
    }

  private:
    PlaneParams& params(std::size_t plane) {
        return job_.header.planes[layer_ * layout_.planes.size() + plane];
    }

    const PlaneRows& rows(std::size_t plane) const {
        return job_.input.planes[layer_ * layout_.planes.size() + plane];
    }

    const std::uint8_t* element(const HeadPlace& h, std::size_t token) const {
        return static_cast<const std::uint8_t*>(rows(h.plane).rows) + token * row_bytes(h) +
               h.column * kernels::dtype_bytes(layout_.dtype);
    }

    std::size_t row_bytes(const HeadPlace& h) const { return rows(h.plane).row_bytes; }

    // Bodies of channels of `plane` or, where the layer has no such plane, of the next layer's first one are
    // needed after `steps` more steps.
    void fetch(std::size_t plane, std::size_t column, std::size_t channels, std::size_t steps) {
        if (plane == layout_.planes.size() && !followed_) return w_.ahead.stop();
        const PlaneRows& from = rows(plane);
        const std::size_t element_bytes = kernels::dtype_bytes(layout_.dtype);
        const auto* body = static_cast<const std::uint8_t*>(from.rows) + job_.exact_rows() * from.row_bytes;
        w_.ahead.aim(body + column * element_bytes, from.row_bytes, channels * element_bytes,
                     job_.body_tokens(), steps);
    }

    // The plane after this one.
    void fetch_after(std::size_t plane, std::size_t steps) {
        fetch(plane + 1, 0, layout_.planes[(plane + 1) % layout_.planes.size()].width(), steps);
    }

    // The head after this one, while its channels are looked at.
    void fetch_after(const HeadPlace& h) {
        const bool last = &h == &places_.back();
        const HeadPlace& next = last ? places_.front() : *(&h + 1);
        fetch(last ? layout_.planes.size() : next.plane, next.column, next.dim, h.dim);
    }

    float* tile(const HeadPlace& h) { return w_.tile.data() + h.layer_column * job_.stride(); }

    // Loads a plane's body and decides how it is coded.
    PlaneParams plan(std::size_t plane) {
        if (job_.header.profile == Profile::kLossless || job_.body_tokens() == 0) return {};
        const bool turned = plane == 0 && job_.header.unrotated;
        float largest = 0;
        for (const HeadPlace& h : places_) {
            if (h.plane != plane) continue;
            const auto turn = turned ? job_.rope.rotation(job_.exact_rows()) : kernels::Rotation{};
            const float of_head =
                job_.ops.load_head({element(h, job_.exact_rows()), row_bytes(h), layout_.dtype,
                                    job_.body_tokens(), h.dim, turn, tile(h), job_.stride()});
            largest = std::max(largest, of_head);
        }
        if (plane + 1 < layout_.planes.size()) fetch_after(plane, layout_.planes[plane].width());
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
                w_.ahead.step();
                const kernels::Moments m = job_.ops.moments(tile(h) + c * job_.stride(), tokens, scale);
                const auto total = static_cast<double>(m.sum);
                sum += static_cast<double>(m.sum_of_squares) - total * total / static_cast<double>(tokens);
            }
        }
        const auto values = static_cast<double>(layout_.planes[plane].width() * tokens);
        return std::sqrt(std::max(0.0, sum) / values) / scale;
    }

    void write_head(const HeadPlace& h, entropy::BlockWriter& writer) {
        write_exact_rows(h, writer);
        const std::size_t tokens = job_.body_tokens(), stride = job_.stride();
        if (tokens == 0) return;
        if (params(h.plane).mode == PlaneMode::kQuantised) {
            write_quantised_head(writer, job_.ops, job_.header.delta, params(h.plane), tile(h),
                                 {h.dim, tokens, stride}, part_.symbols.data() + h.layer_column * stride,
                                 w_.quantised, w_.ahead);
            return;
        }
        void* elements =
            part_.elements.data() + h.layer_column * stride * kernels::dtype_bytes(layout_.dtype);
        job_.ops.load_elements(element(h, job_.exact_rows()), row_bytes(h), layout_.dtype, tokens, h.dim,
                               elements, stride);
        fetch_after(h);
        write_exact_body(writer, layout_.dtype, elements, stride, h.dim, tokens, w_.models, w_.ahead);
    }

    void write_exact_rows(const HeadPlace& h, entropy::BlockWriter& writer) {
        for (std::size_t t = 0; t < job_.exact_rows(); ++t)
            write_exact_row(writer, layout_.dtype, element(h, t), h.dim);
    }

    const Job& job_;
    std::size_t layer_;
    bool followed_;
    Workspace& w_;
    Workspace::Part& part_;
    const Layout& layout_;
    std::vector<HeadPlace> places_;
};

using entropy::BlockWriter;

// Blocks are coded side by side, which takes little longer than one of them: some of one layer or, where
// layers have one each, those of some layers. What is coded at once is a part of the object.
class SideBySide {
  public:
    void put(LayerEncoder& layer, std::size_t block, BlockWriter& writer) {
        layer.take_down(block, writer);
        places_[count_] = {&layer, block};
        blocks_[count_++] = {&writer, layer.cost(), {}};
    }

    void finish(ChunkAssembly& object, std::size_t part) {
        BlockWriter::finish_all(std::span(blocks_).first(count_));
        std::array<ChunkAssembly::Bytes, kAbreast> pieces;
        for (std::size_t i = 0; i < count_; ++i) {
            pieces[i] = blocks_[i].bytes;
            places_[i].layer->note(places_[i].block, pieces[i]);
        }
        object.add(part, std::span(pieces).first(count_));
    }

  private:
    struct Place {
        LayerEncoder* layer;
        std::size_t block;
    };

    std::array<Place, kAbreast> places_;
    std::array<BlockWriter::Block, kAbreast> blocks_;
    std::size_t count_ = 0;
};

std::size_t groups_of(std::size_t count) {
    return (count + kAbreast - 1) / kAbreast;
}

// Layers of one block each.
void encode_layers(const Job& job, std::size_t group, Workspace& w) {
    const std::size_t first = kAbreast * group;
    const std::size_t count = std::min(kAbreast, job.header.layout.layers - first);
    std::vector<LayerEncoder> layers;
    layers.reserve(count);
    SideBySide blocks;
    for (std::size_t i = 0; i < count; ++i) {
        LayerEncoder& l = layers.emplace_back(job, first + i, w, i, i + 1 < count);
        l.begin();
        blocks.put(l, 0, w.parts[i].writer);
    }
    blocks.finish(job.object, group);
}

void encode_layer(const Job& job, std::size_t layer, Workspace& w) {
    LayerEncoder l(job, layer, w, 0, job.alone && layer + 1 < job.header.layout.layers);
    l.begin();
    const std::size_t all = job.header.blocks_per_layer(), groups = groups_of(all);
    for (std::size_t group = 0; group < groups; ++group) {
        SideBySide blocks;
        const std::size_t first = kAbreast * group;
        for (std::size_t b = first; b < std::min(all, first + kAbreast); ++b)
            blocks.put(l, b, w.parts[b - first].writer);
        blocks.finish(job.object, layer * groups + group);
    }
}

}  // namespace

struct ChunkEncoder::State {
    EncodeOptions options;
    const kernels::Ops* ops;
    std::vector<Workspace> workspaces;
    ChunkAssembly object;
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
    const RopeTable rope = header.unrotated ? chunk_turns(header, header.position()) : RopeTable();
    const std::size_t layers = header.layout.layers;
    while (s.workspaces.size() < executor.workers()) s.workspaces.emplace_back(*s.ops);
    std::vector<entropy::BlockCost> costs(report != nullptr ? layers : 0);
    if (header.profile == Profile::kKlt) {
        if (s.analysis == nullptr) {
            auto made = KltAnalysis::make(s.options.calibration);
            if (!made.ok()) return made.status();
            s.analysis = std::move(made.value());
        }
        s.object.begin(object, (layers + header.klt.run_layers - 1) / header.klt.run_layers);
        Status coded = s.klt.encode(input, *s.analysis, header, rope, executor, s.object, costs);
        if (!coded.ok()) return coded;
    } else {
        const Job job = {input,
                         s.options,
                         *s.ops,
                         header,
                         rope,
                         s.object,
                         report != nullptr ? &costs : nullptr,
                         executor.workers() == 1};
        if (header.blocks_per_layer() == 1) {
            s.object.begin(object, groups_of(layers));
            executor.run(groups_of(layers), [&](std::size_t group, std::size_t worker) {
                encode_layers(job, group, s.workspaces[worker]);
            });
        } else {
            s.object.begin(object, layers * groups_of(header.blocks_per_layer()));
            executor.run(layers, [&](std::size_t layer, std::size_t worker) {
                encode_layer(job, layer, s.workspaces[worker]);
            });
        }
    }

    Result<std::vector<std::uint8_t>> head = write_header(header);
    if (!head.ok()) return head.status();
    s.object.finish(head.value());
    if (report != nullptr) {
        *report = {head.value().size(), header.payload_bytes(), {}};
        for (const entropy::BlockCost& c : costs) {
            report->ideal.payload += c.payload;
            report->ideal.side += c.side;
        }
    }
    chain = header.chain;
    return {};
}

}  // namespace kvcast
