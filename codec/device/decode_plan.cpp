#include "codec/device/decode_plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "codec/entropy/model.h"

namespace kvcast::device {
namespace {

namespace cuda = kernels::cuda;

constexpr std::size_t kMostTiles = std::numeric_limits<std::int32_t>::max();

std::size_t round_up(std::size_t n, std::size_t unit) {
    return (n + unit - 1) / unit * unit;
}

// Appends an array to the image, aligned for anything that is in it.
template <typename T>
DecodePlan::Array append(std::vector<std::byte>& image, std::span<const T> items) {
    const std::size_t offset = round_up(image.size(), alignof(T) > 16 ? alignof(T) : 16);
    image.resize(offset + items.size_bytes());
    if (!items.empty()) std::memcpy(image.data() + offset, items.data(), items.size_bytes());
    return {offset, static_cast<std::uint32_t>(items.size())};
}

bool is_multiple(std::uintptr_t value, std::size_t unit) {
    return value % unit == 0;
}

Status check_target(const PlaneTarget& t, Dtype dtype) {
    const std::size_t unit = kernels::dtype_bytes(dtype);
    const bool aligned = is_multiple(reinterpret_cast<std::uintptr_t>(t.rows), unit) &&
                         is_multiple(t.row_bytes, unit) && is_multiple(t.head_bytes, unit) &&
                         is_multiple(t.page_bytes, unit);
    if (!aligned)
        return {ErrorCode::kBadArgument,
                fmt::format("rows or strides that are no multiples of {} bytes", unit)};
    if (t.rows == nullptr) return {ErrorCode::kBadArgument, "a plane without rows"};
    if (t.pages != nullptr && t.page_tokens == 0) return {ErrorCode::kBadArgument, "pages of no tokens"};
    if (t.page_tokens > std::numeric_limits<std::uint32_t>::max() || t.slot > (std::size_t{1} << 31))
        return {ErrorCode::kLimitExceeded, "a page or a slot beyond 2^31 tokens"};
    return {};
}

Status check_source(const ChunkSource& c) {
    const ChunkHeader& h = *c.header;
    if (h.profile == Profile::kKlt)
        return {ErrorCode::kUnsupportedProfile, "a klt chunk, which this batch does not decode"};
    if (c.planes.size() != h.layout.layers * h.layout.planes.size()) {
        return {ErrorCode::kBadArgument, fmt::format("{} planes given, the chunk has {}", c.planes.size(),
                                                     h.layout.layers * h.layout.planes.size())};
    }
    if (!is_multiple(reinterpret_cast<std::uintptr_t>(c.payload), 2))
        return {ErrorCode::kBadArgument, "a payload at an odd address"};
    if (c.payload_bytes < h.payload_bytes()) {
        return {ErrorCode::kTruncated,
                fmt::format("a payload of {} bytes, {} are there", h.payload_bytes(), c.payload_bytes)};
    }
    if (c.base_position.value_or(h.base_position) != h.base_position &&
        h.layout.rope.pairing == RopePairing::kNone)
        return {ErrorCode::kBadArgument, "the chunk has no RoPE by which to move it to another position"};
    for (const PlaneTarget& t : c.planes) {
        if (Status s = check_target(t, c.dtype.value_or(h.layout.dtype)); !s.ok()) return s;
    }
    return {};
}

cuda::RowsOut rows_out(const PlaneTarget& t, std::size_t head_dim, Dtype dtype) {
    return {.rows = static_cast<std::uint8_t*>(t.rows),
            .pages = t.pages,
            .row_bytes = t.row_bytes,
            .head_bytes = t.head_bytes != 0 ? t.head_bytes : head_dim * kernels::dtype_bytes(dtype),
            .page_bytes = t.page_bytes,
            .page_tokens = static_cast<std::uint32_t>(t.page_tokens),
            .slot = static_cast<std::uint32_t>(t.slot)};
}

}  // namespace

class DecodePlan::Builder {
  public:
    void add(const ChunkSource& c, std::uint32_t index) {
        const ChunkHeader& h = *c.header;
        const std::uint64_t base = c.base_position.value_or(h.base_position);
        const bool moved = base != h.base_position;
        absolute_ = h.unrotated ? rotation(h.layout.rope, base + h.first_token, h.tokens) : cuda::kNone;
        shift_ = moved ? rotation(h.layout.rope, base - h.base_position, 1) : cuda::kNone;
        std::uint64_t at = 0;
        for (std::size_t layer = 0; layer < h.layout.layers; ++layer) {
            add_blocks(c, index, layer, at);
            for (std::size_t p = 0; p < h.layout.planes.size(); ++p) add_plane(c, layer, p);
        }
    }

    Result<DecodePlan> finish() {
        if (tiles_ > kMostTiles || blocks_.size() > kMostTiles)
            return Status(ErrorCode::kLimitExceeded, "a batch beyond 2^31 tiles");
        DecodePlan plan;
        std::vector<kernels::AliasTable> tables;
        for (std::size_t t = 0; t < entropy::kTables; ++t) tables.push_back(entropy::alias_table(t));
        std::vector<std::byte>& image = plan.image_;
        Launches& l = plan.launches_;
        l.tables = append<kernels::AliasTable>(image, tables);
        const std::size_t frequencies = append<std::uint64_t>(image, frequencies_).offset;
        for (cuda::RotationTask& r : rotations_) r.frequencies += frequencies;
        l.rotations = append<cuda::RotationTask>(image, rotations_);
        l.planes = append<cuda::PlaneTask>(image, planes_);
        l.blocks = append<cuda::BlockTask>(image, blocks_);
        l.stores = append<cuda::StoreTask>(image, stores_);
        l.tiles = static_cast<std::uint32_t>(tiles_);
        l.most_channels = most_channels_;
        plan.workspace_bytes_ = workspace_;
        plan.blocks_ = std::move(places_);
        return plan;
    }

  private:
    // Bytes of the workspace.
    std::uint64_t take(std::uint64_t bytes) {
        const std::uint64_t offset = workspace_;
        workspace_ += round_up(bytes, kAlignment);
        return offset;
    }

    std::uint32_t rotation(const Rope& rope, std::uint64_t first, std::size_t columns) {
        if (rope.pairing == RopePairing::kNone) return cuda::kNone;
        const bool half = rope.pairing == RopePairing::kHalf;
        const auto pairs = static_cast<std::uint32_t>(rope.dim / 2);
        const std::uint64_t frequencies =
            frequencies_.size() * sizeof(std::uint64_t);  // from the first one on
        frequencies_.insert(frequencies_.end(), rope.frequencies.begin(), rope.frequencies.end());
        rotations_.push_back({.table = take(std::uint64_t{pairs} * columns * sizeof(kernels::SinCos)),
                              .frequencies = frequencies,
                              .first = first,
                              .pairs = pairs,
                              .columns = static_cast<std::uint32_t>(columns),
                              .first_channel = static_cast<std::uint32_t>(rope.offset),
                              .pair_step = half ? 1u : 2u,
                              .partner = half ? pairs : 1u});
        return static_cast<std::uint32_t>(rotations_.size() - 1);
    }

    void add_blocks(const ChunkSource& c, std::uint32_t index, std::size_t layer, std::uint64_t& at) {
        const ChunkHeader& h = *c.header;
        const std::size_t per_layer = h.blocks_per_layer();
        for (std::size_t b = 0; b < per_layer; ++b) {
            const std::uint32_t bytes = h.block_bytes[layer * per_layer + b];
            const std::size_t end = std::min((b + 1) * h.block_heads, h.layout.heads_per_layer());
            blocks_.push_back({.begin = static_cast<const std::uint8_t*>(c.payload) + at,
                               .bytes = bytes,
                               .plane = static_cast<std::uint32_t>(planes_.size()),
                               .first_head = static_cast<std::uint32_t>(b * h.block_heads),
                               .end_head = static_cast<std::uint32_t>(end)});
            places_.push_back({index, static_cast<std::uint32_t>(layer), static_cast<std::uint32_t>(b)});
            at += bytes;
        }
    }

    void add_plane(const ChunkSource& c, std::size_t layer, std::size_t plane) {
        const ChunkHeader& h = *c.header;
        const PlaneShape& shape = h.layout.planes[plane];
        const PlaneParams& params = h.planes[layer * h.layout.planes.size() + plane];
        const bool quantised = params.mode == PlaneMode::kQuantised;
        const std::size_t exact_rows = h.delta.exact_rows, body = h.tokens - exact_rows;
        const std::uint64_t exact_bytes = cuda::element_bytes(true, h.layout.dtype);
        const bool anchored = h.delta.predictor == Predictor::kAnchor;
        cuda::PlaneTask task = {
            .body = take(shape.width() * body * cuda::element_bytes(!quantised, h.layout.dtype)),
            .rows = take(shape.width() * exact_rows * exact_bytes),
            .heads = static_cast<std::uint32_t>(shape.heads),
            .channels = static_cast<std::uint32_t>(shape.head_dim),
            .body_tokens = static_cast<std::uint32_t>(body),
            .exact_rows = static_cast<std::uint32_t>(exact_rows),
            .anchor_group = anchored ? static_cast<std::uint32_t>(h.delta.anchor_group) : 0u,
            .anchor_shift = static_cast<std::uint8_t>(h.delta.anchor_shift),
            .guard_bits = static_cast<std::uint8_t>(params.guard_bits),
            .quantised = quantised,
            .source = h.layout.dtype};
        planes_.push_back(task);
        most_channels_ = std::max(most_channels_, task.channels);
        const PlaneTarget& target = c.planes[layer * h.layout.planes.size() + plane];
        const std::uint32_t shift = plane == 0 ? shift_ : cuda::kNone;
        const std::uint32_t turned = plane == 0 && h.unrotated ? absolute_ : shift;
        cuda::StoreTask store = {.source = task.rows,
                                 .head_stride = std::uint64_t{task.channels} * task.exact_rows,
                                 .channel_stride = 1,
                                 .token_stride = task.channels,
                                 .heads = task.heads,
                                 .channels = task.channels,
                                 .tokens = task.exact_rows,
                                 .first_token = 0,
                                 .token_list = 0,
                                 .first_tile = 0,
                                 .rotation = shift,
                                 .scale = params.scale,
                                 .list = false,
                                 .exact = true,
                                 .from = h.layout.dtype,
                                 .to = c.dtype.value_or(h.layout.dtype),
                                 .out = rows_out(target, shape.head_dim, c.dtype.value_or(h.layout.dtype))};
        add_store(store);
        store.source = task.body;
        store.head_stride = std::uint64_t{task.channels} * task.body_tokens;
        store.channel_stride = task.body_tokens;
        store.token_stride = 1;
        store.tokens = task.body_tokens;
        store.first_token = task.exact_rows;
        store.rotation = quantised ? turned : shift;
        store.exact = !quantised;
        add_store(store);
    }

    void add_store(cuda::StoreTask task) {
        if (task.tokens == 0) return;
        task.first_tile = static_cast<std::uint32_t>(tiles_);
        tiles_ += cuda::tiles_of(task, task.rotation == cuda::kNone ? 0 : rotations_[task.rotation].pairs);
        stores_.push_back(task);
    }

    std::vector<cuda::PlaneTask> planes_;
    std::vector<cuda::BlockTask> blocks_;
    std::vector<cuda::RotationTask> rotations_;
    std::vector<std::uint64_t> frequencies_;
    std::vector<cuda::StoreTask> stores_;
    std::vector<Block> places_;
    std::uint64_t workspace_ = 0;
    std::uint64_t tiles_ = 0;
    std::uint32_t most_channels_ = 1;
    std::uint32_t absolute_ = cuda::kNone;  // of the chunk that is being added
    std::uint32_t shift_ = cuda::kNone;
};

Result<DecodePlan> DecodePlan::make(std::span<const ChunkSource> chunks) {
    Builder builder;
    for (std::size_t i = 0; i < chunks.size(); ++i) {
        if (Status s = check_source(chunks[i]); !s.ok())
            return Status(s.code(), fmt::format("chunk {} of the batch: {}", i, s.message()));
        builder.add(chunks[i], static_cast<std::uint32_t>(i));
    }
    return builder.finish();
}

Status DecodePlan::block_status(std::size_t index, std::uint32_t word) const {
    if (word == 0) return {};
    const Block& b = blocks_[index];
    const char* what = (word & cuda::kEndsEarly) != 0   ? "its data ends before its values do"
                       : (word & cuda::kLeftOver) != 0  ? "bytes are left over"
                       : (word & cuda::kNotClosed) != 0 ? "the coder does not end in its first state"
                                                        : "its side information is out of range";
    return {ErrorCode::kCorruptBlock, fmt::format("block {} of layer {} of chunk {} of the batch: {}",
                                                  b.block, b.layer, b.chunk, what)};
}

Status DecodePlan::batch_status(std::span<const std::uint32_t> words) const {
    for (std::size_t i = 0; i < std::min(words.size(), blocks_.size()); ++i) {
        if (words[i] != 0) return block_status(i, words[i]);
    }
    return {};
}

}  // namespace kvcast::device
