// Decoding and encoding on a CUDA device, many chunks at a time, on the caller's stream.
//
//     auto plan = DecodePlan::make(chunks);            // host: headers and block indices
//     cudaMemcpyAsync(image, plan.image()...);         // once per plan
//     decode_batch(plan, image, workspace, status, stream);
//     cudaMemcpyAsync(words, status, ...); ...         // 0 for every block that is sound
//
// The output is bit-identical to the CPU decoder's (codec/decoder.h): integers decide, and both use
// kernels/math.h. One rANS block, or one run of klt layers, is one warp, so that a batch wants some thousand
// of them in flight: EncodeOptions::block_heads = 1 and run_layers = 1 make the most of a chunk.
//
// Encoding goes the same way: EncodePlan::make, encode_batch, then the report and the payloads are copied
// back, and plan.object(chunk, report, payload) is the chunk object, byte for byte what the CPU's
// ChunkEncoder writes, in all profiles. klt is a closed loop, a wave of launches per layer and plane:
// prediction from what the waves before reconstructed, forward transform in binary32 in the CPU's order of
// sums, gains, reconstruction.
//
// Nothing here allocates device memory, waits for the device, or keeps state; calls may come from any thread.
// All launches of a plan have fixed shapes, so that a call can be captured into a CUDA graph and replayed,
// on new bytes of the same plan. decode_batch asks the current device how much shared memory a block of
// threads may have: that decides between chains and waves for klt (kernels/cuda/launch.h), not the values.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "codec/device/analysis_image.h"
#include "codec/device/calibration_image.h"
#include "codec/device/decode_plan.h"
#include "codec/device/encode_plan.h"

namespace kvcast::device {

// Decodes every block of the plan and stores every plane. All pointers are device memory at multiples of
// kAlignment: `image` a copy of plan.image(); `workspace` plan.workspace_bytes() bytes, free again when the
// stream is past the call; `status` plan.blocks() words, each set to 0 or to faults (plan.block_status).
// Whatever bytes a block holds, nothing outside its own rows is written and nothing outside its bytes is
// read; rows of a faulty block are unspecified (klt: and those of the layers that DecodePlan::blocks
// names), rows of all others are right. Returns what the launches returned, which stays the thread's last
// error, too (cudaErrorInvalidValue, before any of them: a misaligned address); faults of the device itself
// come with the stream, as with any kernel. The first call loads kernels, unless CUDA_MODULE_LOADING is
// EAGER: make it before a capture.
cudaError_t decode_batch(const DecodePlan& plan, const void* image, void* workspace, std::uint32_t* status,
                         cudaStream_t stream);

// The same in parts, for a plan of one chunk whose bytes come piece by piece: decode_begin() once, then
// layers first to end - 1 as soon as their blocks are in the payload. In the klt profile layers come in
// order, each once, and `first` and `end` are multiples of the header's klt.run_layers, or all layers. Status
// words of layers that were left out stay as they are.
cudaError_t decode_begin(const DecodePlan& plan, const void* image, void* workspace, cudaStream_t stream);
cudaError_t decode_layers(const DecodePlan& plan, std::size_t first, std::size_t end, const void* image,
                          void* workspace, std::uint32_t* status, cudaStream_t stream);

// Encodes every chunk of the plan into its payload. `image` is a copy of plan.image(), `workspace`
// plan.workspace_bytes() bytes, `report` plan.report_bytes() bytes that plan.object() reads. Planes are read
// only. Blocks that a payload's capacity does not reach are left out; the report says how many bytes there
// would have been. All at multiples of kAlignment.
cudaError_t encode_batch(const EncodePlan& plan, const void* image, void* workspace, void* report,
                         cudaStream_t stream);

}  // namespace kvcast::device
