// Loads and stores at any alignment.
#pragma once

#include <immintrin.h>

#include "kernels/avx2/target.h"

namespace kvcast::kernels::avx2 {

KVCAST_AVX2_INLINE __m256i load256(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
KVCAST_AVX2_INLINE void store256(void* p, __m256i v) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), v);
}

}  // namespace kvcast::kernels::avx2
