// Decoding, as the session sees it. The streamer knows the format but decodes nothing: whoever links the
// codec (or a GPU) implements this.
#pragma once

#include <cstddef>
#include <functional>
#include <span>
#include <vector>

#include "codec/format/chunk_header.h"

namespace kvcast::streamer {

// Rows of one plane of one layer: tokens x width elements of the layout's dtype, in memory that the codec
// owns and that may be on a device. Valid until the callback that it was given to returns.
struct DecodedPlane {
    const void* rows = nullptr;
    std::size_t row_bytes = 0;
};

using LayerCallback = std::function<void(std::size_t layer, std::span<const DecodedPlane> planes)>;

// A session calls decode() on one thread and all that is about calibrations on another, one call at a time on
// each. Sessions that share a codec must not overlap, from constructor to destructor, unless the
// implementation says that they may. What decode() or add_calibration() throws counts as an error that they
// return; what others throw ends the session.
class ChunkCodec {
  public:
    virtual ~ChunkCodec() = default;

    // Whether chunks that name this calibration can be decoded. May take its time: to read it, say.
    virtual bool has_calibration(const Hash& id) = 0;
    // A calibration file whose SHA-256 was checked. An error rules out the levels that need it.
    virtual Status add_calibration(std::span<const std::uint8_t> file) = 0;

    // Over a slow link a calibration takes longer than a session: the front of its file that a session has
    // brought when it ends, or goes on without it, is kept for the next one, which fetches the rest. Empty:
    // what was kept before was not the calibration's. A codec need not keep anything.
    virtual void keep_begun(const Hash& id, std::span<const std::uint8_t> front) { (void)id, (void)front; }
    // What was kept; empty: nothing.
    virtual std::vector<std::uint8_t> begun_calibration(const Hash& id) {
        (void)id;
        return {};
    }

    // Decodes a whole object, whose hash and header were checked, and hands over its layers in order. Nothing
    // is handed over unless all of it could be decoded.
    virtual Status decode(std::span<const std::uint8_t> object, const LayerCallback& deliver) = 0;
};

}  // namespace kvcast::streamer
