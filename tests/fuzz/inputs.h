// What fuzzers make of their bytes. Lengths, ids and checksums are repaired, so
// that mutations reach the rules behind them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "codec/klt/calibration.h"

namespace kvcast::fuzz {

// A calibration and a chunk of it. Input: u32 length of the calibration, the calibration, u8 count of
// changes, changes, the chunk. A mutation within a calibration's block breaks it nearly always: what blocks
// may hold is changed after they are read, and written again. Nothing where the rules forbid the calibration,
// or the chunk's header.
struct KltInput {
    std::shared_ptr<const Calibration> calibration;
    std::vector<std::uint8_t> chunk;
};
std::optional<KltInput> klt_input(std::span<const std::uint8_t> data);

}  // namespace kvcast::fuzz
