#include "codec/decoder.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <mutex>
#include <optional>
#include <utility>

#include "codec/aligned_vector.h"
#include "codec/delta/quantised_head.h"
#include "codec/klt/klt_decoder.h"
#include "codec/lossless/exact_head.h"
#include "codec/once.h"
#include "codec/rope/rope_table.h"
#include "codec/staged_rows.h"

namespace kvcast {

// Blocks that one worker decodes side by side.
constexpr std::size_t kAbreast = StagedRows::kMost;

struct DecodeWorkspace::Buffers {
    KltDecoder klt;               // first: what it holds is aligned to 64 bytes
    std::uint64_t klt_owner = 0;  // number of the decoder whose layers `klt` is going through
    // Of each block: one head [channel][body token], or one row.
    std::array<AlignedVector<std::int16_t>, kAbreast> states;
    std::array<AlignedVector<std::uint8_t>, kAbreast> elements;
    std::array<QuantisedScratch, kAbreast> quantised;
    std::array<ExactModels, kAbreast> models;
    StagedRows staged;
};

DecodeWorkspace::DecodeWorkspace() : buffers_(std::make_unique<Buffers>()) {}
DecodeWorkspace::~DecodeWorkspace() = default;
const KltBytes& DecodeWorkspace::klt_bytes() const {
    return buffers_->klt.bytes();
}
DecodeWorkspace::DecodeWorkspace(DecodeWorkspace&&) noexcept = default;
DecodeWorkspace& DecodeWorkspace::operator=(DecodeWorkspace&&) noexcept = default;

struct ChunkDecoder::State {
    std::uint64_t number = 0;  // from 1, never used twice: addresses may be
    std::span<const std::uint8_t> bytes;
    const kernels::Ops* ops = nullptr;
    std::shared_ptr<const Calibration> calibration;
    ChunkHeader header;
    Dtype dtype = Dtype::kBf16;
    RopeTable absolute;                      // turns un-rotated states to their positions
    RopeTable shift;                         // turns what is stored rotated from the old base to the new one
    std::vector<std::uint64_t> block_begin;  // [layer][block], and the end; offsets in `bytes`
};

namespace {

template <typename T>
void grow(AlignedVector<T>& v, std::size_t size) {
    if (v.size() < size) v.resize(size);
}

// One head of one block on its way to the caller's rows.
struct HeadJob {
    const ChunkHeader& header;
    const kernels::Ops& ops;
    Dtype dtype;
    std::size_t plane;
    std::size_t dim;
    PlaneParams params;
    kernels::Rotation state_rotation;
    kernels::Rotation exact_rotation;
    std::uint8_t* out;  // row 0, channel 0 of this head
    std::size_t row_bytes;
    bool staged;       // rows do not go straight to where they belong
    bool fits = true;  // side information was in range

    // Whether states need no turn, and elements are as wide as they are.
    bool states_are_elements() const {
        return header.delta.predictor == Predictor::kMean && state_rotation.pairs == 0 &&
               dtype != Dtype::kF32;
    }
    std::size_t exact_rows() const { return header.exact_rows; }
    std::size_t body_tokens() const { return header.tokens - exact_rows(); }
    StagedRows::Rows body(StagedRows& buffers) const {
        const StagedRows::Rows there = {out + exact_rows() * row_bytes, row_bytes};
        return staged ? buffers.place(there, dim * kernels::dtype_bytes(dtype), body_tokens()) : there;
    }
};

// A block that is being decoded, at its next head.
struct OpenBlock {
    std::optional<entropy::BlockReader> reader;  // first: it is aligned to 64 bytes
    std::size_t layer = 0;
    std::size_t block = 0;
    std::span<const PlaneBuffer> planes;  // of its layer
    std::size_t head = 0;
    std::size_t stop = 0;
    bool fits = true;  // side information was in range so far
};

void decode_exact_rows(std::span<entropy::BlockReader* const> readers, std::span<HeadJob> jobs,
                       DecodeWorkspace::Buffers& w) {
    const Dtype source = jobs[0].header.layout.dtype;
    std::array<ExactBody, kAbreast> rows;
    for (std::size_t i = 0; i < jobs.size(); ++i) {
        grow(w.elements[i], jobs[i].dim * kernels::dtype_bytes(source));
        rows[i].tile = w.elements[i].data();
    }
    for (std::size_t t = 0; t < jobs[0].exact_rows(); ++t) {
        read_exact_rows(readers, source, {rows.data(), jobs.size()}, jobs[0].dim);
        for (std::size_t i = 0; i < jobs.size(); ++i) {
            const HeadJob& job = jobs[i];
            job.ops.store_exact({rows[i].tile, 1, 1, job.dim, job.exact_rotation, source, job.dtype,
                                 job.out + t * job.row_bytes, job.row_bytes});
        }
    }
    for (std::size_t i = 0; i < jobs.size(); ++i) jobs[i].fits = jobs[i].fits && rows[i].fits;
}

void decode_quantised_bodies(std::span<entropy::BlockReader* const> readers, std::span<HeadJob> jobs,
                             DecodeWorkspace::Buffers& w) {
    const HeadJob& first = jobs[0];
    const std::size_t tokens = first.body_tokens(), stride = line_stride(tokens);
    std::array<QuantisedHead, kAbreast> heads;
    for (std::size_t i = 0; i < jobs.size(); ++i) {
        grow(w.states[i], first.dim * stride);
        heads[i].plane = jobs[i].params;
        heads[i].tile = w.states[i].data();
        if (jobs[i].states_are_elements()) heads[i].elements = jobs[i].dtype;
    }
    read_quantised_heads(readers, first.ops, first.header.delta, {heads.data(), jobs.size()},
                         {first.dim, tokens, stride}, w.quantised, w.staged.outgoing());
    w.staged.send(first.ops);
    for (std::size_t i = 0; i < jobs.size(); ++i) {
        HeadJob& job = jobs[i];
        job.fits = job.fits && heads[i].fits;
        const auto [rows, row_bytes] = job.body(w.staged);
        if (heads[i].elements) {
            job.ops.store_exact(
                {w.states[i].data(), stride, tokens, job.dim, {}, job.dtype, job.dtype, rows, row_bytes});
        } else {
            job.ops.store_head({w.states[i].data(), stride, tokens, job.dim, job.state_rotation,
                                job.params.scale, job.dtype, rows, row_bytes});
        }
    }
}

void decode_exact_bodies(std::span<entropy::BlockReader* const> readers, std::span<HeadJob> jobs,
                         DecodeWorkspace::Buffers& w) {
    const HeadJob& first = jobs[0];
    const std::size_t tokens = first.body_tokens(), stride = line_stride(tokens);
    const Dtype source = first.header.layout.dtype;
    std::array<ExactBody, kAbreast> bodies;
    for (std::size_t i = 0; i < jobs.size(); ++i) {
        grow(w.elements[i], first.dim * stride * kernels::dtype_bytes(source));
        bodies[i].tile = w.elements[i].data();
    }
    read_exact_bodies(readers, source, {bodies.data(), jobs.size()}, stride, first.dim, tokens, w.models,
                      w.staged.outgoing());
    w.staged.send(first.ops);
    for (std::size_t i = 0; i < jobs.size(); ++i) {
        HeadJob& job = jobs[i];
        job.fits = job.fits && bodies[i].fits;
        const auto [rows, row_bytes] = job.body(w.staged);
        job.ops.store_exact({bodies[i].tile, stride, tokens, job.dim, job.exact_rotation, source, job.dtype,
                             rows, row_bytes});
    }
}

// The next head of each block, of one mode and size.
void decode_bodies(std::span<entropy::BlockReader* const> readers, std::span<HeadJob> jobs,
                   DecodeWorkspace::Buffers& w) {
    if (jobs[0].body_tokens() == 0) return;
    jobs[0].params.mode == PlaneMode::kQuantised ? decode_quantised_bodies(readers, jobs, w)
                                                 : decode_exact_bodies(readers, jobs, w);
}

Status in_block(const ChunkHeader& h, std::size_t layer, std::size_t block, const Status& s) {
    return {s.code(), fmt::format("block {} of layer {} (tokens {} to {}): {}", block, layer, h.first_token,
                                  h.first_token + h.tokens - 1, s.message())};
}

std::vector<std::uint64_t> block_offsets(const ChunkHeader& h) {
    std::vector<std::uint64_t> begin = {h.header_bytes};
    for (const std::uint32_t bytes : h.block_bytes) begin.push_back(begin.back() + bytes);
    return begin;
}

}  // namespace

ChunkDecoder::ChunkDecoder(std::unique_ptr<State> state) : state_(std::move(state)) {}
ChunkDecoder::~ChunkDecoder() = default;
ChunkDecoder::ChunkDecoder(ChunkDecoder&&) noexcept = default;
ChunkDecoder& ChunkDecoder::operator=(ChunkDecoder&&) noexcept = default;

Result<ChunkDecoder> ChunkDecoder::open(std::span<const std::uint8_t> bytes, const DecodeOptions& options,
                                        const kernels::Ops& ops) {
    Result<ChunkHeader> header = read_header(bytes);
    if (!header.ok()) return header.status();
    auto state = std::make_unique<State>();
    static std::atomic<std::uint64_t> last_number = 0;
    state->number = ++last_number;
    state->bytes = bytes;
    state->ops = &ops;
    state->header = std::move(header.value());
    const ChunkHeader& h = state->header;
    if (h.profile == Profile::kKlt) {
        if (Status s = check_calibration(h, options.calibration.get()); !s.ok()) return s;
        state->calibration = options.calibration;
    }
    state->dtype = options.dtype.value_or(h.layout.dtype);
    state->block_begin = block_offsets(h);
    const std::uint64_t base = options.base_position.value_or(h.base_position);
    if (base != h.base_position && h.layout.rope.pairing == RopePairing::kNone) {
        return Status(ErrorCode::kBadArgument,
                      "the chunk has no RoPE by which to move it to another position");
    }
    if (h.unrotated) state->absolute = chunk_turns(*state->ops, h, base + h.first_token);
    if (base != h.base_position)
        state->shift = RopeTable::by_pair(*state->ops, h.layout.rope, base - h.base_position, 0, h.tokens);
    return ChunkDecoder(std::move(state));
}

const ChunkHeader& ChunkDecoder::header() const {
    return state_->header;
}
Dtype ChunkDecoder::dtype() const {
    return state_->dtype;
}
std::uint64_t ChunkDecoder::object_bytes() const {
    return state_->block_begin.back();
}

Status ChunkDecoder::verify_layer(std::size_t layer) const {
    const State& s = *state_;
    const std::size_t blocks = s.header.blocks_per_layer();
    if (layer >= s.header.layout.layers) return {ErrorCode::kBadArgument, fmt::format("no layer {}", layer)};
    const std::uint64_t begin = s.block_begin[layer * blocks];
    const std::uint64_t end = s.block_begin[(layer + 1) * blocks];
    if (end > s.bytes.size()) {
        return {ErrorCode::kTruncated,
                fmt::format("layer {} ends at byte {}, {} are there", layer, end, s.bytes.size())};
    }
    if (crc32(s.bytes.subspan(begin, end - begin)) != s.header.layer_crc[layer]) {
        return {ErrorCode::kBlockChecksum,
                fmt::format("the checksum of layer {} (tokens {} to {}) does not match its bytes", layer,
                            s.header.first_token, s.header.first_token + s.header.tokens - 1)};
    }
    return {};
}

Status ChunkDecoder::decode_block(std::size_t layer, std::size_t block, std::span<const PlaneBuffer> planes,
                                  DecodeWorkspace& workspace) const {
    const ChunkHeader& h = header();
    const std::size_t blocks = h.blocks_per_layer();
    if (layer >= h.layout.layers || block >= blocks || planes.size() != h.layout.planes.size()) {
        return {ErrorCode::kBadArgument,
                fmt::format("no block {} of layer {} with {} planes", block, layer, planes.size())};
    }
    if (h.profile == Profile::kKlt)
        return {ErrorCode::kBadArgument, "blocks of a klt chunk cannot be decoded alone"};
    const std::size_t at = layer * blocks + block;
    if (state_->block_begin[at + 1] > state_->bytes.size())
        return in_block(h, layer, block, {ErrorCode::kTruncated, "its bytes are missing"});
    StagedRows& rows = workspace.buffers().staged;
    rows.drop();
    Status decoded = decode_group(at, 1, planes, workspace).second;
    rows.send(*state_->ops);
    return decoded;
}

namespace {

// Heads of several blocks until all are done.
class BlockGroup {
  public:
    BlockGroup(std::span<OpenBlock> blocks, DecodeWorkspace::Buffers& w) : blocks_(blocks), w_(w) {}

    // `job` describes the next head of a block.
    template <typename MakeJob>
    void run(MakeJob&& job) {
        for (;;) {
            readers_.clear();
            jobs_.clear();
            owners_.clear();
            for (OpenBlock& b : blocks_) {
                if (b.head == b.stop) continue;
                jobs_.push_back(job(b));
                readers_.push_back(&*b.reader);
                owners_.push_back(&b);
                ++b.head;
            }
            if (jobs_.empty()) return;
            decode_heads();
        }
    }

  private:
    // All at once where they are alike, else each alone.
    void decode_heads() {
        const bool alike = std::all_of(jobs_.begin(), jobs_.end(), [&](const HeadJob& j) {
            return j.dim == jobs_[0].dim && j.params.mode == jobs_[0].params.mode;
        });
        const std::size_t step = alike ? jobs_.size() : 1;
        for (std::size_t i = 0; i < jobs_.size(); i += step) {
            decode_exact_rows(std::span(readers_).subspan(i, step), std::span(jobs_).subspan(i, step), w_);
            decode_bodies(std::span(readers_).subspan(i, step), std::span(jobs_).subspan(i, step), w_);
        }
        for (std::size_t i = 0; i < jobs_.size(); ++i) owners_[i]->fits = owners_[i]->fits && jobs_[i].fits;
    }

    std::span<OpenBlock> blocks_;
    DecodeWorkspace::Buffers& w_;
    std::vector<entropy::BlockReader*> readers_;
    std::vector<HeadJob> jobs_;
    std::vector<OpenBlock*> owners_;
};

}  // namespace

std::pair<std::size_t, Status> ChunkDecoder::decode_group(std::size_t first, std::size_t count,
                                                          std::span<const PlaneBuffer> planes,
                                                          DecodeWorkspace& workspace) const {
    const State& s = *state_;
    const ChunkHeader& h = s.header;
    const std::size_t per_layer = h.layout.planes.size(), blocks = h.blocks_per_layer();
    const std::size_t k_heads = h.layout.planes[0].heads;
    std::array<OpenBlock, kAbreast> open;
    for (std::size_t i = 0; i < count; ++i) {
        const std::size_t layer = (first + i) / blocks, block = (first + i) % blocks;
        const std::uint64_t begin = s.block_begin[first + i], end = s.block_begin[first + i + 1];
        open[i].layer = layer;
        open[i].block = block;
        open[i].planes = planes.subspan((layer - first / blocks) * per_layer, per_layer);
        open[i].reader.emplace(*s.ops, s.bytes.subspan(begin, end - begin));
        open[i].head = block * h.block_heads;
        open[i].stop = std::min((block + 1) * h.block_heads, h.layout.heads_per_layer());
    }
    const std::size_t values = h.layout.values_per_token() * h.tokens;
    const bool staged =
        s.ops->sends_past_caches && values * kernels::dtype_bytes(s.dtype) >= StagedRows::kFromBytes;
    const auto job = [&](const OpenBlock& b) -> HeadJob {
        const std::size_t plane = b.head < k_heads ? 0 : 1;
        const std::size_t dim = h.layout.planes[plane].head_dim;
        const std::size_t column = (b.head - plane * k_heads) * dim;
        const auto shift = plane == 0 ? s.shift.rotation() : kernels::Rotation{};
        const auto turned = plane == 0 && h.unrotated ? s.absolute.rotation(h.exact_rows) : shift;
        return {h,
                *s.ops,
                s.dtype,
                plane,
                dim,
                h.planes[b.layer * per_layer + plane],
                turned,
                shift,
                static_cast<std::uint8_t*>(b.planes[plane].rows) + column * kernels::dtype_bytes(s.dtype),
                b.planes[plane].row_bytes,
                staged,
                true};
    };
    BlockGroup({open.data(), count}, workspace.buffers()).run(job);
    for (std::size_t i = 0; i < count; ++i) {
        const OpenBlock& b = open[i];
        Status closed = b.reader->close();
        if (closed.ok() && !b.fits)
            closed = {ErrorCode::kCorruptBlock, "its side information is out of range"};
        if (!closed.ok()) return {first + i, in_block(h, b.layer, b.block, closed)};
    }
    return {first + count, Status()};
}

Status ChunkDecoder::decode_klt_layer(std::size_t layer, std::span<const PlaneBuffer> planes,
                                      const std::span<const PlaneBuffer>* ahead, Executor& executor,
                                      DecodeWorkspace& workspace) const {
    const State& s = *state_;
    DecodeWorkspace::Buffers& w = workspace.buffers();
    if (layer == 0) {
        w.klt.begin({&s.header, s.calibration.get(), s.ops, s.dtype, &s.absolute, &s.shift});
        w.klt_owner = s.number;
    }
    if (w.klt_owner != s.number || w.klt.next_layer() != layer) {
        return {ErrorCode::kBadArgument,
                fmt::format("layer {} of a klt chunk, whose layers are decoded in order", layer)};
    }
    const auto block = [&](std::size_t l) {
        return s.bytes.subspan(s.block_begin[l], s.block_begin[l + 1] - s.block_begin[l]);
    };
    const KltDecoder::Layer now = {block(layer), planes};
    KltDecoder::Layer next;
    if (ahead != nullptr) next = {block(layer + 1), *ahead};
    if (Status failed = w.klt.layer(now, ahead != nullptr ? &next : nullptr, executor); !failed.ok()) {
        w.klt_owner = 0;
        return in_block(s.header, layer, 0, failed);
    }
    return {};
}

Status ChunkDecoder::decode_layer(std::size_t layer, std::span<const PlaneBuffer> planes,
                                  DecodeWorkspace& workspace) const {
    if (Status s = verify_layer(layer); !s.ok()) return s;
    if (header().profile == Profile::kKlt) {
        if (planes.size() != header().layout.planes.size())
            return {ErrorCode::kBadArgument, fmt::format("a layer with {} planes", planes.size())};
        SerialExecutor serial;
        return decode_klt_layer(layer, planes, nullptr, serial, workspace);
    }
    for (std::size_t b = 0; b < header().blocks_per_layer(); ++b) {
        if (Status s = decode_block(layer, b, planes, workspace); !s.ok()) return s;
    }
    return {};
}

Status ChunkDecoder::decode_layers(std::size_t first, std::size_t end, std::span<const PlaneBuffer> planes,
                                   Executor& executor, std::span<DecodeWorkspace> workspaces) const {
    const std::size_t per_layer = header().layout.planes.size();
    if (first > end || end > header().layout.layers)
        return {ErrorCode::kBadArgument, fmt::format("no layers {} to {}", first, end)};
    if (planes.size() != (end - first) * per_layer || workspaces.size() < executor.workers()) {
        return {ErrorCode::kBadArgument,
                fmt::format("{} plane buffers and {} workspaces, {} and {} needed", planes.size(),
                            workspaces.size(), (end - first) * per_layer, executor.workers())};
    }
    return header().profile == Profile::kKlt ? decode_klt_layers(first, end, planes, executor, workspaces[0])
                                             : decode_block_layers(first, end, planes, executor, workspaces);
}

Status ChunkDecoder::decode_klt_layers(std::size_t first, std::size_t end,
                                       std::span<const PlaneBuffer> planes, Executor& executor,
                                       DecodeWorkspace& workspace) const {
    for (std::size_t l = 0; l < end; ++l) {
        if (Status s = verify_layer(l); !s.ok()) return s;
    }
    const std::size_t per_layer = header().layout.planes.size();
    const auto planes_of = [&](std::size_t l) {
        return l < first ? std::span<const PlaneBuffer>()
                         : planes.subspan((l - first) * per_layer, per_layer);
    };
    for (std::size_t l = 0; l < end; ++l) {
        const std::span<const PlaneBuffer> ahead = l + 1 < end ? planes_of(l + 1) : planes_of(l);
        Status s = decode_klt_layer(l, planes_of(l), l + 1 < end ? &ahead : nullptr, executor, workspace);
        if (!s.ok()) return s;
    }
    return {};
}

Status ChunkDecoder::decode_block_layers(std::size_t first, std::size_t end,
                                         std::span<const PlaneBuffer> planes, Executor& executor,
                                         std::span<DecodeWorkspace> workspaces) const {
    const std::size_t per_layer = header().layout.planes.size();
    const std::size_t blocks = header().blocks_per_layer();
    // Who comes first to a layer verifies it.
    struct Verified {
        Once once;
        Status status;
    };
    std::vector<Verified> verified(end - first);
    const auto verify = [&](std::size_t layer) -> const Status& {
        Verified& v = verified[layer - first];
        v.once.run([&] { v.status = verify_layer(layer); });
        return v.status;
    };
    // Side by side as many as leave every worker some.
    const std::size_t count = (end - first) * blocks;
    const std::size_t abreast = std::clamp<std::size_t>(count / executor.workers(), 1, kAbreast);
    std::mutex mutex;
    std::size_t first_failed = end * blocks;  // the same report whatever the order
    Status failure;
    for (DecodeWorkspace& w : workspaces) w.buffers().staged.drop();
    executor.run((count + abreast - 1) / abreast, [&](std::size_t i, std::size_t worker) {
        const std::size_t begin = first * blocks + i * abreast;
        const std::size_t size = std::min(abreast, end * blocks - begin);
        const auto from_layer = planes.subspan((begin / blocks - first) * per_layer);
        std::pair<std::size_t, Status> ended;
        for (std::size_t l = begin / blocks; l <= (begin + size - 1) / blocks && ended.second.ok(); ++l)
            ended = {l * blocks, verify(l)};
        if (ended.second.ok()) ended = decode_group(begin, size, from_layer, workspaces[worker]);
        StagedRows::settle(*state_->ops);
        auto& [at, status] = ended;
        if (status.ok()) return;
        const std::lock_guard lock(mutex);
        if (at < first_failed) {
            first_failed = at;
            failure = std::move(status);
        }
    });
    for (DecodeWorkspace& w : workspaces) w.buffers().staged.send(*state_->ops);
    return failure;
}

Status ChunkDecoder::decode(std::span<const PlaneBuffer> planes, Executor& executor,
                            std::span<DecodeWorkspace> workspaces) const {
    return decode_layers(0, header().layout.layers, planes, executor, workspaces);
}

Status check_consecutive(const ChunkHeader& previous, const ChunkHeader& next) {
    const bool same = previous.layout == next.layout && previous.model == next.model &&
                      previous.base_position == next.base_position;
    if (!same)
        return {ErrorCode::kNotConsecutive,
                "its layout, model or base position is not the one of the chunk before"};
    const std::uint64_t expected = previous.first_token + previous.tokens;
    if (next.first_token != expected) {
        return {ErrorCode::kNotConsecutive, fmt::format("it starts at token {}, the chunk before ends at {}",
                                                        next.first_token, expected)};
    }
    if (next.parent != previous.chain) return {ErrorCode::kBrokenChain, "its parent is not the chunk before"};
    return {};
}

}  // namespace kvcast
