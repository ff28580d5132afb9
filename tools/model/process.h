// What a process that runs the model should settle before anything else.
#pragma once

namespace kvcast::model {

// To be called first in main(). Two defaults cost most of the speed:
// - OpenBLAS chooses its kernels by the processor's model number, and takes those of SSE3 for a processor
// that
//   is newer than itself. It chooses while it is loaded, so the process begins anew with OPENBLAS_CORETYPE
//   naming kernels that the processor can run. Nothing happens where that variable is set, or another BLAS is
//   used.
// - The allocator returns large blocks to the system, which has to zero them again for every tensor.
void prepare_process(char** argv);

}  // namespace kvcast::model
