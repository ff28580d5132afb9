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

// The record of `count` values, up to a batch; split(g, i) is value i, in group g.
template <typename Split>
__device__ __forceinline__ void write_record(std::uint32_t* record, std::uint32_t plane_lines,
                                             std::uint32_t planes, std::uint32_t count, Split split) {
    std::uint32_t symbols = 0;
    std::uint32_t* raw = record + kLanes;
    auto* escapes = reinterpret_cast<std::int16_t*>(raw + std::size_t{plane_lines} * kLanes);
    KVCAST_UNROLL(8)
    for (std::uint32_t g = 0; g < kBatchGroups; ++g) {
        if (g * kLanes >= count) break;
        const std::uint32_t i = g * kLanes + lane_id();
        const SplitValue v = i < count ? split(g, i) : SplitValue{0, 0};
        const std::uint32_t symbol = i < count ? symbol_of(v.high) : 0;
        symbols |= symbol << 4 * g;
        if (symbol == kEscape) escapes[i] = static_cast<std::int16_t>(v.high);
        if (planes == 0) continue;
        const std::uint32_t own = own_plane(planes, v.raw);
        if (lane_id() < planes) raw[g * planes + lane_id()] = own;
    }
    record[lane_id()] = symbols;
}

// The records of `count` values, split(i) being value i; `records` is the first.
template <typename Split>
__device__ void write_records(std::uint32_t* records, std::uint32_t plane_lines, std::uint32_t planes,
                              std::uint32_t count, Split split) {
    for (std::uint32_t at = 0; at < count; at += kBatchValues, records += record_words(plane_lines)) {
        const std::uint32_t n = count - at < kBatchValues ? count - at : kBatchValues;
        write_record(records, plane_lines, planes, n,
                     [&](std::uint32_t, std::uint32_t i) { return split(at + i); });
    }
}

}  // namespace kvcast::kernels::cuda
