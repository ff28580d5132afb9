// What AVX2 does faster than the backend below it.
#pragma once

#include "kernels/scalar/slots.h"

namespace kvcast::kernels::avx2 {

void project(const Projection& p);
void project_sparse(const Projection& p);

}  // namespace kvcast::kernels::avx2
