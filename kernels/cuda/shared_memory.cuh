// What coders ask of shared memory beyond plain pointers: places that a register or a table can hold, so that
// no address has to be put together on the way to a look-up, and copies that arrive later.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/copy.cuh"
#include "kernels/cuda/encode_step.h"

namespace kvcast::kernels::cuda {

// Where a piece is, from a place in shared memory that a kernel's warps agree on.
__device__ __forceinline__ std::uint32_t shared_offset(const void* place) {
#ifdef KVCAST_SIMT
    return static_cast<std::uint32_t>(static_cast<const std::byte*>(place) - simt::dynamic_shared());
#else
    return static_cast<std::uint32_t>(__cvta_generic_to_shared(place));
#endif
}

// The same number, of which the compiler knows nothing: loads of tables, which it may move, stay behind what
// was waited for before.
__device__ __forceinline__ std::uint32_t opaque(std::uint32_t v) {
#ifndef KVCAST_SIMT
    asm volatile("" : "+r"(v)::"memory");
#endif
    return v;
}

// The same place, which is kept as it is: where a block's shared memory begins is not asked again at every
// use.
template <typename T>
__device__ __forceinline__ T* fixed_shared(T* place) {
#ifdef KVCAST_SIMT
    return place;
#else
    return static_cast<T*>(__cvta_shared_to_generic(opaque(shared_offset(place))));
#endif
}

// 64 and 32 bits of a table: they do not change.
struct TwoWords {
    std::uint32_t first;
    std::uint32_t second;
};
__device__ __forceinline__ TwoWords two_words_at(std::uint32_t offset) {
    TwoWords words;
#ifdef KVCAST_SIMT
    words = *reinterpret_cast<const TwoWords*>(simt::dynamic_shared() + offset);
#else
    asm("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(words.first), "=r"(words.second) : "r"(offset));
#endif
    return words;
}
__device__ __forceinline__ std::uint32_t table_word_at(std::uint32_t offset) {
    std::uint32_t word;
#ifdef KVCAST_SIMT
    word = *reinterpret_cast<const std::uint32_t*>(simt::dynamic_shared() + offset);
#else
    asm("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(offset));
#endif
    return word;
}

__device__ __forceinline__ SlotPiece piece_at(std::uint32_t offset) {
    const TwoWords words = two_words_at(offset);
    return {words.first, words.second};
}

__device__ __forceinline__ SymbolRow row_at(std::uint32_t offset) {
    SymbolRow row;
#ifdef KVCAST_SIMT
    row = *reinterpret_cast<const SymbolRow*>(simt::dynamic_shared() + offset);
#else
    asm("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(row.reciprocal), "=r"(row.negative_frequency), "=r"(row.shift), "=r"(row.first_piece)
        : "r"(offset));
#endif
    return row;
}

// 16 and 32 bits of what changes: read again whenever they are asked for.
__device__ __forceinline__ std::uint16_t half_at(std::uint32_t offset) {
    std::uint16_t half;
#ifdef KVCAST_SIMT
    half = *reinterpret_cast<const std::uint16_t*>(simt::dynamic_shared() + offset);
#else
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(half) : "r"(offset));
#endif
    return half;
}
__device__ __forceinline__ std::uint32_t word_at(std::uint32_t offset) {
    std::uint32_t word;
#ifdef KVCAST_SIMT
    word = *reinterpret_cast<const std::uint32_t*>(simt::dynamic_shared() + offset);
#else
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(offset));
#endif
    return word;
}

// How many bits are set, found out behind what was read before by half_at() and word_at(): the unit that
// counts is slow, and others may be waiting for it.
__device__ __forceinline__ std::uint32_t late_popc(std::uint32_t bits) {
#ifdef KVCAST_SIMT
    return static_cast<std::uint32_t>(__popc(bits));
#else
    std::uint32_t count;
    asm volatile("popc.b32 %0, %1;" : "=r"(count) : "r"(bits));
    return count;
#endif
}

// sum, or sum + jump where rank >= edge, with the sum made before it is known which.
__device__ __forceinline__ std::uint32_t sum_with_jump(std::uint32_t sum, std::uint32_t rank,
                                                       std::uint32_t edge, std::uint32_t jump) {
#ifdef KVCAST_SIMT
    return rank >= edge ? sum + jump : sum;
#else
    asm("{ .reg .pred p; setp.ge.u32 p, %1, %2; @p add.u32 %0, %0, %3; }"
        : "+r"(sum)
        : "r"(rank), "r"(edge), "r"(jump));
    return sum;
#endif
}

// 16 bytes from global to shared memory, in the group of copies that commit_copies() closes; and the same by
// some lanes, without a branch.
__device__ __forceinline__ void copy_later(std::uint32_t to, const void* from) {
#ifdef KVCAST_SIMT
    simt_copy_async(simt::dynamic_shared() + to, from, 16);
#else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
#endif
}
__device__ __forceinline__ void copy_where(bool mine, std::uint32_t to, const void* from) {
#ifdef KVCAST_SIMT
    if (mine) copy_later(to, from);
#else
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %0, 0; @p cp.async.cg.shared.global [%1], [%2], 16; }"
                 :
                 : "r"(mine ? 1 : 0), "r"(to), "l"(from)
                 : "memory");
#endif
}

}  // namespace kvcast::kernels::cuda
