// What the device is to decode: the host's part of decode_batch (codec/device.h). Needs no CUDA.
//
// The host parses headers and block indices with the codec's own reader, and a plan turns them into one image
// of plain tasks (kernels/cuda/tasks.h). Everything that a header can get wrong is found here; what a block
// can get wrong, the device finds.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "codec/device/plane.h"
#include "codec/format/chunk_header.h"
#include "codec/format/error.h"
#include "kernels/cuda/tasks.h"

namespace kvcast::device {

class CalibrationImage;

// One chunk object of a batch.
struct ChunkSource {
    const ChunkHeader* header = nullptr;  // read only while the plan is made
    // Device: the object's bytes from the end of its header on, at an even address. Checksums are the
    // caller's (ChunkDecoder::verify_layer, before the bytes are copied).
    const void* payload = nullptr;
    std::size_t payload_bytes = 0;
    std::span<const DevicePlane> planes;                        // [layer][plane]
    std::optional<Dtype> dtype = std::nullopt;                  // default: the layout's
    std::optional<std::uint64_t> base_position = std::nullopt;  // default: the chunk's; re-bases K by RoPE
    // klt: the chunk's calibration (used while the plan is made), and its bytes() on the device.
    const CalibrationImage* calibration = nullptr;
    const void* calibration_bytes = nullptr;
};

// A batch of chunks, ready to be decoded any number of times. Immutable; threads may share it.
class DecodePlan {
  public:
    // kBadArgument (planes that do not fit the layout, misaligned addresses, a chunk without RoPE moved),
    // kTruncated (payload_bytes are fewer than the header promises), kLimitExceeded; of klt chunks
    // kMissingCalibration, kWrongCalibration, kBadHeader.
    static Result<DecodePlan> make(std::span<const ChunkSource> chunks);

    // To be copied to the device; it holds the device addresses that the sources name.
    std::span<const std::byte> image() const { return image_; }

    std::size_t workspace_bytes() const { return workspace_bytes_; }

    // Status words: one per block, chunk by chunk, layer by layer. In the klt profile layers are predicted
    // from each other and share coder states: of a chunk with a faulty block, only layers of runs
    // (ChunkHeader::klt) before that block's are right.
    std::size_t blocks() const { return blocks_.size(); }

    struct Block {
        std::uint32_t chunk;
        std::uint32_t layer;
        std::uint32_t block;  // of the layer
    };
    Block block(std::size_t index) const { return blocks_[index]; }

    // kOk, or kCorruptBlock for a block's status word, with the sentence that a CPU decoder has for it.
    Status block_status(std::size_t index, std::uint32_t word) const;

    // The first failure of a batch; `words` has one entry per block.
    Status batch_status(std::span<const std::uint32_t> words) const;

    // Where the kernels' arguments are in the image, and how many.
    struct Array {
        std::size_t offset = 0;
        std::uint32_t count = 0;
    };
    // Units whose sources have all been made by the waves before.
    struct Wave {
        Array units;
        std::uint32_t tiles = 0;
    };
    struct Launches {
        Array tables;
        Array rotations;
        Array planes;
        Array blocks;
        bool any_direct = false;  // of the blocks
        bool any_indirect = false;
        std::uint32_t most_channels = 1;
        Array klt_planes;
        Array klt_pieces;
        Array klt_runs;
        std::vector<Wave> waves;
        // Instead of all waves, where all klt chunks of the batch fit: see kernels/cuda/chain.cu.
        Array chains;
        std::array<Array, kernels::cuda::kMostHeight> chain_tiles;  // for each height
        Array chained_units;
        std::size_t chain_bytes = 0;  // of shared memory, for a height of 1
        Array stores;
        Array tiles;  // of the stores
    };
    // How many of each there are before a layer of a plan of one chunk.
    struct Mark {
        std::uint32_t blocks = 0;
        std::uint32_t klt_runs = 0;
        std::uint32_t waves = 0;
        std::uint32_t tiles = 0;
    };
    // [layer], and the end; empty unless the plan is of one chunk.
    const std::vector<Mark>& marks() const { return marks_; }
    Mark end() const;
    const Launches& launches() const { return launches_; }

  private:
    friend class PlanBuilder;

    std::vector<std::byte> image_;
    std::size_t workspace_bytes_ = 0;
    std::vector<Block> blocks_;
    std::vector<Mark> marks_;
    Launches launches_;
};

}  // namespace kvcast::device
