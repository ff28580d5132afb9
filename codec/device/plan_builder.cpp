#include "codec/device/plan_builder.h"

#include <algorithm>

#include "codec/device/calibration_image.h"
#include "codec/device/chain_layout.h"
#include "codec/device/image.h"
#include "codec/device/unit_task.h"
#include "codec/entropy/model.h"
#include "codec/klt/klt_chunk.h"

namespace kvcast::device {
namespace {

namespace cuda = kernels::cuda;

// An array of the image, as the plan keeps it.
template <typename T>
DecodePlan::Array append_array(std::vector<std::byte>& image, const std::vector<T>& items) {
    return {append<T>(image, items), u32(items.size())};
}

template <typename T>
const T* at(const void* base, std::size_t offset) {
    return reinterpret_cast<const T*>(static_cast<const std::byte*>(base) + offset);
}

// Channels of a head that are turned, and those that are not, as runs of `unit` neighbours.
bool in_runs(const cuda::StoreTask& task, const cuda::RotationTask* r, std::uint32_t unit) {
    if (task.channels % unit != 0) return false;
    if (r == nullptr) return true;
    const std::uint32_t end = r->first_channel + 2 * r->pairs;
    return r->pairs % unit == 0 && r->first_channel % unit == 0 && r->pair_step == 1 &&
           r->partner == r->pairs && (r->first_channel == 0 || end == task.channels);
}

bool aligned(const cuda::RowsAt& rows, std::uint32_t bytes) {
    return (reinterpret_cast<std::uintptr_t>(rows.rows) | rows.row_bytes | rows.head_bytes |
            rows.page_bytes) %
               bytes ==
           0;
}

cuda::StoreWay store_way(const cuda::StoreTask& task, const cuda::RotationTask* rotation) {
    const bool converted = task.exact && (task.from != task.to || rotation != nullptr);
    if (task.to == Dtype::kF32 || converted) return cuda::StoreWay::kAny;
    constexpr std::uint32_t word = 2, words = 4;
    if (task.octets) {
        const bool fits = in_runs(task, rotation, words) && aligned(task.out, words * sizeof(std::uint16_t));
        return fits ? cuda::StoreWay::kOctets : cuda::StoreWay::kAny;
    }
    const bool along = task.channel_stride == 1 && task.token_stride % word == 0 &&
                       task.head_stride % word == 0 && in_runs(task, rotation, word) &&
                       aligned(task.out, word * sizeof(std::uint16_t));
    return along ? cuda::StoreWay::kAlongSlots : cuda::StoreWay::kAny;
}

// Whether the warps that decode a plane can store it: see PlaneTask.
bool is_direct(const cuda::PlaneTask& plane, const cuda::StoreTask& body, const cuda::RotationTask* r) {
    constexpr std::uint32_t run = cuda::kDirectChannels;
    if (body.to != Dtype::kBf16 || plane.anchor_group != 0 || plane.body_tokens == 0 ||
        plane.body_tokens > cuda::kBodyUnit || !aligned(body.out, 16))
        return false;
    if (!plane.quantised && body.from != body.to) return false;
    if (plane.quantised && plane.scale.exponent > cuda::kMostFusedExponent) return false;
    if (!in_runs(body, r, run)) return false;
    return r == nullptr ||
           (plane.quantised && 2 * r->pairs == plane.channels && r->column_stride == 1 && r->columns > 1);
}

cuda::BucketTable bucket_table(const kernels::AliasTable& alias) {
    constexpr unsigned shift = 32 - kernels::kBucketBits;
    cuda::BucketTable table = {};
    for (std::size_t b = 0; b < kernels::kSymbols; ++b) {
        table.entries[b] = {alias.entry[2 * b], alias.entry[2 * b + 1]};
        table.last[b].slot = (alias.divider[b] - 1) << shift | ((1u << shift) - 1);
    }
    return table;
}

}  // namespace

template <typename T>
std::uint64_t PlanBuilder::put(std::span<const T> items) {
    return append(front_, items);
}

void PlanBuilder::add(const ChunkSource& c, std::uint32_t index) {
    const ChunkHeader& h = *c.header;
    ++chunks_;
    const std::uint64_t base = c.base_position.value_or(h.base_position);
    absolute_ = h.unrotated ? rotation(c, base + h.first_token, h.tokens) : cuda::kNone;
    shift_ = base != h.base_position ? rotation(c, base - h.base_position, 1) : cuda::kNone;
    if (h.profile == Profile::kKlt) {
        add_klt(c, index);
        return;
    }
    std::uint64_t offset = 0;
    for (std::size_t layer = 0; layer < h.layout.layers; ++layer) {
        mark(layer, h.layout.planes.size(), 1);
        const bool direct = add_planes(c, layer);
        add_blocks(c, index, layer, direct, offset);
    }
}

// What the layers before this one of the first chunk have.
void PlanBuilder::mark(std::size_t layer, std::size_t planes, std::size_t run_layers) {
    if (chunks_ != 1) return;
    marks_.push_back({.blocks = u32(blocks_.size()),
                      .klt_runs = u32(klt_runs_.empty() ? 0 : (layer + run_layers - 1) / run_layers),
                      .waves = u32(klt_runs_.empty() ? 0 : layer * planes),
                      .tiles = u32(tiles_.size())});
}

// Angles in the order in which the profile's states lie.
std::uint32_t PlanBuilder::rotation(const ChunkSource& c, std::uint64_t first, std::size_t columns) {
    const Rope& rope = c.header->layout.rope;
    if (rope.pairing == RopePairing::kNone) return cuda::kNone;
    const AngleOrder order =
        c.header->profile == Profile::kKlt ? AngleOrder::kByPosition : AngleOrder::kByPair;
    rotations_.push_back(rotation_task(rope, first, columns, front_, workspace_, order));
    return u32(rotations_.size() - 1);
}

const cuda::RotationTask* PlanBuilder::rotation_at(std::uint32_t index) const {
    return index == cuda::kNone ? nullptr : &rotations_[index];
}

void PlanBuilder::store(cuda::StoreTask task) {
    if (task.tokens == 0) return;
    const cuda::RotationTask* rotation = rotation_at(task.rotation);
    task.pairs = rotation == nullptr ? 0 : rotation->pairs;
    task.way = store_way(task, rotation);
    for (std::uint64_t i = 0; i < cuda::tiles_of(task); ++i)
        tiles_.push_back({u32(stores_.size()), static_cast<std::uint32_t>(i)});
    stores_.push_back(task);
}

// What all stores of a plane have in common.
cuda::StoreTask PlanBuilder::store_of(const ChunkSource& c, std::size_t layer, std::size_t plane) const {
    const Layout& layout = c.header->layout;
    const DevicePlane& t = c.planes[layer * layout.planes.size() + plane];
    const PlaneShape& shape = layout.planes[plane];
    const Dtype dtype = c.dtype.value_or(layout.dtype);
    cuda::StoreTask task = {};
    task.heads = u32(shape.heads);
    task.channels = u32(shape.head_dim);
    task.rotation = cuda::kNone;
    task.from = layout.dtype;
    task.to = dtype;
    task.out = rows_at(t, shape.head_dim, dtype);
    return task;
}

// ---- delta and lossless

void PlanBuilder::add_blocks(const ChunkSource& c, std::uint32_t index, std::size_t layer, bool direct,
                             std::uint64_t& offset) {
    const ChunkHeader& h = *c.header;
    const std::size_t per_layer = h.blocks_per_layer();
    for (std::size_t b = 0; b < per_layer; ++b) {
        const std::uint32_t bytes = h.block_bytes[layer * per_layer + b];
        blocks_.push_back({.begin = at<std::uint8_t>(c.payload, offset),
                           .bytes = bytes,
                           .plane = u32(planes_.size() - h.layout.planes.size()),
                           .first_head = u32(b * h.block_heads),
                           .end_head = u32(std::min((b + 1) * h.block_heads, h.layout.heads_per_layer())),
                           .status = u32(places_.size()),
                           .direct = direct});
        places_.push_back({index, u32(layer), u32(b)});
        offset += bytes;
    }
}

// All planes of a layer, which share blocks; whether they are direct.
bool PlanBuilder::add_planes(const ChunkSource& c, std::size_t layer) {
    const std::size_t count = c.header->layout.planes.size(), first = planes_.size();
    std::vector<PlaneStores> stores;
    bool direct = true;
    for (std::size_t p = 0; p < count; ++p) {
        stores.push_back(add_plane(c, layer, p));
        const cuda::StoreTask& body = stores.back().body;
        direct = direct && is_direct(planes_.back(), body, rotation_at(body.rotation));
    }
    for (std::size_t p = 0; p < count; ++p) {
        cuda::PlaneTask& plane = planes_[first + p];
        const auto& [exact, body] = stores[p];
        plane.exact_direct = direct && exact.rotation == cuda::kNone && exact.from == exact.to;
        if (!plane.exact_direct) store(exact);
        if (!direct) store(body);
    }
    (direct ? any_direct_ : any_indirect_) = true;
    return direct;
}

// A plane's task; its stores are left to the caller.
PlanBuilder::PlaneStores PlanBuilder::add_plane(const ChunkSource& c, std::size_t layer, std::size_t plane) {
    const ChunkHeader& h = *c.header;
    const PlaneShape& shape = h.layout.planes[plane];
    const PlaneParams& params = h.planes[layer * h.layout.planes.size() + plane];
    const bool quantised = params.mode == PlaneMode::kQuantised;
    const std::size_t exact_rows = h.exact_rows, body = h.tokens - exact_rows;
    const std::size_t stride = round_up(body, cuda::kBodyUnit);
    const bool anchored = h.delta.predictor == Predictor::kAnchor;
    cuda::PlaneTask task = {
        .body = workspace_.take(shape.width() * stride * cuda::element_bytes(!quantised, h.layout.dtype)),
        .rows = workspace_.take(shape.width() * exact_rows * cuda::element_bytes(true, h.layout.dtype)),
        .heads = u32(shape.heads),
        .channels = u32(shape.head_dim),
        .body_tokens = u32(body),
        .body_stride = u32(stride),
        .exact_rows = u32(exact_rows),
        .anchor_group = anchored ? u32(h.delta.anchor_group) : 0u,
        .anchor_shift = static_cast<std::uint8_t>(h.delta.anchor_shift),
        .guard_bits = static_cast<std::uint8_t>(params.guard_bits),
        .quantised = quantised,
        .source = h.layout.dtype,
        .exact_direct = false,
        .rotation = cuda::kNone,
        .scale = params.scale,
        .out = {}};
    most_channels_ = std::max(most_channels_, task.channels);

    const std::uint32_t shift = plane == 0 ? shift_ : cuda::kNone;
    cuda::StoreTask rows = store_of(c, layer, plane);
    rows.source = task.rows;
    rows.head_stride = std::uint64_t{task.channels} * task.exact_rows;
    rows.channel_stride = 1;
    rows.token_stride = task.channels;
    rows.tokens = task.exact_rows;
    rows.rotation = shift;
    rows.exact = true;
    cuda::StoreTask states = store_of(c, layer, plane);
    states.source = task.body;
    states.head_stride = std::uint64_t{task.channels} * task.body_stride;
    states.channel_stride = task.body_stride;
    states.token_stride = 1;
    states.octets = true;
    states.tokens = task.body_tokens;
    states.first_token = task.exact_rows;
    states.rotation = quantised && plane == 0 && h.unrotated ? absolute_ : shift;
    states.scale = params.scale;
    states.exact = !quantised;
    task.rotation = states.rotation;
    task.out = states.out;
    planes_.push_back(task);
    return {rows, states};
}

// ---- klt

struct PlanBuilder::KltChunk {
    const ChunkSource& source;
    const ChunkHeader& header;
    const CalibrationData& data;
    Calibration::Set set;
    std::vector<std::uint32_t> body;
    std::uint64_t body_list;              // image: the body tokens
    std::uint64_t exact_list;             // image: the exact tokens
    std::uint64_t token_features;         // image: features of the body tokens
    std::vector<std::uint64_t> states;    // workspace: [layer][plane]
    std::vector<std::uint64_t> features;  // the same
    std::optional<ChainLayout> chain;
};

void PlanBuilder::add_klt(const ChunkSource& c, std::uint32_t index) {
    const ChunkHeader& h = *c.header;
    const Calibration& calibration = c.calibration->calibration();
    KltChunk k = {c,  h, calibration.data(), calibration.set_of_level(h.level), body_tokens(h), 0, 0, 0, {},
                  {}, {}};
    std::vector<std::int32_t> ids;
    for (const std::uint32_t t : k.body) ids.push_back(h.token_ids[t]);
    k.chain = ChainLayout::make(k.data, k.set, cuda::kMostChainBytes);
    k.body_list = put<std::uint32_t>(k.body);
    k.exact_list = put<std::uint32_t>(h.klt.exact_tokens);
    k.token_features = put<std::int8_t>(unpack_features(k.data.tokens, ids));
    for (std::size_t layer = 0; layer < h.layout.layers; ++layer) {
        for (const PlaneShape& plane : h.layout.planes)
            k.states.push_back(workspace_.take(k.body.size() * plane.width() * sizeof(std::int16_t)));
    }
    k.features = take_features(workspace_, calibration, k.body.size());
    add_klt_runs(k, index);
    add_chain(k);
    for (std::size_t layer = 0; layer < h.layout.layers; ++layer) {
        mark(layer, h.layout.planes.size(), h.klt.run_layers);
        for (std::size_t plane = 0; plane < h.layout.planes.size(); ++plane) add_klt_plane(k, layer, plane);
    }
}

void PlanBuilder::add_klt_runs(const KltChunk& k, std::uint32_t index) {
    const ChunkHeader& h = k.header;
    std::vector<std::uint8_t> levels;
    std::size_t main_tokens = 0;
    for (const std::uint32_t t : k.body) {
        levels.push_back(static_cast<std::uint8_t>(level_index(h, t)));
        main_tokens += in_tail(h, t) ? 0 : 1;
    }
    const std::uint64_t level_list = put<std::uint8_t>(levels);
    const std::size_t units = k.data.units_per_layer();
    std::uint64_t offset = 0;
    for (std::size_t layer = 0; layer < h.layout.layers; ++layer) {
        if (layer % h.klt.run_layers == 0) {
            klt_runs_.push_back({.gains = workspace_.take(units * k.body.size() * sizeof(std::int16_t)),
                                 .order = workspace_.take(k.body.size() * sizeof(std::uint32_t)),
                                 .levels = level_list,
                                 .multipliers = at<std::uint16_t>(k.source.calibration_bytes,
                                                                  k.source.calibration->multipliers()),
                                 .level_count = u32(k.data.levels.size()),
                                 .first_piece = u32(klt_pieces_.size()),
                                 .pieces = u32(std::min(h.klt.run_layers, h.layout.layers - layer)),
                                 .planes = u32(h.layout.planes.size()),
                                 .body_tokens = u32(k.body.size()),
                                 .main_tokens = u32(main_tokens),
                                 .exact_tokens = u32(h.klt.exact_tokens.size()),
                                 .first_status = u32(places_.size()),
                                 .source = h.layout.dtype});
        }
        klt_pieces_.push_back({.begin = at<std::uint8_t>(k.source.payload, offset),
                               .bytes = h.block_bytes[layer],
                               .plane = u32(klt_planes_.size() + layer * h.layout.planes.size())});
        places_.push_back({index, u32(layer), 0});
        offset += h.block_bytes[layer];
    }
}

void PlanBuilder::add_klt_plane(const KltChunk& k, std::size_t layer, std::size_t plane) {
    const ChunkHeader& h = k.header;
    const PlaneShape& shape = h.layout.planes[plane];
    const std::size_t parts = k.data.parts[plane], part_width = k.data.part_width(plane);
    const cuda::KltPlaneTask task = {
        .coefficients = workspace_.take(k.body.size() * shape.width() * sizeof(std::int16_t)),
        .rows = workspace_.take(h.klt.exact_tokens.size() * shape.width() *
                                cuda::element_bytes(true, h.layout.dtype)),
        .classes = at<std::int8_t>(k.source.calibration_bytes,
                                   k.source.calibration->classes(k.set.index(layer, plane, 0))),
        .masks = workspace_.take(parts * k.body.size() * sizeof(std::uint32_t)),
        .heads = u32(shape.heads),
        .channels = u32(shape.head_dim),
        .parts = u32(parts),
        .part_width = u32(part_width)};
    klt_planes_.push_back(task);

    cuda::StoreTask rows = store_of(k.source, layer, plane);
    rows.source = task.rows;
    rows.head_stride = h.klt.exact_tokens.size() * shape.head_dim;
    rows.channel_stride = 1;
    rows.token_stride = task.channels;
    rows.tokens = u32(h.klt.exact_tokens.size());
    rows.list = true;
    rows.token_list = k.exact_list;
    rows.rotation = plane == 0 ? shift_ : cuda::kNone;
    rows.exact = true;
    store(rows);
    for (std::size_t part = 0; part < parts; ++part) {
        add_unit(k, layer, plane, part);
        cuda::StoreTask states = store_of(k.source, layer, plane);
        states.heads = u32(shape.heads / parts);
        states.source =
            k.states[layer * h.layout.planes.size() + plane] + part * part_width * sizeof(std::int16_t);
        states.head_stride = shape.head_dim;
        states.channel_stride = 1;
        states.token_stride = u32(shape.width());
        states.tokens = u32(k.body.size());
        states.list = true;
        states.token_list = k.body_list;
        states.rotation = plane == 0 ? absolute_ : cuda::kNone;
        states.scale = k.set.unit(layer, plane, part).scale;
        states.out.rows += part * states.heads * states.out.head_bytes;
        store(states);
    }
}

void PlanBuilder::add_unit(const KltChunk& k, std::size_t layer, std::size_t plane, std::size_t part) {
    const DeviceCalibration calibration = {*k.source.calibration, k.source.calibration_bytes, k.set};
    const UnitPlace place = {layer, plane, part};
    cuda::UnitTask task =
        predicted_unit(calibration, place, {k.token_features, k.features, k.states, k.body.size()});
    add_transform(task, calibration, place,
                  klt_planes_.back().coefficients + part * task.width * sizeof(std::int16_t), task.width);
    if (task.tokens == 0) return;
    task.has_masks = true;
    task.masks = klt_planes_.back().masks + part * k.body.size() * sizeof(std::uint32_t);
    if (k.chain) chain_unit(k, task, layer, plane, part);
    const std::size_t wave = layer * k.header.layout.planes.size() + plane;
    if (waves_.size() <= wave) waves_.resize(wave + 1);
    task.first_tile = u32(waves_[wave].tiles);
    waves_[wave].tiles += cuda::tiles_of(task);
    waves_[wave].units.push_back(task);
}

// The chunk's chain, whose units come with its planes.
void PlanBuilder::add_chain(const KltChunk& k) {
    chained_ = chained_ && k.chain.has_value();
    if (!k.chain || k.body.empty()) return;
    chain_bytes_ = std::max(chain_bytes_, k.chain->bytes());
    for (std::size_t i = 0; i < chain_tiles_.size(); ++i) {
        for (std::size_t first = 0; first < k.body.size(); first += (i + 1) * cuda::kTokenTile)
            chain_tiles_[i].push_back({u32(chains_.size()), u32(first)});
    }
    chains_.push_back({.first_unit = u32(chained_units_.size()),
                       .units = u32(k.header.layout.layers * k.data.units_per_layer()),
                       .tokens = u32(k.body.size()),
                       .features = u32(k.data.tokens.features),
                       .token_rows = k.token_features,
                       .resident = k.chain->tokens()});
}

void PlanBuilder::chain_unit(const KltChunk& k, cuda::UnitTask unit, std::size_t layer, std::size_t plane,
                             std::size_t part) {
    const std::vector<PredictionTerm>& terms = k.set.unit(layer, plane, part).terms;
    for (std::size_t n = 0; n < terms.size(); ++n) {
        unit.terms[n].resident = terms[n].source == PredictionTerm::Source::kTokens
                                     ? k.chain->tokens()
                                     : k.chain->features(layer - terms[n].layers_back, terms[n].plane, part);
    }
    unit.terms[terms.size()].resident = k.chain->coefficients(chained_units_.size());
    unit.resident = k.chain->features(layer, plane, part);
    chained_units_.push_back(unit);
}

// ---- the plan

Result<DecodePlan> PlanBuilder::finish() {
    bool fits = tiles_.size() <= kMostTiles && places_.size() <= kMostTiles;
    for (const Wave& w : waves_) fits = fits && w.tiles <= kMostTiles;
    if (!fits) return Status(ErrorCode::kLimitExceeded, "a batch beyond 2^31 tiles");
    DecodePlan plan;
    std::vector<std::byte>& image = plan.image_;
    image = std::move(front_);
    static_assert(entropy::kTables == cuda::kTables);
    std::vector<cuda::BucketTable> tables;
    for (std::size_t t = 0; t < entropy::kTables; ++t)
        tables.push_back(bucket_table(entropy::decode_table(t).alias));
    DecodePlan::Launches& l = plan.launches_;
    l.tables = append_array(image, tables);
    l.rotations = append_array(image, rotations_);
    l.planes = append_array(image, planes_);
    l.blocks = append_array(image, blocks_);
    l.any_direct = any_direct_;
    l.any_indirect = any_indirect_;
    l.most_channels = most_channels_;
    l.klt_planes = append_array(image, klt_planes_);
    l.klt_pieces = append_array(image, klt_pieces_);
    l.klt_runs = append_array(image, klt_runs_);
    for (const Wave& w : waves_) l.waves.push_back({append_array(image, w.units), u32(w.tiles)});
    if (chained_) {
        l.chains = append_array(image, chains_);
        for (std::size_t i = 0; i < chain_tiles_.size(); ++i)
            l.chain_tiles[i] = append_array(image, chain_tiles_[i]);
        l.chained_units = append_array(image, chained_units_);
        l.chain_bytes = chain_bytes_;
    }
    l.stores = append_array(image, stores_);
    l.tiles = append_array(image, tiles_);
    plan.workspace_bytes_ = workspace_.bytes();
    plan.blocks_ = std::move(places_);
    if (chunks_ == 1) {
        plan.marks_ = std::move(marks_);
        for (DecodePlan::Mark& m : plan.marks_) m.waves = std::min(m.waves, u32(l.waves.size()));
        plan.marks_.push_back(plan.end());
    }
    return plan;
}

}  // namespace kvcast::device
