// What functions of this backend are compiled for. An attribute on each of them rather than a flag on the
// file: what a file shares with the rest of the program (inline functions of headers) must run on every
// machine.
#pragma once

#define KVCAST_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi,avx512vbmi2,gfni,bmi,bmi2,popcnt")))
#define KVCAST_AVX512_INLINE KVCAST_AVX512 __attribute__((always_inline)) inline
