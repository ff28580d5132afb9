// What kernels tell nvcc about code; the emulator's compiler does as it likes.
//   KVCAST_UNROLL(n)  before a loop
//   KVCAST_APART      before a function of rare cases, whose registers the usual case should not pay for
#pragma once

#include <cuda_runtime.h>

#ifdef KVCAST_SIMT
#define KVCAST_UNROLL(n)
#define KVCAST_APART
#else
#define KVCAST_PRAGMA(text) _Pragma(#text)
#define KVCAST_UNROLL(n) KVCAST_PRAGMA(unroll n)
#define KVCAST_APART __noinline__
#endif
