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
    std::uint32_t limbs = 1;  // 1, or 2: the unsigned one, then the signed one
    // [step of 32 inputs][tile of 8 outputs][lane][limb][8 inputs]: what a lane holds of fragments
    // (kernels/cuda/mma.cuh), whose order of inputs is another one, as that of the features: eight neighbours
    // are one lane's. As many tiles as kWarpOutputs asks for.
    std::vector<std::uint8_t> bytes;
};

// Where entry (output, input) of the first limb is in a matrix of `outputs` outputs.
constexpr std::size_t limb_offset(std::size_t output, std::size_t input, std::size_t outputs,
                                  std::size_t limbs) {
    const std::size_t tiles = limb_tiles(static_cast<std::uint32_t>(outputs));
    const std::size_t tile = input / kUnitStep * tiles + output / kOutputTile;
    const std::size_t lane = output % kOutputTile * 4 + input % kUnitStep / 8;
    return tile * limbs * kFragmentBytes + lane * limbs * 8 + input % 8;
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
            at[0] = static_cast<std::uint8_t>(e);
            if (m.limbs == 2) at[8] = static_cast<std::uint8_t>(e >> 8);
        }
    }
    return m;
}

}  // namespace kvcast::kernels::cuda
