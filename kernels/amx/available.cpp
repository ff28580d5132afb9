#include "kernels/amx/slots.h"

#ifdef __linux__
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace kvcast::kernels::amx {

#ifdef __linux__

namespace {

// Leaf 7 of CPUID: tiles, and their products of 8-bit integers.
bool processor_has_tiles() {
    constexpr unsigned kAmxTile = 1u << 24, kAmxInt8 = 1u << 25;
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
    return (d & kAmxTile) != 0 && (d & kAmxInt8) != 0;
}

// Tiles are 8 KiB of state that Linux saves only for processes that asked for it. Granted once, it holds for
// all threads.
bool system_grants_tiles() {
    constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
    constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

bool available() {
    static const bool granted = processor_has_tiles() && system_grants_tiles();
    return granted;
}

#else

bool available() {
    return false;
}

#endif

}  // namespace kvcast::kernels::amx
