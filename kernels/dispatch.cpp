#include <cstdlib>
#include <string_view>
#include <vector>

#ifdef KVCAST_X86
#include "kernels/amx/slots.h"
#endif
#include "kernels/backends.h"
#include "kernels/ops.h"

namespace kvcast::kernels {
namespace {

#ifdef KVCAST_X86

bool avx2_available() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") &&
           __builtin_cpu_supports("popcnt");
}

#endif

std::vector<const Ops*> find_available() {
    std::vector<const Ops*> out = {&scalar_ops()};
#ifdef KVCAST_X86
    if (avx2_available()) out.push_back(&avx2_ops());
    if (avx512_available()) out.push_back(&avx512_ops());
    if (amx_available()) out.push_back(&amx_ops());
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

bool avx512_available() {
#ifdef KVCAST_X86
    return avx2_available() && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") &&
           __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
           __builtin_cpu_supports("avx512bitalg") && __builtin_cpu_supports("gfni");
#else
    return false;
#endif
}

bool amx_available() {
#ifdef KVCAST_X86
    return avx512_available() && amx::available();
#else
    return false;
#endif
}

std::span<const Ops* const> available_ops() {
    static const std::vector<const Ops*> available = find_available();
    return available;
}

const Ops& best_ops() {
    static const Ops& best = choose();
    return best;
}

}  // namespace kvcast::kernels
