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
    std::uint32_t slots = 0;  // of a warp's outputs
    // [a warp's outputs][slot][tile of 8 outputs][lane][half][8 inputs], halves of a slot being limbs or, of
    // one limb, steps: what a lane holds of fragments (kernels/cuda/mma.cuh), whose order of inputs is
    // another one, as that of the features: eight neighbours are one lane's.
    std::vector<std::uint8_t> bytes;
};

constexpr std::uint32_t limb_slots(std::size_t inputs, std::uint32_t limbs) {
    return slots_of_steps(div_up(static_cast<std::uint32_t>(inputs), kUnitStep), limbs);
}

// Where entry (output, input) of the first limb is in a matrix of `inputs` inputs.
constexpr std::size_t limb_offset(std::size_t output, std::size_t input, std::size_t inputs,
                                  std::uint32_t limbs) {
    const std::size_t step = input / kUnitStep, steps = slot_steps(limbs);
    const std::size_t slot = output / kWarpOutputs * limb_slots(inputs, limbs) + step / steps;
    const std::size_t tile = output % kWarpOutputs / kOutputTile;
    const std::size_t lane = output % kOutputTile * 4 + input % kUnitStep / 8;
    return slot * kSlotBytes + tile * 2 * kFragmentBytes + lane * 16 + step % steps * 8 + input % 8;
}

// `entries` is [output][input].
inline LimbMatrix to_limbs(std::span<const std::int16_t> entries, std::size_t outputs, std::size_t inputs) {
    LimbMatrix m;
    for (const std::int16_t e : entries) {
        if (e != static_cast<std::int8_t>(e)) m.limbs = 2;
    }
    const std::size_t warps = (outputs + kWarpOutputs - 1) / kWarpOutputs;
    m.slots = limb_slots(inputs, m.limbs);
    m.bytes.resize(warps * m.slots * kSlotBytes);
    for (std::size_t o = 0; o < outputs; ++o) {
        for (std::size_t i = 0; i < inputs; ++i) {
            const auto e = static_cast<std::uint16_t>(entries[o * inputs + i]);
            std::uint8_t* at = m.bytes.data() + limb_offset(o, i, inputs, m.limbs);
            at[0] = static_cast<std::uint8_t>(e);
            if (m.limbs == 2) at[8] = static_cast<std::uint8_t>(e >> 8);
        }
    }
    return m;
}

}  // namespace kvcast::kernels::cuda
