// What functions of this backend are compiled for; see kernels/avx512/target.h.
#pragma once

#define KVCAST_AVX2_TARGET target("avx2,f16c,bmi,bmi2,popcnt")
#define KVCAST_AVX2 __attribute__((KVCAST_AVX2_TARGET))
#define KVCAST_AVX2_INLINE KVCAST_AVX2 __attribute__((always_inline)) inline
#define KVCAST_AVX2_LAMBDA __attribute__((KVCAST_AVX2_TARGET, always_inline))  // behind the parameters
