// The tables behind available_ops(). Those of an instruction set must not be used on machines that lack it.
#pragma once

#include "kernels/ops.h"

namespace kvcast::kernels {

const Ops& avx2_ops();    // AVX2
const Ops& avx512_ops();  // AVX-512 as Ice Lake and Zen 4 have it, on top of AVX2
const Ops& amx_ops();     // AMX with 8-bit integers, on top of AVX-512

// Whether they may be used.
bool avx512_available();
bool amx_available();

}  // namespace kvcast::kernels
