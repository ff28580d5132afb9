// What an encoder decides about a chunk before it looks at a value.
#pragma once

#include "codec/encoder.h"

namespace kvcast {

// kOk, or what is wrong with what the caller asks for: kBadArgument, kLimitExceeded, kMissingCalibration, and
// check_layout's errors.
Status check_input(const ChunkInput& input, const EncodeOptions& options);

// The header of a chunk whose input was checked, with room for what its blocks will say: planes, block_bytes
// and layer_crc are zeros.
ChunkHeader plan_header(const ChunkInput& input, const EncodeOptions& options);

}  // namespace kvcast
