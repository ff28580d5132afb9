// The coder's tables as the encoding kernels want them.
#pragma once

#include <cstddef>
#include <vector>

#include "kernels/cuda/encode_tasks.h"

namespace kvcast::device {

// Made once for the process.
const kernels::cuda::CoderTables& coder_tables();

// Appends them to an image; their offset.
std::size_t append_coder_tables(std::vector<std::byte>& image);

}  // namespace kvcast::device
