// What AVX-512 (BW, VL, VNNI) does faster than the backends below it.
#pragma once

#include "kernels/scalar/slots.h"

namespace kvcast::kernels::avx512 {

void project(const Projection& p);
void project_sparse(const Projection& p);

}  // namespace kvcast::kernels::avx512
