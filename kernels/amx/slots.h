// What tile registers (AMX) do faster than the backends below them.
#pragma once

#include "kernels/ops.h"

namespace kvcast::kernels::amx {

// Whether the processor has them and the system lets this process use them; asks the system, once.
bool available();

void project(const Projection& p);

}  // namespace kvcast::kernels::amx
