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

// Steps in which rows are fetched, for each channel of heads that are coded exactly side by side: one while
// models are chosen, one while it is coded.
constexpr std::size_t kStepsOfChannel = 2;

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

// A block: which heads of which layer, from `first` on.
struct BlockPlace {
    std::size_t layer;
    std::size_t block;  // of the layer
    std::size_t first;
    std::size_t heads;
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
    std::vector<HeadPlace> places = head_places(*input.layout);

    const Layout& layout() const { return *input.layout; }
    std::size_t exact_rows() const { return header.exact_rows; }
    std::size_t body_tokens() const { return header.tokens - exact_rows(); }
    std::size_t stride() const { return line_stride(body_tokens()); }  // of tiles
    std::size_t layer_width() const { return places.back().layer_column + places.back().dim; }

    // Nothing of a layer has to be known before its last head is coded.
    bool head_by_head() const { return header.profile == Profile::kLossless; }

    const PlaneRows& rows(std::size_t layer, std::size_t plane) const {
        return input.planes[layer * layout().planes.size() + plane];
    }

    const std::uint8_t* element(std::size_t layer, const HeadPlace& h, std::size_t token) const {
        const PlaneRows& from = rows(layer, h.plane);
        return static_cast<const std::uint8_t*>(from.rows) + token * from.row_bytes +
               h.column * kernels::dtype_bytes(layout().dtype);
    }

    // Adds bodies of channels from a head's first one on.
    void fetch(FetchAhead& ahead, std::size_t layer, const HeadPlace& h, std::size_t channels) const {
        ahead.add(element(layer, h, exact_rows()), rows(layer, h.plane).row_bytes,
                  channels * kernels::dtype_bytes(layout().dtype), body_tokens());
    }

    // Blocks are coded side by side, which takes little longer than one of them: up to kAbreast of one layer
    // or, where layers have one each, of as many layers. Each such group is a part of the object.
    std::size_t groups_of_layer() const { return (header.blocks_per_layer() + kAbreast - 1) / kAbreast; }
    std::size_t groups() const {
        const std::size_t layers = layout().layers;
        return header.blocks_per_layer() == 1 ? (layers + kAbreast - 1) / kAbreast
                                              : layers * groups_of_layer();
    }

    // Sets the blocks of a group and returns how many they are.
    std::size_t group(std::size_t index, std::array<BlockPlace, kAbreast>& blocks) const {
        const std::size_t per_layer = header.blocks_per_layer(), heads = header.block_heads;
        const bool one_each = per_layer == 1;
        const std::size_t layer = one_each ? kAbreast * index : index / groups_of_layer();
        const std::size_t block = one_each ? 0 : kAbreast * (index % groups_of_layer());
        const std::size_t left = one_each ? layout().layers - layer : per_layer - block;
        const std::size_t count = std::min(kAbreast, left);
        for (std::size_t i = 0; i < count; ++i) {
            BlockPlace& b = blocks[i];
            b.layer = one_each ? layer + i : layer;
            b.block = one_each ? 0 : block + i;
            b.first = b.block * heads;
            b.heads = std::min(heads, places.size() - b.first);
        }
        return count;
    }
};

class LayerEncoder {
  public:
    LayerEncoder(const Job& job, std::size_t layer, Workspace& w)
        : job_(job), layer_(layer), w_(w), layout_(job.layout()) {}

    // Loads the layer and decides how each plane is coded. Where `followed`, the same worker takes the next
    // layer next.
    void begin(bool followed) {
        if (job_.head_by_head()) return;
        const std::size_t planes = layout_.planes.size();
        w_.tile.resize(std::max(w_.tile.size(), job_.layer_width() * job_.stride()));
        for (std::size_t p = 0; p < planes; ++p) params(p) = plan(p);
        w_.ahead.clear();
        if (!followed) return;
        job_.fetch(w_.ahead, layer_ + 1, job_.places.front(), layout_.planes.front().width());
        w_.ahead.spread(job_.layer_width());
    }

    // Takes a head down in the part's writer.
    void take_down(const HeadPlace& h, Workspace::Part& part) {
        write_exact_rows(h, part.writer);
        const std::size_t tokens = job_.body_tokens(), stride = job_.stride();
        if (tokens == 0) return;
        const std::size_t at = job_.head_by_head() ? 0 : h.layer_column * stride;
        const std::size_t values = job_.head_by_head() ? h.dim * stride : job_.layer_width() * stride;
        if (params(h.plane).mode == PlaneMode::kQuantised) {
            part.symbols.resize(std::max(part.symbols.size(), values));
            write_quantised_head(part.writer, job_.ops, job_.header.delta, params(h.plane), tile(h),
                                 {h.dim, tokens, stride}, part.symbols.data() + at, w_.quantised, w_.ahead);
            return;
        }
        const std::size_t element_bytes = kernels::dtype_bytes(layout_.dtype);
        part.elements.resize(std::max(part.elements.size(), values * element_bytes));
        void* elements = part.elements.data() + at * element_bytes;
        job_.ops.load_elements(job_.element(layer_, h, job_.exact_rows()), row_bytes(h), layout_.dtype,
                               tokens, h.dim, elements, stride);
        write_exact_body(part.writer, layout_.dtype, elements, stride, h.dim, tokens, w_.models, w_.ahead);
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

    std::size_t row_bytes(const HeadPlace& h) const { return job_.rows(layer_, h.plane).row_bytes; }

    float* tile(const HeadPlace& h) { return w_.tile.data() + h.layer_column * job_.stride(); }

    // Loads a plane's body and decides how it is coded.
    PlaneParams plan(std::size_t plane) {
        if (job_.body_tokens() == 0) return {};
        const bool turned = plane == 0 && job_.header.unrotated;
        float largest = 0;
        w_.ahead.clear();
        for (const HeadPlace& h : job_.places) {
            if (h.plane == plane + 1 && h.column == 0) {
                job_.fetch(w_.ahead, layer_, h, layout_.planes[h.plane].width());
                w_.ahead.spread(layout_.planes[plane].width());
            }
            if (h.plane != plane) continue;
            const auto turn = turned ? job_.rope.rotation(job_.exact_rows()) : kernels::Rotation{};
            const float of_head =
                job_.ops.load_head({job_.element(layer_, h, job_.exact_rows()), row_bytes(h), layout_.dtype,
                                    job_.body_tokens(), h.dim, turn, tile(h), job_.stride()});
            largest = std::max(largest, of_head);
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
        for (const HeadPlace& h : job_.places) {
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

    void write_exact_rows(const HeadPlace& h, entropy::BlockWriter& writer) {
        for (std::size_t t = 0; t < job_.exact_rows(); ++t)
            write_exact_row(writer, layout_.dtype, job_.element(layer_, h, t), h.dim);
    }

    const Job& job_;
    std::size_t layer_;
    Workspace& w_;
    const Layout& layout_;
};

using entropy::BlockWriter;

// One group of blocks.
class GroupEncoder {
  public:
    GroupEncoder(const Job& job, std::size_t index, Workspace& w)
        : job_(job), index_(index), w_(w), count_(job.group(index, places_)) {}

    // Groups of one layer begin it once.
    void run(bool begins_layers) {
        for (std::size_t i = 0; i < count_; ++i) {
            LayerEncoder layer(job_, places_[i].layer, w_);
            blocks_[i] = {&w_.parts[i].writer, layer.cost(), {}};
            if (begins_layers && (i == 0 || places_[i].layer != places_[i - 1].layer))
                layer.begin(followed(i));
            if (!job_.head_by_head()) take_down(i, places_[i].first, places_[i].heads);
        }
        if (job_.head_by_head()) code_head_by_head();
        BlockWriter::finish_all(blocks(), w_.ahead);
        std::array<ChunkAssembly::Bytes, kAbreast> pieces;
        for (std::size_t i = 0; i < count_; ++i) {
            pieces[i] = blocks_[i].bytes;
            LayerEncoder(job_, places_[i].layer, w_).note(places_[i].block, pieces[i]);
        }
        job_.object.add(index_, std::span(pieces).first(count_));
    }

  private:
    std::span<BlockWriter::Block> blocks() { return std::span(blocks_).first(count_); }

    // The worker takes the next layer after that of block `i`.
    bool followed(std::size_t i) const {
        const std::size_t layer = places_[i].layer;
        return layer < places_[count_ - 1].layer || (job_.alone && layer + 1 < job_.layout().layers);
    }

    void take_down(std::size_t i, std::size_t first, std::size_t heads) {
        LayerEncoder layer(job_, places_[i].layer, w_);
        for (std::size_t h = first; h < first + heads; ++h) layer.take_down(job_.places[h], w_.parts[i]);
    }

    // The last head first, and only one of each block in memory at a time.
    void code_head_by_head() {
        for (std::size_t h = places_[0].heads; h-- > 0;) {
            fetch_before(h);
            for (std::size_t i = 0; i < count_; ++i) {
                if (h < places_[i].heads) take_down(i, places_[i].first + h, 1);
            }
            BlockWriter::code_all(blocks(), w_.ahead);
        }
    }

    // What comes after head `h` of each block.
    void fetch_before(std::size_t h) {
        std::array<BlockPlace, kAbreast> next = places_;
        std::size_t count = count_;
        w_.ahead.clear();
        if (h == 0) {
            if (!job_.alone || index_ + 1 == job_.groups()) return;
            count = job_.group(index_ + 1, next);
        }
        for (std::size_t i = 0; i < count; ++i) {
            const std::size_t head = h == 0 ? next[i].heads - 1 : h - 1;
            if (head >= next[i].heads) continue;
            const HeadPlace& place = job_.places[next[i].first + head];
            job_.fetch(w_.ahead, next[i].layer, place, place.dim);
        }
        w_.ahead.spread(kStepsOfChannel * job_.places[places_[0].first + h].dim);
    }

    const Job& job_;
    std::size_t index_;
    Workspace& w_;
    std::array<BlockPlace, kAbreast> places_ = {};
    std::size_t count_;
    std::array<BlockWriter::Block, kAbreast> blocks_ = {};
};

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
    const RopeTable rope = header.unrotated ? chunk_turns(*s.ops, header, header.position()) : RopeTable();
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
        s.object.begin(object, job.groups());
        const std::size_t of_task = header.blocks_per_layer() == 1 ? 1 : job.groups_of_layer();
        executor.run(job.groups() / of_task, [&](std::size_t task, std::size_t worker) {
            for (std::size_t g = 0; g < of_task; ++g)
                GroupEncoder(job, task * of_task + g, s.workspaces[worker]).run(g == 0);
        });
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
