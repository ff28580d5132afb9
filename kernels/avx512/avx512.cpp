#include "kernels/avx512/slots.h"
#include "kernels/backends.h"

namespace kvcast::kernels {

const Ops& avx512_ops() {
    static const Ops table = [] {
        Ops ops = avx2_ops();
        ops.name = "avx512";
        ops.project = avx512::project;
        ops.project_sparse = avx512::project_sparse;
        return ops;
    }();
    return table;
}

}  // namespace kvcast::kernels
