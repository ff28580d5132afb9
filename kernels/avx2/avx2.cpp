#include "kernels/avx2/slots.h"
#include "kernels/backends.h"

namespace kvcast::kernels {

const Ops& avx2_ops() {
    static const Ops table = [] {
        Ops ops = scalar_ops();
        ops.name = "avx2";
        ops.project = avx2::project;
        ops.project_sparse = avx2::project_sparse;
        return ops;
    }();
    return table;
}

}  // namespace kvcast::kernels
