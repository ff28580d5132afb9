// The header and block index of a chunk object. FORMAT.md, section 3.
//
// A chunk object is header | blocks, blocks in layer order. The header alone says how long the object is, so
// that a file of several chunks is read front to back without a seek, and a single layer with one range
// request.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "codec/format/error.h"
#include "codec/format/layout.h"

namespace kvcast {

inline constexpr std::uint16_t kFormatVersion = 1;

enum class Profile : std::uint8_t { kLossless = 0, kDelta = 1, kKlt = 2 };

const char* profile_name(Profile profile);

// How a plane of one layer is coded.
enum class PlaneMode : std::uint8_t { kExact = 0, kQuantised = 1 };

// One 24-bit plane word of the index. Only `mode` has a meaning for exact planes.
struct PlaneParams {
    PlaneMode mode = PlaneMode::kExact;
    unsigned guard_bits = 0;  // the quantisation step is 2^guard_bits states
    kernels::Scale scale = {128, 0};

    friend bool operator==(const PlaneParams&, const PlaneParams&) = default;
};

enum class Predictor : std::uint8_t { kMean = 0, kAnchor = 1 };

// Parameters of the delta profile that the decoder needs.
struct DeltaParams {
    Predictor predictor = Predictor::kMean;
    std::size_t anchor_group = 10;  // tokens; an anchor and the tokens predicted from it
    unsigned anchor_shift = 3;      // anchors are quantised with step / 2^anchor_shift

    friend bool operator==(const DeltaParams&, const DeltaParams&) = default;
};

// Parameters of the klt profile that the decoder needs.
struct KltParams {
    std::size_t run_layers = 1;   // layers that share the coder's states
    std::size_t tail_tokens = 0;  // last tokens of the chunk that are coded at tail_level
    unsigned tail_level = 1;
    std::vector<std::uint32_t> exact_tokens;  // tokens that are stored exactly, ascending

    friend bool operator==(const KltParams&, const KltParams&) = default;
};

struct ChunkHeader {
    Profile profile = Profile::kLossless;
    unsigned level = 0;      // 0: lossless; 1..255: lossy, from finest to coarsest
    bool unrotated = false;  // plane 0 is coded before RoPE
    std::string model;       // whose KV this is
    std::optional<Hash> calibration;
    Layout layout;

    std::size_t tokens = 0;
    // Leading tokens that are coded exactly and row by row: attention sinks of delta chunks, and what would
    // be few of a channel. None in klt chunks: KltParams has a list.
    std::size_t exact_rows = 0;
    std::uint64_t first_token = 0;    // index of the chunk's first token in its context
    std::uint64_t base_position = 0;  // position of the context's token 0
    Hash chain = {};                  // identity of this chunk: see chain.h
    Hash parent = {};                 // of the chunk before it; zero for the first
    std::vector<std::int32_t> token_ids;

    DeltaParams delta;
    KltParams klt;
    std::size_t block_heads = 1;  // heads per block; a layer's heads are plane 0's, then plane 1's

    std::vector<PlaneParams> planes;         // [layer][plane]; not used by klt
    std::vector<std::uint32_t> block_bytes;  // [layer][block]
    std::vector<std::uint32_t> layer_crc;    // [layer]: CRC-32 of the layer's blocks

    std::size_t header_bytes = 0;  // set by read and write

    std::uint64_t position() const { return base_position + first_token; }
    std::size_t blocks_per_layer() const;
    std::uint64_t payload_bytes() const;
    std::uint64_t layer_payload_bytes(std::size_t layer) const;
};

struct ChunkLimits {
    static constexpr std::size_t kPrefixBytes = 12;
    static constexpr std::size_t kHeaderBytes = std::size_t{1} << 24;
    static constexpr std::size_t kTokens = 65535;
    static constexpr std::size_t kModelBytes = 255;
    static constexpr std::uint64_t kPosition = std::uint64_t{1} << 48;
    static constexpr std::size_t kBlockValues = std::size_t{1} << 26;
    static constexpr std::size_t kBlockBytes = 0xfffffffe;
};

// Coder states at the front of every block.
inline constexpr std::size_t kBlockStateBytes = 128;

// kLimitExceeded where blocks of so many heads may hold more values than kBlockValues.
Status check_block_values(const Layout& layout, std::size_t block_heads, std::size_t tokens);

// Least and greatest size of a block of a layer.
std::size_t min_block_bytes(const ChunkHeader& header, std::size_t layer);
std::size_t max_block_bytes(const ChunkHeader& header, std::size_t block);

// The header's length in bytes from the first kPrefixBytes bytes of an object (kTruncated, kBadMagic,
// kUnsupportedVersion, kLimitExceeded).
Result<std::size_t> header_length(std::span<const std::uint8_t> prefix);

// Parses and checks a whole header, checksum first. `bytes` starts at the object; what follows the header is
// ignored.
Result<ChunkHeader> read_header(std::span<const std::uint8_t> bytes);

// Serialises; header.header_bytes is not read. kBadArgument where the arrays do not fit the layout, else what
// read_header would say of the result.
Result<std::vector<std::uint8_t>> write_header(const ChunkHeader& header);

// CRC-32 (IEEE 802.3), the format's only checksum; of what follows bytes whose checksum is `before`.
std::uint32_t crc32(std::span<const std::uint8_t> bytes, std::uint32_t before = 0);

}  // namespace kvcast
