#include <cstdlib>
#include <string_view>
#include <vector>

#include "kernels/backends.h"
#include "kernels/ops.h"

namespace kvcast::kernels {
namespace {

std::vector<const Ops*> find_available() {
    std::vector<const Ops*> out = {&scalar_ops()};
#ifdef KVCAST_X86
    const bool avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512vnni");
    if (avx2) out.push_back(&avx2_ops());
    if (avx512) out.push_back(&avx512_ops());
#endif
    return out;
}

const Ops& choose() {
    const char* wanted = std::getenv("KVCAST_KERNELS");
    for (const Ops* ops : available_ops()) {
        if (wanted != nullptr && std::string_view(wanted) == ops->name) return *ops;
    }
    return *available_ops().back();
}

}  // namespace

std::span<const Ops* const> available_ops() {
    static const std::vector<const Ops*> available = find_available();
    return available;
}

const Ops& best_ops() {
    static const Ops& best = choose();
    return best;
}

}  // namespace kvcast::kernels
