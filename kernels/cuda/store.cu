// Integer RoPE, conversion and the store to contiguous or paged rows. FORMAT.md, sections 6 and 7.3.
//
// States come channel-major or token-major, rows are token-major: a tile of 32 slots x 32 tokens is read
// along whichever runs contiguously, turned and converted on the way, and written through shared memory so
// that a warp's writes are 32 neighbouring channels of a token.
#include "kernels/cuda/launch.h"
#include "kernels/cuda/platform.cuh"
#include "kernels/cuda/rows.cuh"

namespace kvcast::kernels::cuda {
namespace {

constexpr std::uint32_t kThreads = 128;
constexpr std::uint32_t kRotationThreads = 128;

__global__ void fill_rotations(Memory memory, const RotationTask* tasks) {
    const RotationTask& task = tasks[blockIdx.x];
    const auto* frequencies = reinterpret_cast<const std::uint64_t*>(memory.image + task.frequencies);
    auto* table = reinterpret_cast<SinCos*>(memory.workspace + task.table);
    for (std::uint32_t i = threadIdx.x; i < task.pairs * task.columns; i += blockDim.x)
        table[i] = sin_cos((task.first + i % task.columns) * frequencies[i / task.columns]);
}

// One tile's place in its task.
struct Tile {
    std::uint32_t head;
    std::uint32_t first_slot;
    std::uint32_t first_token;
};

class Loader {
  public:
    __device__ Loader(const StoreTask& task, const RotationTask* rotation, Memory memory, std::uint32_t head)
        : task_(task),
          rotation_(rotation),
          source_(memory.workspace + task.source +
                  head * task.head_stride * element_bytes(task.exact, task.from)),
          angles_(rotation == nullptr ? nullptr
                                      : reinterpret_cast<const SinCos*>(memory.workspace + rotation->table)) {
    }

    // Output bits of both channels of a slot at a token, which is token `position` of the chunk.
    __device__ void operator()(std::uint32_t slot_index, Slot slot, std::uint32_t token,
                               std::uint32_t position, std::uint32_t& a, std::uint32_t& b) const {
        if (!slot.pair) {
            a = plain(element(slot.first, token));
            return;
        }
        const std::uint32_t column = rotation_->columns == 1 ? 0 : position;
        const SinCos angle = angles_[slot_index * rotation_->columns + column];
        const std::uint32_t x = element(slot.first, token);
        const std::uint32_t y = element(slot.second, token);
        if (task_.exact) {
            const float fx = from_bits(task_.from, x);
            const float fy = from_bits(task_.from, y);
            a = to_bits(task_.to, rotate_exact(fx, angle.cos, fy, -angle.sin));
            b = to_bits(task_.to, rotate_exact(fy, angle.cos, fx, angle.sin));
            return;
        }
        const Rotated v = rotate(static_cast<std::int16_t>(x), static_cast<std::int16_t>(y), angle);
        a = to_bits(task_.to, value_of(v.a, task_.scale));
        b = to_bits(task_.to, value_of(v.b, task_.scale));
    }

  private:
    __device__ std::uint32_t element(std::uint32_t channel, std::uint32_t token) const {
        const std::uint64_t i =
            std::uint64_t{channel} * task_.channel_stride + std::uint64_t{token} * task_.token_stride;
        if (task_.exact && task_.from == Dtype::kF32)
            return reinterpret_cast<const std::uint32_t*>(source_)[i];
        return reinterpret_cast<const std::uint16_t*>(source_)[i];
    }

    __device__ std::uint32_t plain(std::uint32_t bits) const {
        if (!task_.exact) return to_bits(task_.to, value_of(static_cast<std::int16_t>(bits), task_.scale));
        return task_.from == task_.to ? bits : to_bits(task_.to, from_bits(task_.from, bits));
    }

    const StoreTask& task_;
    const RotationTask* rotation_;
    const std::byte* source_;
    const SinCos* angles_;
};

__global__ void store_tiles_of(Memory memory, const StoreTask* tasks, std::uint32_t count,
                               const RotationTask* rotations) {
    __shared__ std::uint32_t first[kStoreTokens][kStoreSlots + 1];
    __shared__ std::uint32_t second[kStoreTokens][kStoreSlots + 1];
    __shared__ std::uint32_t position[kStoreTokens];
    const std::uint32_t item = tasks->first_tile + blockIdx.x;
    const StoreTask& task = tasks[task_of<&StoreTask::first_tile>(tasks, count, item)];
    const RotationTask* rotation = task.rotation == kNone ? nullptr : rotations + task.rotation;
    const std::uint32_t slots = slots_of(task.channels, rotation == nullptr ? 0 : rotation->pairs);
    const std::uint32_t across = div_up(slots, kStoreSlots);
    const std::uint32_t down = div_up(task.tokens, kStoreTokens);
    const std::uint32_t local = item - task.first_tile;
    const Tile tile = {local / (across * down), local % across * kStoreSlots,
                       local / across % down * kStoreTokens};

    if (threadIdx.x < kStoreTokens && tile.first_token + threadIdx.x < task.tokens) {
        const std::uint32_t t = tile.first_token + threadIdx.x;
        position[threadIdx.x] =
            task.list ? reinterpret_cast<const std::uint32_t*>(memory.image + task.token_list)[t]
                      : task.first_token + t;
    }
    __syncthreads();

    const Loader load(task, rotation, memory, tile.head);
    const bool along_tokens = task.token_stride == 1;
    for (std::uint32_t i = threadIdx.x; i < kStoreTokens * kStoreSlots; i += kThreads) {
        const std::uint32_t t = along_tokens ? i % kStoreTokens : i / kStoreSlots;
        const std::uint32_t s = along_tokens ? i / kStoreTokens : i % kStoreSlots;
        const std::uint32_t slot = tile.first_slot + s;
        if (slot < slots && tile.first_token + t < task.tokens)
            load(slot, slot_of(slot, rotation), tile.first_token + t, position[t], first[t][s], second[t][s]);
    }
    __syncthreads();

    for (std::uint32_t i = threadIdx.x; i < kStoreTokens * kStoreSlots; i += kThreads) {
        const std::uint32_t t = i / kStoreSlots;
        const std::uint32_t s = i % kStoreSlots;
        if (tile.first_slot + s >= slots || tile.first_token + t >= task.tokens) continue;
        const Slot slot = slot_of(tile.first_slot + s, rotation);
        auto* row =
            reinterpret_cast<std::byte*>(row_of(task.out, position[t]) + tile.head * task.out.head_bytes);
        put_bits(row, task.to, slot.first, first[t][s]);
        if (slot.pair) put_bits(row, task.to, slot.second, second[t][s]);
    }
}

}  // namespace

cudaError_t launch_rotations(Memory memory, const RotationTask* tasks, std::uint32_t count,
                             cudaStream_t stream) {
    return launch(fill_rotations, {count, kRotationThreads}, stream, memory, tasks);
}

cudaError_t launch_store(Memory memory, const StoreTask* tasks, std::uint32_t count, std::uint32_t tiles,
                         const RotationTask* rotations, cudaStream_t stream) {
    return launch(store_tiles_of, {tiles, kThreads}, stream, memory, tasks, count, rotations);
}

}  // namespace kvcast::kernels::cuda
