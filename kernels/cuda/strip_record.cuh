// Values to symbols, and a warp's way to make a strip's records (kernels/cuda/strip_list.h).
#pragma once

#include "kernels/cuda/compiler.cuh"
#include "kernels/cuda/encode_tasks.h"
#include "kernels/cuda/side_vector.cuh"
#include "kernels/cuda/warp_rans.cuh"

namespace kvcast::kernels::cuda {

// A value as it is coded: a symbol or an escaped word, and raw bits.
struct SplitValue {
    std::int32_t high;
    std::uint32_t raw;
};

// Integers of a class from 1 on.
struct SplitByClass {
    unsigned shift;

    __device__ SplitValue operator()(std::int32_t value) const {
        const std::int32_t shifted = value + (shift == 0 ? 0 : 1 << (shift - 1));
        return {shifted >> shift, static_cast<std::uint32_t>(shifted) & ((1u << shift) - 1)};
    }
};

// Stored elements under an exponent model.
struct SplitByExponent {
    std::uint32_t center;
    Dtype dtype;

    __device__ SplitValue operator()(std::uint32_t bits) const {
        const unsigned mantissa = mantissa_bits(dtype);
        const unsigned sign_shift = dtype == Dtype::kF32 ? 31 : 15;
        const auto exponent = static_cast<std::int32_t>(bits >> mantissa & exponent_mask(dtype));
        return {static_cast<std::int32_t>(center) - exponent,
                (bits >> sign_shift & 1u) << mantissa | (bits & ((1u << mantissa) - 1))};
    }
};

// Lane p < planes gets the lanes' bits p.
__device__ __forceinline__ std::uint32_t own_plane(std::uint32_t planes, std::uint32_t raw) {
    std::uint32_t own = 0;
    for (std::uint32_t p = 0; p < planes; ++p) {
        const unsigned bits = __ballot_sync(kFullWarp, static_cast<int>(raw >> p & 1u));
        if (lane_id() == p) own = bits;
    }
    return own;
}

// The lowest bit of each of eight symbols that is an escape.
__device__ __forceinline__ std::uint32_t escaped_groups(std::uint32_t symbols) {
    static_assert(kEscape == 15);
    const std::uint32_t pairs = symbols & symbols >> 1;
    return pairs & pairs >> 2 & 0x11111111u;
}

// What a batch is split into, of every lane.
struct SplitBatch {
    std::int32_t high[kBatchGroups];
    std::uint32_t raw[kBatchGroups];
};

// Raw words of all groups, plane after plane: four planes of eight groups are 32 words of 32 bits, which come
// from the lanes by turning a matrix over.
__device__ __forceinline__ void write_planes(std::uint32_t* out, std::uint32_t planes,
                                             const std::uint32_t (&raw)[kBatchGroups]) {
    constexpr std::uint32_t kPlanes = kLanes / kBatchGroups;
    const BitTransposer transposed;
    const std::uint32_t group = lane_id() / kPlanes, plane = lane_id() % kPlanes;
    KVCAST_UNROLL(1)
    for (std::uint32_t first = 0; first < planes; first += kPlanes) {
        std::uint32_t bits = 0;
        KVCAST_UNROLL(8)
        for (std::uint32_t g = kBatchGroups; g-- > 0;) bits = bits << kPlanes | (raw[g] >> first & 15u);
        const std::uint32_t word = transposed(bits);
        if (first + plane < planes) out[(first + plane) * kBatchGroups + group] = word;
        __syncwarp();
    }
}

// Lanes that write escapes, which are rare, are told to meet: the compiler would make sure of it at every
// vote that follows.
__device__ __forceinline__ void write_symbols(std::uint32_t* record, std::int16_t* escapes,
                                              const std::int32_t (&high)[kBatchGroups]) {
    std::uint32_t symbols = 0;
    KVCAST_UNROLL(8)
    for (std::uint32_t g = 0; g < kBatchGroups; ++g) symbols |= symbol_of(high[g]) << 4 * g;
    record[lane_id()] = symbols;
    if (!__any_sync(kFullWarp, escaped_groups(symbols) != 0 ? 1 : 0)) return;
    KVCAST_UNROLL(8)
    for (std::uint32_t g = 0; g < kBatchGroups; ++g) {
        if (symbol_of(high[g]) == kEscape)
            escapes[g * kLanes + lane_id()] = static_cast<std::int16_t>(high[g]);
    }
    __syncwarp();
}

__device__ __forceinline__ void write_split(std::uint32_t* record, std::uint32_t plane_lines,
                                            std::uint32_t planes, const SplitBatch& batch) {
    std::uint32_t* raw = record + kLanes;
    write_symbols(record, reinterpret_cast<std::int16_t*>(raw + std::size_t{plane_lines} * kLanes),
                  batch.high);
    write_planes(raw, planes, batch.raw);
}

// The record of `count` values, up to a batch; split(i) is value i.
template <typename Split>
__device__ __forceinline__ void write_record(std::uint32_t* record, std::uint32_t plane_lines,
                                             std::uint32_t planes, std::uint32_t count, Split split) {
    SplitBatch batch;
    KVCAST_UNROLL(8)
    for (std::uint32_t g = 0; g < kBatchGroups; ++g) {
        const std::uint32_t i = g * kLanes + lane_id();
        const SplitValue v = i < count ? split(i) : SplitValue{0, 0};
        batch.high[g] = v.high;
        batch.raw[g] = v.raw;
    }
    write_split(record, plane_lines, planes, batch);
}

// The records of `count` values, split(i) being value i; `records` is the first.
template <typename Split>
__device__ void write_records(std::uint32_t* records, std::uint32_t plane_lines, std::uint32_t planes,
                              std::uint32_t count, Split split) {
    const std::uint32_t end = uniform(count), all_planes = uniform(planes);
    for (std::uint32_t at = 0; at < end; at += kBatchValues, records += record_words(plane_lines)) {
        const std::uint32_t n = end - at < kBatchValues ? end - at : kBatchValues;
        write_record(records, plane_lines, all_planes, n, [&](std::uint32_t i) { return split(at + i); });
    }
}

}  // namespace kvcast::kernels::cuda
