#include "kernels/amx/slots.h"
#include "kernels/backends.h"

namespace kvcast::kernels {

const Ops& amx_ops() {
    static const Ops table = [] {
        Ops ops = avx512_ops();
        ops.name = "amx";
        ops.project = amx::project;
        return ops;
    }();
    return table;
}

}  // namespace kvcast::kernels
