// Entropy coding of quantised klt chunks: one warp per run of layers, backwards.
#include "kernels/cuda/exponent_model.cuh"
#include "kernels/cuda/klt_encode_launch.h"
#include "kernels/cuda/platform.cuh"
#include "kernels/cuda/rows.cuh"
#include "kernels/cuda/token_strips.cuh"
#include "kernels/cuda/warp_writer.cuh"

namespace kvcast::kernels::cuda {
namespace {

constexpr std::uint32_t kModelWarps = 4;
constexpr std::uint32_t kWriteWarps = 2;  // of a block of threads

// ---- which tokens are coded, which exact

// One warp per chunk: both lists, in order.
__global__ void list_tokens(Memory memory, KltBatch batch) {
    const KltChunkTask& c = batch.chunks[blockIdx.x];
    const auto* unfit = reinterpret_cast<const std::uint32_t*>(memory.workspace + c.unfit);
    auto* body = reinterpret_cast<std::uint32_t*>(memory.workspace + c.body);
    auto* exact = reinterpret_cast<std::uint32_t*>(batch.report + c.exact);
    std::uint32_t coded = 0, left = 0;
    for (std::uint32_t at = 0; at < c.tokens; at += kLanes) {
        const std::uint32_t t = at + lane_id();
        const bool is_exact = t < c.tokens && unfit[t] != 0, is_coded = t < c.tokens && unfit[t] == 0;
        const unsigned exact_lanes = __ballot_sync(kFullWarp, is_exact);
        const unsigned coded_lanes = __ballot_sync(kFullWarp, is_coded);
        if (is_exact) exact[1 + left + rank_in(exact_lanes)] = t;
        if (is_coded) body[1 + coded + rank_in(coded_lanes)] = t;
        left += static_cast<std::uint32_t>(__popc(exact_lanes));
        coded += static_cast<std::uint32_t>(__popc(coded_lanes));
    }
    if (lane_id() != 0) return;
    body[0] = coded;
    exact[0] = left;
}

// One warp per head of a plane: the models of its exact rows.
__global__ void model_rows(Memory memory, KltBatch batch) {
    __shared__ std::uint32_t counts[kModelWarps][256];
    const std::uint32_t item = blockIdx.x * kModelWarps + threadIdx.x / kLanes;
    if (item >= batch.heads) return;
    const KltSourceTask& p =
        batch.planes[task_of<&KltSourceTask::first_head>(batch.planes, batch.plane_count, item)];
    const KltChunkTask& c = batch.chunks[p.chunk];
    const std::uint32_t head = item - p.first_head;
    const auto* exact = reinterpret_cast<const std::uint32_t*>(batch.report + c.exact);
    auto* models =
        reinterpret_cast<std::uint16_t*>(memory.workspace + p.row_models) + std::uint64_t{head} * c.tokens;
    for (std::uint32_t i = 0; i < exact[0]; ++i) {
        const std::uint8_t* row = row_of(p.in, exact[1 + i]) + head * p.in.head_bytes;
        const ExponentModel m =
            exponent_model(*batch.tables, p.source, p.channels, counts[threadIdx.x / kLanes],
                           [&](std::uint32_t channel) { return element_of(row, p.source, channel); });
        if (lane_id() == 0) models[i] = static_cast<std::uint16_t>(m.center | m.table << 8);
    }
}

// ---- layers, what is read last first

// A part's coefficients from the last strip's last to the first one's first.
class StripCursor {
  public:
    __device__ StripCursor(const KltSourceTask& p, const KltChunkTask& c, Memory memory, std::uint32_t part,
                           const StripOrder& order)
        : width_(p.part_width),
          stride_(p.parts * p.part_width),
          levels_(reinterpret_cast<const std::uint8_t*>(memory.image + c.levels)),
          body_(reinterpret_cast<const std::uint32_t*>(memory.workspace + c.body) + 1),
          gains_(reinterpret_cast<const std::int16_t*>(memory.workspace + p.gains) + part * c.tokens),
          all_classes_(p.classes + std::uint64_t{part} * c.level_count * p.part_width),
          q_(reinterpret_cast<const std::int16_t*>(memory.workspace + p.q) + part * p.part_width),
          order_(order),
          left_tokens_(order.count) {}

    struct Step {
        unsigned spread_class;
        std::uint32_t count;  // 0 where there is none
        std::int32_t own;     // this lane's coefficient
    };

    // The step before the one that was taken last.
    __device__ Step take() {
        while (left_ != 0 || left_tokens_ != 0) {
            if (left_ == 0) next_strip();
            while (left_ != 0) {
                const unsigned spread_class = klt_class(classes_[--left_], gain_);
                if (spread_class != 0) return {spread_class, count_, lane_id() < count_ ? own_q_[left_] : 0};
            }
        }
        return {0, 0, 0};
    }

  private:
    __device__ void next_strip() {
        const StripRange strip = strip_before(order_, left_tokens_);
        const std::uint32_t leader = body_[order_.tokens[strip.first]];
        const std::uint32_t own = body_[order_.tokens[strip.first + lesser(lane_id(), strip.count - 1)]];
        left_tokens_ = strip.first;
        count_ = strip.count;
        gain_ = gains_[leader];
        classes_ = all_classes_ + levels_[leader] * width_;
        own_q_ = q_ + std::uint64_t{own} * stride_;
        left_ = width_;
    }

    const std::uint32_t width_, stride_;
    const std::uint8_t* levels_;
    const std::uint32_t* body_;
    const std::int16_t* gains_;
    const std::int8_t* all_classes_;  // [level][coefficient]
    const std::int16_t* q_;
    const StripOrder order_;
    std::uint32_t left_tokens_;  // of the order
    std::uint32_t left_ = 0;     // coefficients of the present strip
    std::uint32_t count_ = 0;
    std::int16_t gain_ = 0;
    const std::int8_t* classes_ = nullptr;
    const std::int16_t* own_q_ = nullptr;
};

// Coefficients are loaded some steps before they are written.
__device__ void write_coefficients(WarpWriter& out, const KltSourceTask& p, const KltChunkTask& c,
                                   Memory memory, std::uint32_t part, const StripOrder& order) {
    constexpr std::uint32_t kAhead = 4;
    StripCursor cursor(p, c, memory, part, order);
    StripCursor::Step ahead[kAhead];
    for (StripCursor::Step& s : ahead) s = cursor.take();
    while (ahead[0].count != 0) {
        KVCAST_UNROLL(4)
        for (StripCursor::Step& s : ahead) {
            const StripCursor::Step now = s;
            s = cursor.take();
            out.strip(now.spread_class, now.count, [&](std::uint32_t) { return now.own; });
        }
    }
}

// Room to sort a unit's tokens in.
struct StripSorter {
    std::uint32_t* places;  // shared memory
    std::uint32_t* order;

    __device__ StripOrder sort(const KltSourceTask& p, const KltChunkTask& c, Memory memory,
                               std::uint32_t part) const {
        const auto* body = reinterpret_cast<const std::uint32_t*>(memory.workspace + c.body);
        const auto* gains =
            reinterpret_cast<const std::int16_t*>(memory.workspace + p.gains) + part * c.tokens;
        const auto* in_tail = reinterpret_cast<const std::uint8_t*>(memory.image + c.in_tail);
        return sort_tokens(
            body[0],
            [&](std::uint32_t i) { return strip_key(gains[body[1 + i]], in_tail[body[1 + i]] != 0); }, places,
            order);
    }
};

__device__ void write_gains(WarpWriter& out, const KltSourceTask& p, const KltChunkTask& c, Memory memory,
                            const CoderTables& tables, std::uint32_t part) {
    const auto* body = reinterpret_cast<const std::uint32_t*>(memory.workspace + c.body);
    const auto* gains = reinterpret_cast<const std::int16_t*>(memory.workspace + p.gains) + part * c.tokens;
    const auto gain = [&](std::uint32_t i) { return std::int32_t{gains[body[1 + i]]}; };
    out.vector(side_vector(tables, body[0], gain), body[0], gain);
}

__device__ void write_exact_rows(WarpWriter& out, const KltSourceTask& p, const KltChunkTask& c,
                                 Memory memory, const std::uint32_t* exact) {
    for (std::uint32_t head = p.heads; head-- > 0;) {
        const auto* models = reinterpret_cast<const std::uint16_t*>(memory.workspace + p.row_models) +
                             std::uint64_t{head} * c.tokens;
        for (std::uint32_t i = exact[0]; i-- > 0;) {
            const std::uint8_t* row = row_of(p.in, exact[1 + i]) + head * p.in.head_bytes;
            out.floats(models[i] & 255u, models[i] >> 8, p.source, p.channels,
                       [&](std::uint32_t channel) { return element_of(row, p.source, channel); });
            out.word(models[i]);
        }
    }
}

__device__ void write_layer(WarpWriter& out, const KltSourceTask* planes, std::uint32_t count,
                            const KltChunkTask& c, Memory memory, const CoderTables& tables,
                            const std::uint32_t* exact, StripSorter sorter) {
    for (std::uint32_t p = count; p-- > 0;) {
        for (std::uint32_t part = planes[p].parts; part-- > 0;)
            write_coefficients(out, planes[p], c, memory, part, sorter.sort(planes[p], c, memory, part));
    }
    for (std::uint32_t p = count; p-- > 0;) {
        for (std::uint32_t part = planes[p].parts; part-- > 0;)
            write_gains(out, planes[p], c, memory, tables, part);
    }
    for (std::uint32_t p = count; p-- > 0;) write_exact_rows(out, planes[p], c, memory, exact);
}

__global__ void write_runs(Memory memory, KltBatch batch, const KltWriteTask* runs,
                           const EncodeBlockTask* slots, std::uint32_t count, std::uint32_t* run_bytes,
                           std::uint32_t* layer_bytes) {
    __shared__ std::uint32_t places[kWriteWarps][kStripKeys];
    using Shared = WriterShared<kWriteWarps>;
    auto& shared = *dynamic_shared<Shared>();
    shared.load(batch.tables->steps);
    const std::uint32_t warp = threadIdx.x / kLanes, index = blockIdx.x * kWriteWarps + warp;
    if (index >= count) return;
    const KltWriteTask run = runs[index];
    const EncodeBlockTask slot = slots[index];
    const KltChunkTask& c = batch.chunks[run.chunk];
    const auto* exact = reinterpret_cast<const std::uint32_t*>(batch.report + c.exact);
    const std::uint32_t end = slot.slot_bytes / 2;
    WarpWriter out(reinterpret_cast<std::uint16_t*>(memory.workspace + slot.slot), end, shared.tables);
    const StripSorter sorter = {places[warp], reinterpret_cast<std::uint32_t*>(memory.workspace + run.order)};
    std::uint32_t piece_end = end;
    for (std::uint32_t layer = run.layers; layer-- > 0;) {
        write_layer(out, batch.planes + run.plane + layer * run.planes, run.planes, c, memory, *batch.tables,
                    exact, sorter);
        if (layer == 0) out.finish();
        if (lane_id() == 0) layer_bytes[run.first_layer + layer] = (piece_end - out.begin()) * 2;
        piece_end = out.begin();
    }
    if (lane_id() == 0) run_bytes[index] = (end - piece_end) * 2;
}

}  // namespace

cudaError_t launch_klt_list(Memory memory, const KltBatch& batch, cudaStream_t stream) {
    const cudaError_t e = launch(list_tokens, {batch.chunk_count, kLanes}, stream, memory, batch);
    if (e != cudaSuccess) return e;
    return launch(model_rows, {div_up(batch.heads, kModelWarps), kModelWarps * kLanes}, stream, memory,
                  batch);
}

cudaError_t launch_klt_write(Memory memory, const KltBatch& batch, const KltWriteTask* runs,
                             const EncodeBlockTask* slots, std::uint32_t count, std::uint32_t* run_bytes,
                             std::uint32_t* layer_bytes, cudaStream_t stream) {
    const Shape shape = {div_up(count, kWriteWarps), kWriteWarps * kLanes, sizeof(WriterShared<kWriteWarps>)};
    return launch(write_runs, shape, stream, memory, batch, runs, slots, count, run_bytes, layer_bytes);
}

}  // namespace kvcast::kernels::cuda
