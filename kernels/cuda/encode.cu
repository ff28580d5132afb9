// Entropy coding of prepared strips: one warp per block, backwards, then packing.
#include "kernels/cuda/encode_launch.h"
#include "kernels/cuda/platform.cuh"
#include "kernels/cuda/warp_writer.cuh"

namespace kvcast::kernels::cuda {
namespace {

// Warps of a block of threads, which share one copy of the tables: as many as 48 KiB are enough for. Four
// such blocks fit a multiprocessor.
constexpr std::uint32_t kEncodeWarps = 4;
constexpr std::uint32_t kEncodeBlocks = 4;
static_assert(sizeof(WriterShared<kEncodeWarps>) <= 48 * 1024);
constexpr std::uint32_t kPackThreads = 256;

// The batches of a head from its last to its first. What a batch needs is loaded when it is taken, well
// before its turn.
class BatchCursor {
  public:
    __device__ BatchCursor(Memory memory, const EncodePlaneTask& p, bool quantised, std::uint32_t head,
                           const RawWords& raw)
        : left_(strip_list(p, quantised).batches()),
          batches_(left_),
          counts_(counts_of_kinds(strip_list(p, quantised))),
          words_(reinterpret_cast<const std::uint32_t*>(memory.workspace + p.words) +
                 std::uint64_t{head} * p.head_batches),
          record_words_(record_words(p.plane_lines)),
          record_(left_ * record_words_),
          records_(reinterpret_cast<const std::uint32_t*>(memory.workspace + p.records) +
                   std::uint64_t{head} * p.head_batches * record_words_),
          symbols_(records_ + lane_id()),
          pieces_(records_ + kLanes + lane_id() * kPieceWords),
          own_(line_of_words(left_ / kLanes)),
          below_(line_of_words(left_ / kLanes - 1)),
          raw_(shared_offset(raw)) {}

    // The batch before the one that was taken last; an empty one where there is none.
    __device__ Batch take() {
        Batch b = {};
        if (left_ > 0) b = taken();
        commit_copies();
        return b;
    }

    // Batch::record counts from here.
    __device__ const std::uint32_t* records() const { return records_; }

  private:
    static constexpr std::uint32_t kPieceWords = 4;

    // StripList::count_of() less 1 of each kind, a byte each.
    __device__ static std::uint32_t counts_of_kinds(const StripList& list) {
        std::uint32_t counts = 0;
        for (std::uint32_t kind = 0; kind < 4; ++kind) counts |= (list.count_of(kind) - 1) << 8 * kind;
        return counts;
    }

    __device__ Batch taken() {
        Batch b = {};
        if (left_ % kLanes == 0) {
            own_ = below_;
            below_ = line_of_words(left_ / kLanes - 2);
        }
        --left_;
        record_ -= record_words_;
        slot_ = slot_ == 0 ? (kBatchesAhead - 1) * kSlotBytes : slot_ - kSlotBytes;
        b.word = BatchWord::from_bits(__shfl_sync(kFullWarp, own_, static_cast<int>(left_ % kLanes)));
        b.count = (counts_ >> 8 * b.word.kind() & 255u) + 1;
        b.record = record_;
        if (b.word.coded()) b.symbols = symbols_[record_];
        b.raw = raw_ + slot_;
        copy_raw_words(b.raw, b.word.planes() * kBatchGroups / kPieceWords);
        return b;
    }

    // Raw words of the record, in pieces of 16 bytes, a piece or two a lane.
    __device__ void copy_raw_words(std::uint32_t raw, std::uint32_t pieces) const {
        const std::uint32_t to = raw + lane_id() * kPieceWords * 4;
        if (lane_id() < pieces) copy_later(to, pieces_ + record_);
        if (lane_id() + kLanes < pieces)
            copy_later(to + kLanes * kPieceWords * 4, pieces_ + record_ + kLanes * kPieceWords);
    }

    // Words of 32 batches, one a lane; zeros where there are none.
    __device__ std::uint32_t line_of_words(std::uint32_t line) const {
        const std::uint32_t batch = line * kLanes + lane_id();
        return batch < batches_ ? words_[batch] : 0;
    }

    static constexpr std::uint32_t kSlotBytes = sizeof(RawWords) / kBatchesAhead;

    std::uint32_t left_;
    const std::uint32_t batches_;
    const std::uint32_t counts_;
    const std::uint32_t* const words_;
    const std::uint32_t record_words_;
    std::uint32_t record_;  // of the batch that was taken last
    const std::uint32_t* const records_;
    const std::uint32_t* const symbols_;  // this lane's, of record 0
    const std::uint32_t* const pieces_;   // the lane's first piece of the raw words of record 0
    std::uint32_t own_;                   // this lane's word of the present line of 32 batches
    std::uint32_t below_;                 // of the line before
    const std::uint32_t raw_;             // in shared memory
    std::uint32_t slot_ = 0;              // bytes from there, of the batch that was taken last
};

__device__ void write_head(WarpWriter& out, Memory memory, const EncodePlaneTask& p, bool quantised,
                           std::uint32_t head, RawWords& raw) {
    BatchCursor cursor(memory, p, quantised, head, raw);
    const auto* escapes =
        reinterpret_cast<const std::int16_t*>(cursor.records() + (1 + p.plane_lines) * std::size_t{kLanes});
    Batch now = cursor.take(), next = cursor.take();
    while (now.count != 0) {
        const Batch third = cursor.take();
        wait_copies<kBatchesAhead - 1>();
        __syncwarp();  // what other lanes have copied
        out.batch(now, escapes);
        __syncwarp();  // before it is overwritten
        now = next;
        next = third;
    }
}

__global__ void __launch_bounds__(kEncodeWarps* kLanes, kEncodeBlocks)
    encode_blocks(Memory memory, const EncodePlaneTask* planes, const EncodeBlockTask* blocks,
                  std::uint32_t count, const CoderTables* tables, const PlaneChoice* choices,
                  std::uint32_t* block_bytes) {
    using Shared = WriterShared<kEncodeWarps>;
    auto& shared = *dynamic_shared<Shared>();
    shared.load(tables->steps);
    const std::uint32_t warp = threadIdx.x / kLanes, index = blockIdx.x * kEncodeWarps + warp;
    if (index >= count) return;
    const EncodeBlockTask block = blocks[index];
    const std::uint32_t end = block.slot_bytes / 2;
    WarpWriter out(reinterpret_cast<std::uint16_t*>(memory.workspace + block.slot), end, &shared.tables);
    for (std::uint32_t head = block.end_head; head-- > block.first_head;) {
        const std::uint32_t k_heads = planes[block.plane].heads;
        const bool second = head >= k_heads;
        const std::uint32_t plane = block.plane + (second ? 1 : 0);
        write_head(out, memory, planes[plane], choices[plane].quantised != 0, head - (second ? k_heads : 0),
                   shared.raw[warp]);
    }
    out.finish();
    if (lane_id() == 0) block_bytes[index] = (end - out.begin()) * 2;
}

// Bytes of the blocks from `first` up to `end`, in all threads of the block.
__device__ std::uint64_t bytes_of(const std::uint32_t* block_bytes, std::uint32_t first, std::uint32_t end) {
    __shared__ std::uint64_t sums[kPackThreads / kLanes];
    std::uint64_t own = 0;
    for (std::uint32_t b = first + threadIdx.x; b < end; b += kPackThreads) own += block_bytes[b];
    own = sum_of_lanes(own);
    if (lane_id() == 0) sums[threadIdx.x / kLanes] = own;
    __syncthreads();
    std::uint64_t all = 0;
    for (const std::uint64_t sum : sums) all += sum;
    return all;
}

// `count` 16-bit words, by a block of threads, two at a time. What is read beside them lies within the same
// four bytes as one of them.
__device__ void copy_words(std::uint16_t* to, const std::uint16_t* from, std::uint32_t count) {
    const bool odd = reinterpret_cast<std::uintptr_t>(to) % 4 != 0;
    if (odd && threadIdx.x == 0) to[0] = from[0];
    to += odd ? 1 : 0;
    from += odd ? 1 : 0;
    count -= odd ? 1 : 0;
    auto* out = reinterpret_cast<std::uint32_t*>(to);
    const bool shifted = reinterpret_cast<std::uintptr_t>(from) % 4 != 0;
    const auto* in = reinterpret_cast<const std::uint32_t*>(shifted ? from - 1 : from);
    KVCAST_UNROLL(8)
    for (std::uint32_t i = threadIdx.x; i < count / 2; i += kPackThreads)
        out[i] = shifted ? in[i] >> 16 | in[i + 1] << 16 : in[i];
    if (count % 2 != 0 && threadIdx.x == 0) to[count - 1] = from[count - 1];
}

// One block of threads per coded block.
__global__ void pack_blocks(Memory memory, const PackTask* packs, std::uint32_t most_blocks,
                            const EncodeBlockTask* blocks, const std::uint32_t* block_bytes) {
    const PackTask& pack = packs[blockIdx.x / most_blocks];
    const std::uint32_t index = pack.first_block + blockIdx.x % most_blocks;
    if (index >= pack.end_block) return;
    const std::uint64_t offset = bytes_of(block_bytes, pack.first_block, index);
    const std::uint32_t bytes = block_bytes[index];
    if (offset + bytes > pack.capacity) return;
    const EncodeBlockTask& block = blocks[index];
    copy_words(
        reinterpret_cast<std::uint16_t*>(pack.payload + offset),
        reinterpret_cast<const std::uint16_t*>(memory.workspace + block.slot + block.slot_bytes - bytes),
        bytes / 2);
}

}  // namespace

cudaError_t launch_encode(Memory memory, const EncodePlaneTask* planes, const EncodeBlockTask* blocks,
                          std::uint32_t count, const CoderTables* tables, const PlaneChoice* choices,
                          std::uint32_t* block_bytes, cudaStream_t stream) {
    const Shape shape = {div_up(count, kEncodeWarps), kEncodeWarps * kLanes,
                         sizeof(WriterShared<kEncodeWarps>)};
    return launch(encode_blocks, shape, stream, memory, planes, blocks, count, tables, choices, block_bytes);
}

cudaError_t launch_pack(Memory memory, const PackTask* packs, std::uint32_t chunks, std::uint32_t most_blocks,
                        const EncodeBlockTask* blocks, const std::uint32_t* block_bytes,
                        cudaStream_t stream) {
    return launch(pack_blocks, {chunks * most_blocks, kPackThreads}, stream, memory, packs, most_blocks,
                  blocks, block_bytes);
}

}  // namespace kvcast::kernels::cuda
