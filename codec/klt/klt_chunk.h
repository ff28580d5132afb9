// What encoder and decoder of the klt profile share about a chunk: which tokens are coded, at which level.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "codec/format/chunk_header.h"
#include "codec/klt/calibration.h"
#include "codec/klt/reconstruction.h"

namespace kvcast {

// kOk where the chunk can be decoded with the calibration: kMissingCalibration, kWrongCalibration,
// kBadHeader.
Status check_calibration(const ChunkHeader& header, const Calibration* calibration);

// kOk where an encoder can code the chunk with the calibration: kBadArgument (its layout, or no such level).
Status check_klt_options(const ChunkHeader& header, const CalibrationData& data);

// Tokens that are coded by coefficients, in order.
std::vector<std::uint32_t> body_tokens(const ChunkHeader& header);

// Runs of body tokens of one level, at most `longest` each.
std::vector<TokenSlice> body_slices(const ChunkHeader& header, const std::vector<std::uint32_t>& body,
                                    std::size_t longest);

// The level of a token, counted from 0.
std::size_t level_index(const ChunkHeader& header, std::size_t token);

// Tokens that go through the transforms at once: their states stay in the cache.
inline constexpr std::size_t kSliceTokens = 64;

}  // namespace kvcast
