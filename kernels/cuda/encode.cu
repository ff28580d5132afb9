// Entropy coding of prepared strips: one warp per block, backwards, then packing.
#include "kernels/cuda/encode_launch.h"
#include "kernels/cuda/global_memory.cuh"
#include "kernels/cuda/platform.cuh"
#include "kernels/cuda/warp_writer.cuh"

namespace kvcast::kernels::cuda {
namespace {

// Warps of a block of threads, which share one copy of the tables: as many as 48 KiB are enough for. Four
// such blocks fit a multiprocessor.
constexpr std::uint32_t kEncodeWarps = 4;
[[maybe_unused]] constexpr std::uint32_t kEncodeBlocks = 4;
static_assert(sizeof(WriterShared<kEncodeWarps>) <= 48 * 1024);
constexpr std::uint32_t kPackThreads = 256;

// The batches of a head from its last to its first. What a batch needs is loaded when it is taken, well
// before its turn, and its word, which says what that is, one batch earlier.
class BatchCursor {
  public:
    __device__ BatchCursor(Memory memory, const EncodePlaneTask& p, bool quantised, std::uint32_t head,
                           const RawWords& raw)
        : left_(uniform(strip_list(p, quantised).batches())),
          lasts_(lasts_of_kinds(strip_list(p, quantised))),
          record_words_(uniform(record_words(p.plane_lines))),
          words_(fixed(reinterpret_cast<const std::uint32_t*>(memory.workspace + p.words) +
                       std::uint64_t{head} * p.head_batches)),
          raw_(shared_offset(raw)),
          own_raw_(raw_ + lane_id() * kPieceWords * 4),
          word_(word_below()) {
        const auto* records = reinterpret_cast<const std::uint32_t*>(memory.workspace + p.records) +
                              std::uint64_t{head} * p.head_batches * record_words_;
        symbols_ = fixed(records + lane_id());
        pieces_ = fixed(records + kLanes + lane_id() * kPieceWords);
        escapes_ = fixed(reinterpret_cast<const std::int16_t*>(records + (1 + p.plane_lines) * kLanes));
    }

    __device__ __forceinline__ std::uint32_t left() const { return left_; }

    // The batch before the one that was taken last; where there is none, the first one again.
    __device__ __forceinline__ Batch take() {
        left_ = before(left_);
        const std::uint32_t record = left_ * record_words_;
        slot_ = slot_ == 0 ? (kBatchesAhead - 1) * kSlotBytes : slot_ - kSlotBytes;
        const auto word = BatchWord::from_bits(uniform(word_));
        word_ = word_below();
        copy_raw_words(record, word.planes() * kBatchGroups / kPieceWords);
        commit_copies();
        return {.word = word,
                .last = lasts_ >> 8 * word.kind() & 255u,
                .record = record,
                .symbols = word.coded() ? __ldg(symbols_ + record) : 0,
                .escaped = 0,
                .raw = raw_ + slot_};
    }

    // Asks for escapes of a batch that was taken a while ago; `own` are the lane's escaped_groups().
    __device__ __forceinline__ void expect_escapes(const Batch& b, std::uint32_t own) const {
        if (b.escaped == 0) return;
        const auto last = (31 - static_cast<std::uint32_t>(__clz(static_cast<int>(own)))) / 4;
        expect_where(own != 0, escapes_ + (2 * b.record + last * kLanes + lane_id()));
    }

    // Those of record 0.
    __device__ __forceinline__ const std::int16_t* escapes() const { return escapes_; }

  private:
    static constexpr std::uint32_t kPieceWords = 4;
    static constexpr std::uint32_t kSlotBytes = sizeof(RawWords) / kBatchesAhead;

    // StripList::count_of() less 1 of each kind, a byte each.
    __device__ static std::uint32_t lasts_of_kinds(const StripList& list) {
        std::uint32_t lasts = 0;
        for (std::uint32_t kind = 0; kind < 4; ++kind) lasts |= (list.count_of(kind) - 1) << 8 * kind;
        return uniform(lasts);
    }

    __device__ static std::uint32_t before(std::uint32_t batch) {
        const auto one_less = static_cast<std::int32_t>(batch) - 1;
        return static_cast<std::uint32_t>(one_less < 0 ? 0 : one_less);
    }

    // Raw words of the record, in pieces of 16 bytes, a piece a lane; two where there are more than 16
    // planes.
    __device__ __forceinline__ void copy_raw_words(std::uint32_t record, std::uint32_t pieces) const {
        const std::uint32_t to = own_raw_ + slot_;
        const std::uint32_t* from = pieces_ + record;
        copy_where(lane_id() < pieces, to, from);
        KVCAST_UNROLL(1)
        for (std::uint32_t first = kLanes; first < pieces; first += kLanes)
            copy_where(first + lane_id() < pieces, to + first * kPieceWords * 4, from + first * kPieceWords);
    }

    // The word of the batch before left_, on its way.
    __device__ __forceinline__ std::uint32_t word_below() const { return __ldg(words_ + before(left_)); }

    std::uint32_t left_;
    const std::uint32_t lasts_;
    const std::uint32_t record_words_;
    const std::uint32_t* const words_;
    const std::uint32_t* symbols_;  // this lane's, of record 0
    const std::uint32_t* pieces_;   // the lane's first piece of the raw words of record 0
    const std::int16_t* escapes_;   // of record 0
    const std::uint32_t raw_;       // in shared memory
    const std::uint32_t own_raw_;   // the lane's first piece there
    std::uint32_t slot_ = 0;        // bytes from there, of the batch that was taken last
    std::uint32_t word_;            // of the batch that is taken next
};

__device__ __forceinline__ void write_head(WarpWriter& out, Memory memory, const EncodePlaneTask& p,
                                           bool quantised, std::uint32_t head, RawWords& raw) {
    BatchCursor cursor(memory, p, quantised, head, raw);
    std::uint32_t left = cursor.left();
    if (left == 0) return;
    Batch now = cursor.take(), next = cursor.take();
    now.escaped = __reduce_or_sync(kFullWarp, escaped_groups(now.symbols));
    KVCAST_UNROLL(1)
    for (; left != 0; --left) {
        const std::uint32_t escaped = escaped_groups(next.symbols);
        next.escaped = __reduce_or_sync(kFullWarp, escaped);
        const Batch third = cursor.take();
        cursor.expect_escapes(next, escaped);
        wait_copies<kBatchesAhead - 1>();
        __syncwarp();  // what other lanes have copied
        out.batch(now, cursor.escapes());
        __syncwarp();  // before it is overwritten
        now = next;
        next = third;
    }
    wait_copies<0>();  // before others come to the same places
}

__global__ void __launch_bounds__(kEncodeWarps* kLanes, kEncodeBlocks)
    encode_blocks(Memory memory, const EncodePlaneTask* planes, const EncodeBlockTask* blocks,
                  std::uint32_t count, const CoderTables* tables, const PlaneChoice* choices,
                  std::uint32_t* block_bytes) {
    using Shared = WriterShared<kEncodeWarps>;
    auto& shared = *dynamic_shared<Shared>();
    shared.load(tables->steps);
    const std::uint32_t warp = warp_id(), index = blockIdx.x * kEncodeWarps + warp;
    if (index >= count) return;
    const EncodeBlockTask& block = blocks[index];
    const std::uint32_t first_plane = uniform(block.plane), first_head = uniform(block.first_head);
    const std::uint32_t k_heads = uniform(planes[first_plane].heads);
    const std::uint32_t end = block.slot_bytes / 2;
    WarpWriter out(reinterpret_cast<std::uint16_t*>(memory.workspace + block.slot), end, shared.tables);
    KVCAST_UNROLL(1)
    for (std::uint32_t head = uniform(block.end_head); head-- > first_head;) {
        const bool second = head >= k_heads;
        const std::uint32_t plane = first_plane + (second ? 1 : 0);
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
