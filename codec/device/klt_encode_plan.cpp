#include "codec/device/klt_encode_plan.h"

#include <fmt/format.h>

#include <algorithm>

#include "codec/chunk_plan.h"
#include "codec/device/coder_tables.h"
#include "codec/device/unit_task.h"
#include "codec/klt/gain.h"
#include "codec/klt/klt_chunk.h"

namespace kvcast::device {
namespace {

namespace cuda = kernels::cuda;

}  // namespace

// One chunk that is being added.
struct KltPlanBuilder::Coding {
    const ChunkToEncode& source;
    const ChunkHeader& header;
    const CalibrationData& data;
    DeviceCalibration calibration;
    std::uint32_t chunk = 0;
    std::uint32_t rotation = cuda::kNone;
    std::uint64_t token_features = 0;          // image
    std::vector<std::uint64_t> features = {};  // workspace: [layer][plane]
    std::uint64_t sums = 0;                    // workspace, of one plane at a time, as the next four
    std::uint64_t products = 0;
    std::uint64_t unit_features = 0;
    std::uint64_t units = 0;
    std::uint64_t orders = 0;
};

Status KltPlanBuilder::check(const ChunkHeader& h) const {
    if (klt_.calibration == nullptr || klt_.analysis == nullptr)
        return {ErrorCode::kMissingCalibration, "no images of the calibration were given"};
    const Hash& id = options_.calibration->id();
    if (klt_.calibration->calibration().id() != id || klt_.analysis->analysis().calibration().id() != id)
        return {ErrorCode::kWrongCalibration, "the images are not of the options' calibration"};
    const void *calibration = klt_.calibration_bytes, *analysis = klt_.analysis_bytes;
    if (calibration == nullptr || analysis == nullptr || !is_aligned(calibration) || !is_aligned(analysis))
        return {ErrorCode::kBadArgument,
                "a calibration that is not on the device, or not at a multiple of 256 bytes"};
    return check_klt_options(h, options_.calibration->data());
}

Status KltPlanBuilder::add(const ChunkToEncode& source) {
    ChunkHeader header = plan_header(source.input, options_);
    if (Status s = check(header); !s.ok()) return s;
    EncodePlan::Chunk& chunk = plan_.chunks_.emplace_back();
    chunk.header = std::move(header);
    chunk.first_block = layers_;
    chunk.capacity = source.payload_capacity;
    const ChunkHeader& h = chunk.header;
    Coding c = {
        source,
        h,
        options_.calibration->data(),
        {*klt_.calibration, klt_.calibration_bytes, klt_.calibration->calibration().set_of_level(h.level)}};
    c.chunk = u32(chunks_.size());
    if (h.unrotated) {
        c.rotation = u32(rotations_.size());
        rotations_.push_back(rotation_task(h.layout.rope, h.position(), h.tokens, plan_.image_, workspace_));
    }
    add_tokens(c);
    add_memory(c);
    if (Status s = add_runs(c); !s.ok()) return s;
    for (std::size_t layer = 0; layer < h.layout.layers; ++layer) {
        for (std::size_t plane = 0; plane < h.layout.planes.size(); ++plane) add_plane(c, layer, plane);
    }
    layers_ += h.layout.layers;
    return {};
}

void KltPlanBuilder::add_tokens(Coding& c) {
    const ChunkHeader& h = c.header;
    std::vector<std::uint8_t> levels, tail, chosen(h.tokens);
    for (std::size_t t = 0; t < h.tokens; ++t) {
        levels.push_back(static_cast<std::uint8_t>(level_index(h, t)));
        tail.push_back(in_tail(h, t) ? 1 : 0);
    }
    for (const std::uint32_t t : h.klt.exact_tokens) chosen[t] = 1;
    c.token_features = append<std::int8_t>(plan_.image_, unpack_features(c.data.tokens, h.token_ids));
    const std::size_t list = (1 + h.tokens) * sizeof(std::uint32_t);
    chunks_.push_back({.levels = append<std::uint8_t>(plan_.image_, levels),
                       .in_tail = append<std::uint8_t>(plan_.image_, tail),
                       .chosen = append<std::uint8_t>(plan_.image_, chosen),
                       .unfit = workspace_.take(h.tokens * sizeof(std::uint32_t)),
                       .body = workspace_.take(list),
                       .exact = 0,  // finish() knows
                       .multipliers = c.calibration.at<std::uint16_t>(c.calibration.image.multipliers()),
                       .tokens = u32(h.tokens),
                       .level_count = u32(c.data.levels.size())});
}

void KltPlanBuilder::add_memory(Coding& c) {
    const ChunkHeader& h = c.header;
    std::size_t widest = 0;
    for (const PlaneShape& p : h.layout.planes) widest = std::max(widest, p.width());
    c.features = take_features(workspace_, *options_.calibration, h.tokens);
    c.sums = workspace_.take(h.tokens * widest * sizeof(std::int32_t));
    c.products = workspace_.take(h.tokens * widest * sizeof(std::int32_t));
    c.unit_features = workspace_.take(h.tokens * widest * sizeof(std::int16_t));
    const std::size_t parts = *std::max_element(c.data.parts.begin(), c.data.parts.end());
    c.units = workspace_.take(h.tokens * parts * sizeof(float));
    c.orders = workspace_.take(h.tokens * parts * sizeof(std::uint32_t));
}

Status KltPlanBuilder::add_runs(const Coding& c) {
    const ChunkHeader& h = c.header;
    const std::size_t first = runs_.size(), planes = h.layout.planes.size();
    for (std::size_t layer = 0; layer < h.layout.layers; layer += h.klt.run_layers) {
        const std::size_t layers = std::min(h.klt.run_layers, h.layout.layers - layer);
        const std::size_t bytes = layers * max_block_bytes(h, 0);
        if (bytes > std::numeric_limits<std::uint32_t>::max())
            return {ErrorCode::kLimitExceeded, "a run of layers beyond 2^32 bytes"};
        slots_.push_back({.slot = workspace_.take(bytes),
                          .slot_bytes = u32(bytes),
                          .plane = 0,
                          .first_head = 0,
                          .end_head = 0});
        runs_.push_back({.chunk = c.chunk,
                         .plane = u32(planes_.size() + layer * planes),
                         .planes = u32(planes),
                         .layers = u32(layers),
                         .order = workspace_.take(h.tokens * sizeof(std::uint32_t)),
                         .first_layer = u32(layers_ + layer)});
    }
    packs_.push_back({.payload = static_cast<std::uint8_t*>(c.source.payload),
                      .capacity = c.source.payload_capacity,
                      .first_block = u32(first),
                      .end_block = u32(runs_.size())});
    most_runs_ = std::max(most_runs_, runs_.size() - first);
    return {};
}

void KltPlanBuilder::add_plane(const Coding& c, std::size_t layer, std::size_t plane) {
    const ChunkHeader& h = c.header;
    const PlaneShape& shape = h.layout.planes[plane];
    const std::size_t index = layer * h.layout.planes.size() + plane, parts = c.data.parts[plane];
    planes_.push_back({.in = rows_at(c.source.planes[index], shape.head_dim, h.layout.dtype),
                       .q = workspace_.take(h.tokens * shape.width() * sizeof(std::int16_t)),
                       .gains = workspace_.take(h.tokens * parts * sizeof(std::int16_t)),
                       .row_models = workspace_.take(h.tokens * shape.heads * sizeof(std::uint16_t)),
                       .classes = c.calibration.at<std::int8_t>(
                           c.calibration.image.classes(c.calibration.set.index(layer, plane, 0))),
                       .chunk = c.chunk,
                       .heads = u32(shape.heads),
                       .channels = u32(shape.head_dim),
                       .parts = u32(parts),
                       .part_width = u32(c.data.part_width(plane)),
                       .rotation = plane == 0 ? c.rotation : cuda::kNone,
                       .first_head = u32(heads_),
                       .source = h.layout.dtype});
    heads_ += shape.heads;
    for (std::size_t part = 0; part < parts; ++part) add_unit(c, layer, plane, part);
}

void KltPlanBuilder::add_unit(const Coding& c, std::size_t layer, std::size_t plane, std::size_t part) {
    const ChunkHeader& h = c.header;
    const std::size_t index = layer * h.layout.planes.size() + plane;
    const std::size_t first = part * c.data.part_width(plane);
    const std::size_t at = c.calibration.set.index(layer, plane, part);
    const CalibrationUnit& coded = c.data.units[at];
    if (waves_.size() <= index) waves_.resize(index + 1);
    Wave& wave = waves_[index];
    cuda::KltUnitTask unit = {};
    unit.sums = c.sums + first * sizeof(std::int32_t);
    unit.products = c.products + first * sizeof(std::int32_t);
    unit.features = c.unit_features + first * sizeof(std::int16_t);
    unit.units = c.units + part * h.tokens * sizeof(float);
    unit.order = c.orders + part * h.tokens * sizeof(std::uint32_t);
    unit.plane = u32(planes_.size() - 1);
    unit.part = u32(part);
    unit.active[0] = u32(coded_coefficients(coded, h.level - 1));
    unit.active[1] = u32(coded_coefficients(coded, h.klt.tail_level - 1));
    // Whole steps of the transform's product, whose inputs behind the active ones are zero.
    const auto steps = cuda::div_up(std::max(unit.active[0], unit.active[1]), cuda::kUnitStep);
    unit.most_active = cuda::lesser(steps * cuda::kUnitStep, u32(c.data.part_width(plane)));
    unit.inverse_unit = 1 / kernels::unit_of(coded.scale);
    unit.fraction = klt_.analysis->analysis().fraction(at);
    unit.first_token = u32(wave.tokens);
    wave.tokens += h.tokens;

    const UnitPlace place = {layer, plane, part};
    cuda::UnitTask projection =
        predicted_unit(c.calibration, place, {c.token_features, c.features, {}, h.tokens});
    add_transform(projection, c.calibration, place, unit.features, unit.most_active);
    projection.sums = unit.sums;
    projection.first_tile = u32(wave.projection_tiles);
    wave.projection_tiles += cuda::tiles_of(projection);
    cuda::UnitTask product = analysed_unit(unit, at, projection);
    product.first_tile = u32(wave.product_tiles);
    wave.product_tiles += cuda::tiles_of(product);
    wave.units.push_back(unit);
    wave.projections.push_back(projection);
    wave.products.push_back(product);
}

// What a unit's residuals are multiplied by.
cuda::UnitTask KltPlanBuilder::analysed_unit(const cuda::KltUnitTask& unit, std::size_t index,
                                             const cuda::UnitTask& projection) const {
    const MatrixImage& m = klt_.analysis->matrix(index);
    const auto* bytes = static_cast<const std::uint8_t*>(klt_.analysis_bytes);
    cuda::UnitTask task = {};
    task.terms[task.term_count++] = {.features = unit.features,
                                     .matrix = bytes + m.entries,
                                     .shifts = bytes + m.shifts,
                                     .limbs = m.limbs,
                                     .slots = m.slots,
                                     .stride = projection.stride,
                                     .inputs = projection.width,
                                     .resident = cuda::kNone,
                                     .in_image = false,
                                     .narrow = false};
    task.sums = unit.products;
    task.stride = projection.stride;
    task.width = projection.width;
    task.outputs = std::max(unit.active[0], unit.active[1]);
    task.tokens = projection.tokens;
    return task;
}

std::vector<EncodePlan::Launches::Wave> KltPlanBuilder::put_waves(std::vector<std::byte>& image) {
    std::vector<EncodePlan::Launches::Wave> out;
    for (const Wave& w : waves_) {
        out.push_back({.projections = append<cuda::UnitTask>(image, w.projections),
                       .products = append<cuda::UnitTask>(image, w.products),
                       .units = append<cuda::KltUnitTask>(image, w.units),
                       .count = u32(w.units.size()),
                       .projection_tiles = u32(w.projection_tiles),
                       .product_tiles = u32(w.product_tiles),
                       .tokens = u32(w.tokens)});
    }
    return out;
}

Result<EncodePlan> KltPlanBuilder::finish() {
    std::uint64_t most = std::max<std::uint64_t>(std::uint64_t{packs_.size()} * most_runs_, heads_);
    for (const Wave& w : waves_) most = std::max({most, w.projection_tiles, w.product_tiles, w.tokens});
    if (most > kMostTiles) return Status(ErrorCode::kLimitExceeded, "a batch beyond 2^31 tiles or tokens");

    EncodePlan::Launches& l = plan_.launches_;
    l.run_bytes = layers_ * sizeof(std::uint32_t);
    plan_.report_bytes_ = l.run_bytes + runs_.size() * sizeof(std::uint32_t);
    for (std::size_t i = 0; i < chunks_.size(); ++i) {
        chunks_[i].exact = plan_.report_bytes_;
        plan_.chunks_[i].exact_tokens = plan_.report_bytes_;
        plan_.report_bytes_ += (1 + std::size_t{chunks_[i].tokens}) * sizeof(std::uint32_t);
    }
    std::vector<std::byte>& image = plan_.image_;
    l.tables = append_coder_tables(image);
    l.rotations = append<cuda::RotationTask>(image, rotations_);
    l.rotation_count = u32(rotations_.size());
    l.klt_chunks = append<cuda::KltChunkTask>(image, chunks_);
    l.klt_planes = append<cuda::KltSourceTask>(image, planes_);
    l.klt_plane_count = u32(planes_.size());
    l.heads = u32(heads_);
    l.waves = put_waves(image);
    l.runs = append<cuda::KltWriteTask>(image, runs_);
    l.blocks = append<cuda::EncodeBlockTask>(image, slots_);
    l.block_count = u32(slots_.size());
    l.packs = append<cuda::PackTask>(image, packs_);
    l.chunks = u32(packs_.size());
    l.most_blocks = u32(most_runs_);
    plan_.workspace_bytes_ = workspace_.bytes();
    return std::move(plan_);
}

}  // namespace kvcast::device
