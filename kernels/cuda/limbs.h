// Matrices as tensor cores take them: entries in limbs of 8 bits, in the order of the product's fragments,
// zero-padded to whole tiles.
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
    // [step of 32 inputs][tile of 8 outputs][limb][lane][8 inputs]: what a lane holds of a fragment
    // (kernels/cuda/mma.cuh); as many tiles as kWarpOutputs asks for.
    std::vector<std::uint8_t> bytes;
};

// Where entry (output, input) of the first limb is in a matrix of `outputs` outputs.
constexpr std::size_t limb_offset(std::size_t output, std::size_t input, std::size_t outputs,
                                  std::size_t limbs) {
    const std::size_t tile = input / kUnitStep * limb_tiles(static_cast<std::uint32_t>(outputs)) + output / 8;
    const std::size_t half = input % kUnitStep / 16, lane = output % 8 * 4 + input % 16 / 4;
    return tile * limbs * kFragmentBytes + lane * 8 + half * 4 + input % 4;
}

// `entries` is [output][input].
inline LimbMatrix to_limbs(std::span<const std::int16_t> entries, std::size_t outputs, std::size_t inputs) {
    LimbMatrix m;
    for (const std::int16_t e : entries) {
        if (e != static_cast<std::int8_t>(e)) m.limbs = 2;
    }
    const std::size_t steps = (inputs + kUnitStep - 1) / kUnitStep;
    m.bytes.resize(steps * limb_tiles(static_cast<std::uint32_t>(outputs)) * m.limbs * kFragmentBytes);
    for (std::size_t o = 0; o < outputs; ++o) {
        for (std::size_t i = 0; i < inputs; ++i) {
            const auto e = static_cast<std::uint16_t>(entries[o * inputs + i]);
            std::uint8_t* at = m.bytes.data() + limb_offset(o, i, outputs, m.limbs);
            at[0] = static_cast<std::uint8_t>(m.limbs == 2 ? e >> 8 : e);
            if (m.limbs == 2) at[kFragmentBytes] = static_cast<std::uint8_t>(e);
        }
    }
    return m;
}

}  // namespace kvcast::kernels::cuda
