#include "kernels/ops.h"

namespace kvcast::kernels {

const Ops& best_ops() {
    return scalar_ops();
}

}  // namespace kvcast::kernels
