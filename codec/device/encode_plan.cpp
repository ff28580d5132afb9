#include "codec/device/encode_plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <memory>

#include "codec/chunk_plan.h"
#include "codec/delta/quantised_head.h"
#include "codec/device/coder_tables.h"
#include "codec/device/image.h"
#include "codec/device/klt_encode_plan.h"

namespace kvcast::device {
namespace {

namespace cuda = kernels::cuda;

// What memory is read and written by.
constexpr std::size_t kTileSector = 32;

// check_input, which looks at how many planes are given and not at what is in them.
Status check_without_planes(ChunkInput input, std::size_t planes, const EncodeOptions& options) {
    const std::vector<PlaneRows> none(planes);
    input.planes = none;
    return check_input(input, options);
}

Status check_chunk(const ChunkToEncode& c, const EncodeOptions& options) {
    if (Status s = check_without_planes(c.input, c.planes.size(), options); !s.ok()) return s;
    for (const DevicePlane& p : c.planes) {
        if (Status s = check_plane(p, c.input.layout->dtype); !s.ok()) return s;
    }
    if (!is_aligned(c.payload, 2)) return {ErrorCode::kBadArgument, "a payload at an odd address"};
    return {};
}

std::uint64_t slots_bytes(const ChunkHeader& h) {
    std::uint64_t bytes = 0;
    for (std::size_t b = 0; b < h.blocks_per_layer(); ++b) bytes += max_block_bytes(h, b);
    return bytes * h.layout.layers;
}

// Whether a plane's rows are pieces of 16 bytes, of which those of the first half are turned with those of
// the second, or none at all.
bool is_banded(const cuda::EncodePlaneTask& p, const cuda::RotationTask* r) {
    constexpr std::uint64_t piece = cuda::kPieceChannels * sizeof(std::uint16_t);
    const std::uint64_t addresses = reinterpret_cast<std::uintptr_t>(p.in.rows) | p.in.row_bytes |
                                    p.in.head_bytes | (p.in.pages == nullptr ? 0 : p.in.page_bytes);
    const bool in_halves = r == nullptr || (r->pair_step == 1 && r->first_channel == 0 &&
                                            r->pairs == p.channels / 2 && r->partner == r->pairs);
    return cuda::is_short(p) && p.body_tokens != 0 && p.channels % (2 * cuda::kPieceChannels) == 0 &&
           addresses % piece == 0 && in_halves;
}

}  // namespace

class EncodePlan::Builder {
  public:
    explicit Builder(const EncodeOptions& options) : options_(options) {}

    void add(const ChunkToEncode& c) {
        Chunk& chunk = plan_.chunks_.emplace_back();
        chunk.header = plan_header(c.input, options_);
        chunk.first_plane = planes_.size();
        chunk.first_block = blocks_.size();
        chunk.capacity = c.payload_capacity;
        const ChunkHeader& h = chunk.header;
        rotation_ = h.unrotated ? add_rotation(h) : cuda::kNone;
        for (std::size_t layer = 0; layer < h.layout.layers; ++layer) {
            add_blocks(h);
            for (std::size_t p = 0; p < h.layout.planes.size(); ++p) add_plane(c, h, layer, p);
        }
        packs_.push_back({.payload = static_cast<std::uint8_t*>(c.payload),
                          .capacity = c.payload_capacity,
                          .first_block = u32(chunk.first_block),
                          .end_block = u32(blocks_.size())});
        most_blocks_ = std::max(most_blocks_, blocks_.size() - chunk.first_block);
    }

    Result<EncodePlan> finish() {
        const std::uint64_t packed = std::uint64_t{packs_.size()} * most_blocks_;
        const std::uint64_t vectors = heads_ * cuda::kMostVectors;
        if (std::max({tiles_, bands_, vectors, duo_runs_ + rows_, packed, std::uint64_t{blocks_.size()}}) >
            kMostTiles)
            return Status(ErrorCode::kLimitExceeded, "a batch beyond 2^31 tiles, channels or blocks");
        std::vector<std::byte>& image = plan_.image_;
        Launches& l = plan_.launches_;
        l.tables = append_coder_tables(image);
        l.rotations = append<cuda::RotationTask>(image, rotations_);
        l.rotation_count = u32(rotations_.size());
        l.planes = append<cuda::EncodePlaneTask>(image, planes_);
        l.plane_count = u32(planes_.size());
        l.tiles = u32(tiles_);
        l.bands = u32(bands_);
        l.heads = u32(heads_);
        l.duo_runs = u32(duo_runs_);
        l.rows = u32(rows_);
        l.blocks = append<cuda::EncodeBlockTask>(image, blocks_);
        l.block_count = u32(blocks_.size());
        l.packs = append<cuda::PackTask>(image, packs_);
        l.chunks = u32(packs_.size());
        l.most_blocks = u32(most_blocks_);
        l.block_bytes = planes_.size() * sizeof(cuda::PlaneChoice);
        plan_.report_bytes_ = l.block_bytes + blocks_.size() * sizeof(std::uint32_t);
        plan_.workspace_bytes_ = workspace_.bytes();
        return std::move(plan_);
    }

  private:
    std::uint32_t add_rotation(const ChunkHeader& h) {
        rotations_.push_back(rotation_task(h.layout.rope, h.position(), h.tokens, plan_.image_, workspace_));
        return u32(rotations_.size() - 1);
    }

    void add_blocks(const ChunkHeader& h) {
        for (std::size_t b = 0; b < h.blocks_per_layer(); ++b) {
            const std::size_t bytes = max_block_bytes(h, b);
            blocks_.push_back(
                {.slot = workspace_.take(bytes),
                 .slot_bytes = u32(bytes),
                 .plane = u32(planes_.size()),
                 .first_head = u32(b * h.block_heads),
                 .end_head = u32(std::min((b + 1) * h.block_heads, h.layout.heads_per_layer()))});
        }
    }

    void add_plane(const ChunkToEncode& c, const ChunkHeader& h, std::size_t layer, std::size_t plane) {
        const PlaneShape& shape = h.layout.planes[plane];
        const std::size_t index = layer * h.layout.planes.size() + plane;
        const std::size_t exact = h.exact_rows, body = h.tokens - exact;
        const bool lossless = h.profile == Profile::kLossless;
        const bool anchored = h.delta.predictor == Predictor::kAnchor;
        const double multiplier = options_.layer_steps.empty() ? 1 : options_.layer_steps[index];
        cuda::EncodePlaneTask task = {};
        task.in = rows_at(c.planes[index], shape.head_dim, h.layout.dtype);
        task.relative_step = lossless ? 0 : kDeltaSteps[h.level - 1] * multiplier;
        task.moments = workspace_.take(shape.width() * sizeof(kernels::Moments));
        task.largest = workspace_.take(sizeof(std::uint32_t));
        task.heads = u32(shape.heads);
        task.channels = u32(shape.head_dim);
        task.body_tokens = u32(body);
        task.exact_rows = u32(exact);
        task.anchor_group = anchored ? u32(h.delta.anchor_group) : 0u;
        task.anchor_shift = h.delta.anchor_shift;
        task.least_guard_bits = least_guard_bits(h.delta);
        task.rotation = plane == 0 ? rotation_ : cuda::kNone;
        task.first_tile = u32(tiles_);
        task.first_band = u32(bands_);
        task.first_head = u32(heads_);
        task.first_duo = u32(duo_runs_);
        task.first_row = u32(rows_);
        task.source = h.layout.dtype;
        task.lossless = lossless;
        add_tile(task);
        add_strips(task);
        heads_ += shape.heads;
        duo_runs_ += cuda::duo_runs_of(task);
        rows_ += shape.heads * exact;
        planes_.push_back(task);
    }

    void add_tile(cuda::EncodePlaneTask& task) {
        const std::size_t bytes = kernels::dtype_bytes(task.source);
        task.tile_stride = u32(round_up(cuda::tile_tokens(task), kTileSector / bytes));
        task.tile = workspace_.take(std::uint64_t{task.heads} * task.channels * task.tile_stride * bytes);
        const auto* rotation = task.rotation == cuda::kNone ? nullptr : &rotations_[task.rotation];
        task.banded = is_banded(task, rotation);
        if (task.banded) {
            bands_ += std::uint64_t{cuda::bands_of(task)} * task.heads;
        } else {
            const std::uint32_t slots =
                cuda::slots_of(task.channels, rotation == nullptr ? 0 : rotation->pairs);
            tiles_ += std::uint64_t{cuda::div_up(slots, cuda::kStoreSlots)} *
                      cuda::div_up(cuda::tile_tokens(task), cuda::kLoadTokens);
        }
    }

    // Room for the strips of a plane, whether or not it is quantised after all.
    void add_strips(cuda::EncodePlaneTask& task) {
        const unsigned planes = std::max(kernels::class_coding(kernels::kClasses - 1).shift,
                                         kernels::mantissa_bits(task.source) + 1);
        task.plane_lines = cuda::lines_of_planes(planes);
        for (const bool quantised : {false, true}) {
            const cuda::StripList list = cuda::strip_list(task, quantised);
            task.head_batches = std::max(task.head_batches, list.batches());
        }
        const std::uint64_t batches = std::uint64_t{task.heads} * task.head_batches;
        task.words = workspace_.take(batches * sizeof(std::uint32_t));
        task.records =
            workspace_.take(batches * cuda::record_words(task.plane_lines) * sizeof(std::uint32_t));
        task.side = workspace_.take(std::uint64_t{task.heads} * cuda::kMostVectors * task.channels *
                                    sizeof(std::int16_t));
    }

    const EncodeOptions& options_;
    EncodePlan plan_;
    std::vector<cuda::RotationTask> rotations_;
    std::vector<cuda::EncodePlaneTask> planes_;
    std::vector<cuda::EncodeBlockTask> blocks_;
    std::vector<cuda::PackTask> packs_;
    Workspace workspace_;
    std::uint64_t tiles_ = 0;
    std::uint64_t bands_ = 0;
    std::uint64_t heads_ = 0;
    std::uint64_t duo_runs_ = 0;
    std::uint64_t rows_ = 0;
    std::size_t most_blocks_ = 0;
    std::uint32_t rotation_ = cuda::kNone;  // of the chunk that is being added
};

Result<EncodePlan> EncodePlan::make(std::span<const ChunkToEncode> chunks, const EncodeOptions& options,
                                    const KltOnDevice& klt) {
    const bool is_klt = options.profile == Profile::kKlt;
    Builder builder(options);
    KltPlanBuilder klt_builder(options, klt);
    for (std::size_t i = 0; i < chunks.size(); ++i) {
        Status s = check_chunk(chunks[i], options);
        if (s.ok() && is_klt) s = klt_builder.add(chunks[i]);
        if (!s.ok()) return Status(s.code(), fmt::format("chunk {} of the batch: {}", i, s.message()));
        if (!is_klt) builder.add(chunks[i]);
    }
    return is_klt ? klt_builder.finish() : builder.finish();
}

Result<std::uint64_t> EncodePlan::greatest_payload(const ChunkInput& input, const EncodeOptions& options) {
    const std::size_t planes =
        input.layout == nullptr ? 0 : input.layout->layers * input.layout->planes.size();
    if (Status s = check_without_planes(input, planes, options); !s.ok()) return s;
    return slots_bytes(plan_header(input, options));
}

std::uint64_t EncodePlan::payload_bytes(std::size_t chunk, std::span<const std::byte> report) const {
    const Chunk& c = chunks_[chunk];
    std::uint64_t total = 0;
    for (std::size_t b = 0; b < c.header.block_bytes.size(); ++b) {
        std::uint32_t bytes = 0;
        std::memcpy(&bytes, report.data() + launches_.block_bytes + (c.first_block + b) * sizeof(bytes),
                    sizeof(bytes));
        total += bytes;
    }
    return total;
}

// What the device has decided about a chunk.
void EncodePlan::read_choices(const Chunk& c, std::span<const std::byte> report, ChunkHeader& h) const {
    for (std::size_t i = 0; i < h.planes.size(); ++i) {
        cuda::PlaneChoice choice;
        std::memcpy(&choice, report.data() + (c.first_plane + i) * sizeof(choice), sizeof(choice));
        if (choice.quantised != 0) h.planes[i] = {PlaneMode::kQuantised, choice.guard_bits, choice.scale};
    }
    std::memcpy(h.block_bytes.data(),
                report.data() + launches_.block_bytes + c.first_block * sizeof(std::uint32_t),
                h.block_bytes.size() * sizeof(std::uint32_t));
    if (h.profile != Profile::kKlt) return;
    std::uint32_t count = 0;
    std::memcpy(&count, report.data() + c.exact_tokens, sizeof(count));
    h.klt.exact_tokens.resize(std::min<std::size_t>(count, h.tokens));
    if (h.klt.exact_tokens.empty()) return;  // data() may be null, which memcpy does not take
    std::memcpy(h.klt.exact_tokens.data(), report.data() + c.exact_tokens + sizeof(count),
                h.klt.exact_tokens.size() * sizeof(count));
}

Result<std::vector<std::uint8_t>> EncodePlan::object(std::size_t chunk, std::span<const std::byte> report,
                                                     std::span<const std::uint8_t> payload) const {
    const Chunk& c = chunks_[chunk];
    const std::uint64_t bytes = payload_bytes(chunk, report);
    if (bytes > c.capacity || bytes > payload.size()) {
        return Status(ErrorCode::kBufferTooSmall, fmt::format("blocks of {} bytes, room for {}", bytes,
                                                              std::min(c.capacity, payload.size())));
    }
    ChunkHeader h = c.header;
    read_choices(c, report, h);
    std::size_t at = 0;
    for (std::size_t layer = 0; layer < h.layout.layers; ++layer) {
        const std::size_t length = h.layer_payload_bytes(layer);
        h.layer_crc[layer] = crc32(payload.subspan(at, length));
        at += length;
    }
    auto object = write_header(h);
    if (object.ok()) object.value().insert(object.value().end(), payload.begin(), payload.begin() + at);
    return object;
}

}  // namespace kvcast::device
