// Matrices as tensor cores take them: entries in limbs of 8 bits, zero-padded to whole tiles.
//
// A 16-bit number is high * 256 + low, high signed and low unsigned; products of limbs are exact in 32 bits,
// and so are sums over up to 4096 inputs. A matrix whose entries all fit 8 bits is one signed limb, and costs
// half.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/cuda/tasks.h"

namespace kvcast::kernels::cuda {

struct LimbMatrix {
    std::uint32_t limbs = 1;  // 1, or 2: the signed one, then the unsigned one
    std::vector<std::uint8_t>
        bytes;  // [step of kUnitStep inputs][tile of kUnitOutputs outputs][limb][output][input]
};

// `entries` is [output][input].
inline LimbMatrix to_limbs(std::span<const std::int16_t> entries, std::size_t outputs, std::size_t inputs) {
    LimbMatrix m;
    for (const std::int16_t e : entries) {
        if (e != static_cast<std::int8_t>(e)) m.limbs = 2;
    }
    const std::size_t tiles = (outputs + kUnitOutputs - 1) / kUnitOutputs;
    const std::size_t steps = (inputs + kUnitStep - 1) / kUnitStep;
    m.bytes.resize(steps * tiles * m.limbs * kLimbTileBytes);
    for (std::size_t o = 0; o < outputs; ++o) {
        for (std::size_t i = 0; i < inputs; ++i) {
            const auto e = static_cast<std::uint16_t>(entries[o * inputs + i]);
            std::uint8_t* tile =
                m.bytes.data() + (i / kUnitStep * tiles + o / kUnitOutputs) * m.limbs * kLimbTileBytes;
            const std::size_t at = o % kUnitOutputs * kUnitStep + i % kUnitStep;
            tile[at] = static_cast<std::uint8_t>(m.limbs == 2 ? e >> 8 : e);
            if (m.limbs == 2) tile[kLimbTileBytes + at] = static_cast<std::uint8_t>(e);
        }
    }
    return m;
}

}  // namespace kvcast::kernels::cuda
