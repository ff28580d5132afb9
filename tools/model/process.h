// What a process that runs the model should settle before anything else.
#pragma once

namespace kvcast::model {

// To be called before anything is done or read. Two defaults cost most of the speed:
// - OpenBLAS chooses its kernels by the processor's model number, and for one that is newer than itself takes
//   those of SSE3. It chooses while it is loaded, so the process begins anew with OPENBLAS_CORETYPE naming
//   kernels that the processor can run. Nothing happens where that variable is set, or another BLAS is used.
// - The allocator returns large blocks to the system, which has to zero them again for every tensor.
void prepare_process(char** argv);

}  // namespace kvcast::model
