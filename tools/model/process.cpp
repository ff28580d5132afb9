#include "tools/model/process.h"

#include <dlfcn.h>
#include <malloc.h>
#include <unistd.h>

#include <cstdlib>
#include <string_view>

namespace kvcast::model {
namespace {

constexpr const char* kCoreVariable = "OPENBLAS_CORETYPE";

// The kernels that OpenBLAS uses; empty for another library.
std::string_view blas_core() {
    const auto name = reinterpret_cast<const char* (*)()>(::dlsym(RTLD_DEFAULT, "openblas_get_corename"));
    return name == nullptr ? std::string_view() : std::string_view(name());
}

// Better kernels than these for this processor; null where there are none.
const char* better_core(std::string_view used) {
#ifdef __x86_64__
    const bool old = used == "Prescott" || used == "Core2" || used == "Nehalem" || used == "Generic";
    if (!old) return nullptr;
    if (__builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl"))
        return "SkylakeX";
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "Haswell";
#else
    static_cast<void>(used);
#endif
    return nullptr;
}

}  // namespace

void prepare_process(char** argv) {
#ifdef __GLIBC__
    ::mallopt(M_MMAP_THRESHOLD, 1 << 30);
    ::mallopt(M_TRIM_THRESHOLD, 1 << 30);
    ::mallopt(M_TOP_PAD, 64 << 20);
#endif
    if (std::getenv(kCoreVariable) != nullptr) return;
    const char* core = better_core(blas_core());
    if (core == nullptr || ::setenv(kCoreVariable, core, 0) != 0) return;
    ::execv("/proc/self/exe", argv);
    ::unsetenv(kCoreVariable);  // it could not begin anew
}

}  // namespace kvcast::model
