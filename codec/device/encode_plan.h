// What the device is to encode: the host's part of encode_batch (codec/device.h). Needs no CUDA.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "codec/device/analysis_image.h"
#include "codec/device/calibration_image.h"
#include "codec/device/plane.h"
#include "codec/encoder.h"
#include "kernels/cuda/encode_tasks.h"

namespace kvcast::device {

// One chunk of a batch.
struct ChunkToEncode {
    ChunkInput input;                     // `planes` is not used; read only while the plan is made
    std::span<const DevicePlane> planes;  // [layer][plane], elements of the layout's type
    // Device, at an even address: where the chunk's blocks go. EncodePlan::greatest_payload() is always
    // enough.
    void* payload = nullptr;
    std::size_t payload_capacity = 0;
};

// The calibration of klt chunks, EncodeOptions::calibration, on the device: both images, and their bytes() in
// device memory. The images are used while the plan is made.
struct KltOnDevice {
    const CalibrationImage* calibration = nullptr;
    const void* calibration_bytes = nullptr;
    const AnalysisImage* analysis = nullptr;
    const void* analysis_bytes = nullptr;
};

// A batch of chunks of one profile and level, ready to be encoded any number of times. Immutable; threads may
// share it.
class EncodePlan {
  public:
    // kBadArgument, kLimitExceeded as ChunkEncoder::encode says them, and for planes or payloads that are
    // misaligned; of klt chunks kMissingCalibration, kWrongCalibration (not the options').
    static Result<EncodePlan> make(std::span<const ChunkToEncode> chunks, const EncodeOptions& options,
                                   const KltOnDevice& klt = {});

    std::span<const std::byte> image() const { return image_; }
    std::size_t workspace_bytes() const { return workspace_bytes_; }

    // What the device reports, to be copied back to the host.
    std::size_t report_bytes() const { return report_bytes_; }

    // A chunk's identity: the parent of the chunk after it.
    const Hash& chain(std::size_t chunk) const { return chunks_[chunk].header.chain; }

    // Bytes of a chunk's blocks, from the report; they may exceed its capacity.
    std::uint64_t payload_bytes(std::size_t chunk, std::span<const std::byte> report) const;

    // The chunk object, from the report and the chunk's payload, both on the host: the bytes that
    // ChunkEncoder writes. kBufferTooSmall where the payload did not fit its capacity.
    Result<std::vector<std::uint8_t>> object(std::size_t chunk, std::span<const std::byte> report,
                                             std::span<const std::uint8_t> payload) const;

    // Bytes that the blocks of a chunk can have at most; make()'s errors.
    static Result<std::uint64_t> greatest_payload(const ChunkInput& input, const EncodeOptions& options);

    // Where the kernels' arguments are in the image and in the report, and how many.
    struct Launches {
        std::size_t tables = 0;
        std::size_t rotations = 0;
        std::uint32_t rotation_count = 0;
        std::size_t planes = 0;
        std::uint32_t plane_count = 0;
        std::uint32_t tiles = 0;
        std::uint32_t bands = 0;
        std::uint32_t heads = 0;
        std::uint32_t duo_runs = 0;
        std::uint32_t rows = 0;
        std::size_t blocks = 0;
        std::uint32_t block_count = 0;
        std::size_t packs = 0;
        std::uint32_t chunks = 0;
        std::uint32_t most_blocks = 0;
        std::size_t block_bytes = 0;  // in the report, after the choices

        // klt: blocks are runs of layers, and the report has the bytes of both.
        struct Wave {
            std::size_t projections = 0;
            std::size_t products = 0;  // by the inverse transforms
            std::size_t units = 0;
            std::uint32_t count = 0;
            std::uint32_t projection_tiles = 0;
            std::uint32_t product_tiles = 0;
            std::uint32_t tokens = 0;
        };
        std::vector<Wave> waves;
        std::size_t klt_chunks = 0;
        std::size_t klt_planes = 0;
        std::uint32_t klt_plane_count = 0;
        std::size_t runs = 0;
        std::size_t run_bytes = 0;  // in the report
    };
    const Launches& launches() const { return launches_; }

  private:
    class Builder;
    friend class KltPlanBuilder;

    struct Chunk {
        ChunkHeader header;  // all but what the report says
        std::size_t first_plane = 0;
        std::size_t first_block = 0;
        std::size_t capacity = 0;
        std::size_t exact_tokens = 0;  // klt, in the report: std::uint32_t, how many and which
    };

    void read_choices(const Chunk& chunk, std::span<const std::byte> report, ChunkHeader& header) const;

    std::vector<std::byte> image_;
    std::size_t workspace_bytes_ = 0;
    std::size_t report_bytes_ = 0;
    std::vector<Chunk> chunks_;
    Launches launches_;
};

}  // namespace kvcast::device
