// One warp's matrix product on the tensor cores: 16 x 8 sums of 32 products of 8-bit integers. PTX ISA,
// "mma", shape m16n8k32: with g = lane / 4 and t = lane % 4, byte b of a lane's registers is
//     a[0], a[1]: row g, row g + 8, column 4 t + b;   a[2], a[3]: the same, column 16 + 4 t + b
//     b[0], b[1]: column g, row 4 t + b, row 16 + 4 t + b
// and sums are d[0], d[1]: row g, columns 2 t and 2 t + 1;  d[2], d[3]: row g + 8.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace kvcast::kernels::cuda {

struct FragmentA {
    std::uint32_t r[4];
};
struct FragmentB {
    std::uint32_t r[2];
};
struct Sums {
    std::int32_t r[4];
};

#ifdef KVCAST_SIMT

inline void multiply_add(Sums& d, const FragmentA& a, const FragmentB& b, bool signed_a, bool signed_b) {
    simt_mma_m16n8k32(d.r, a.r, b.r, signed_a, signed_b);
}

#else

#define KVCAST_MMA(A, B)                                                       \
    asm("mma.sync.aligned.m16n8k32.row.col.s32." A "." B                       \
        ".s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
        : "+r"(d.r[0]), "+r"(d.r[1]), "+r"(d.r[2]), "+r"(d.r[3])               \
        : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b.r[0]), "r"(b.r[1]))

// Which of them are signed is known where this is compiled.
__device__ __forceinline__ void multiply_add(Sums& d, const FragmentA& a, const FragmentB& b, bool signed_a,
                                             bool signed_b) {
    if (signed_a && signed_b) {
        KVCAST_MMA("s8", "s8");
    } else if (signed_a) {
        KVCAST_MMA("s8", "u8");
    } else if (signed_b) {
        KVCAST_MMA("u8", "s8");
    } else {
        KVCAST_MMA("u8", "u8");
    }
}

#undef KVCAST_MMA

#endif

}  // namespace kvcast::kernels::cuda
