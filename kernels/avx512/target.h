// What functions of this backend are compiled for. An attribute on each of them rather than a flag on the
// file: what a file shares with the rest of the program (inline functions of headers) must run on every
// machine.
#pragma once

// What Ice Lake and Zen 4 have.
#define KVCAST_AVX512_TARGET                                                                               \
    target(                                                                                                \
        "avx512f,avx512dq,avx512bw,avx512vl,avx512vnni,avx512vbmi,avx512vbmi2,avx512bitalg,gfni,bmi,bmi2," \
        "popcnt")
#define KVCAST_AVX512 __attribute__((KVCAST_AVX512_TARGET))
#define KVCAST_AVX512_INLINE KVCAST_AVX512 __attribute__((always_inline)) inline
#define KVCAST_AVX512_LAMBDA __attribute__((KVCAST_AVX512_TARGET, always_inline))  // behind the parameters
