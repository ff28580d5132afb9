#include "codec/format/chunk_header.h"

#include <fmt/format.h>
#include <libdeflate.h>

#include <algorithm>
#include <bit>
#include <cstring>

namespace kvcast {
namespace {

constexpr std::array<std::uint8_t, 4> kMagic = {0x89, 'K', 'V', 'C'};
constexpr int kExponentBias = 192;
constexpr unsigned kMaxGuardBits = 12;
constexpr std::uint64_t kFlagUnrotated = 1;
constexpr std::size_t kCrcBytes = 4;

Status bad(std::string message) {
    return {ErrorCode::kBadHeader, std::move(message)};
}

// ---- fields, in the order of FORMAT.md ----

std::uint32_t pack_plane(const PlaneParams& p) {
    if (p.mode == PlaneMode::kExact) return 0;
    return static_cast<std::uint32_t>(p.mode) | p.guard_bits << 3 |
           static_cast<std::uint32_t>(p.scale.mantissa) << 7 |
           static_cast<std::uint32_t>(p.scale.exponent + kExponentBias) << 15;
}

bool unpack_plane(std::uint32_t word, PlaneParams& p) {
    if (word == 0) return true;
    p.mode = static_cast<PlaneMode>(word & 7);
    p.guard_bits = word >> 3 & 15;
    p.scale.mantissa = static_cast<std::int32_t>(word >> 7 & 255);
    p.scale.exponent = static_cast<std::int32_t>(word >> 15) - kExponentBias;
    return p.mode == PlaneMode::kQuantised && p.guard_bits >= 2 && p.guard_bits <= kMaxGuardBits &&
           p.scale.mantissa >= 128 && p.scale.exponent >= kernels::kMinExponent &&
           p.scale.exponent <= kernels::kMaxExponent;
}

void write_ids(const std::vector<std::int32_t>& ids, ByteWriter& out) {
    std::uint32_t all = 0;
    for (const std::int32_t id : ids) all |= static_cast<std::uint32_t>(id);
    const auto bits = static_cast<unsigned>(std::bit_width(all));
    out.fixed(static_cast<std::uint8_t>(bits));
    std::uint64_t pending = 0;
    unsigned held = 0;
    for (const std::int32_t id : ids) {
        pending |= std::uint64_t{static_cast<std::uint32_t>(id)} << held;
        for (held += bits; held >= 8; held -= 8, pending >>= 8) out.fixed(static_cast<std::uint8_t>(pending));
    }
    if (held > 0) out.fixed(static_cast<std::uint8_t>(pending));
}

bool read_ids(ByteReader& in, std::size_t count, std::vector<std::int32_t>& ids) {
    const auto bits = in.fixed<std::uint8_t>();
    if (bits > 32) return false;
    const auto packed = in.take((count * bits + 7) / 8);
    if (!in.ok()) return false;
    ids.resize(count);
    std::uint64_t pending = 0;
    unsigned held = 0;
    std::size_t at = 0;
    for (std::int32_t& id : ids) {
        for (; held < bits; held += 8) pending |= std::uint64_t{packed[at++]} << held;
        id = static_cast<std::int32_t>(pending & ((std::uint64_t{1} << bits) - 1));
        pending >>= bits;
        held -= bits;
    }
    return pending == 0;
}

// Each exact token by how many tokens it lies after the one before it.
void write_klt(const KltParams& klt, ByteWriter& p) {
    p.varint(klt.run_layers);
    p.varint(klt.tail_tokens);
    p.fixed(static_cast<std::uint8_t>(klt.tail_level));
    p.varint(klt.exact_tokens.size());
    std::uint32_t next = 0;
    for (const std::uint32_t t : klt.exact_tokens) {
        p.varint(t - next);
        next = t + 1;
    }
}

Status read_klt(ByteReader& p, ChunkHeader& h) {
    KltParams& klt = h.klt;
    klt.run_layers = p.varint();
    klt.tail_tokens = p.varint();
    klt.tail_level = p.fixed<std::uint8_t>();
    const std::uint64_t exact = p.varint();
    if (!p.ok() || exact > h.tokens || exact > p.left())
        return bad("the profile's parameters have the wrong length");
    std::uint64_t next = 0;
    for (std::uint64_t i = 0; i < exact && next <= h.tokens; ++i) {
        const std::uint64_t gap = p.varint();
        next = gap >= h.tokens ? h.tokens + 1 : next + gap + 1;
        klt.exact_tokens.push_back(static_cast<std::uint32_t>(next - 1));
    }
    if (next > h.tokens) return bad("an exact token lies outside the chunk");
    if (klt.run_layers == 0 || klt.run_layers > h.layout.layers)
        return bad(fmt::format("runs of {} layers in {}", klt.run_layers, h.layout.layers));
    if (klt.tail_tokens > h.tokens || klt.tail_level == 0)
        return bad(fmt::format("{} last tokens at level {}", klt.tail_tokens, klt.tail_level));
    return {};
}

void write_params(const ChunkHeader& h, ByteWriter& out) {
    std::vector<std::uint8_t> params;
    ByteWriter p(params);
    if (h.profile == Profile::kLossless && h.exact_rows > 0) p.varint(h.exact_rows);
    if (h.profile == Profile::kDelta) {
        p.fixed(static_cast<std::uint8_t>(h.delta.predictor));
        p.varint(h.delta.anchor_group);
        p.varint(h.delta.anchor_shift);
        p.varint(h.exact_rows);
    }
    if (h.profile == Profile::kKlt) write_klt(h.klt, p);
    out.varint(params.size());
    out.bytes(params);
}

Status check_delta(const ChunkHeader& h) {
    const DeltaParams& d = h.delta;
    if (d.predictor > Predictor::kAnchor)
        return bad(fmt::format("predictor {} is not defined", int(d.predictor)));
    if (d.anchor_group < 2 || d.anchor_group > 256)
        return bad(fmt::format("anchor group of {}, 2 to 256 allowed", d.anchor_group));
    if (d.anchor_shift > 7) return bad(fmt::format("anchor shift of {}, at most 7 allowed", d.anchor_shift));
    return {};
}

Status read_params(ByteReader& in, ChunkHeader& h) {
    const std::uint64_t length = in.varint();
    if (length > in.left()) return bad("the profile's parameters are cut short");
    ByteReader p(in.take(length));
    if (h.profile == Profile::kLossless && length > 0) {
        h.exact_rows = p.varint();
        if (h.exact_rows == 0) return bad("a count of no exact rows, which is left out");
    }
    if (h.profile == Profile::kDelta) {
        h.delta.predictor = static_cast<Predictor>(p.fixed<std::uint8_t>());
        h.delta.anchor_group = p.varint();
        h.delta.anchor_shift = static_cast<unsigned>(std::min<std::uint64_t>(p.varint(), 255));
        h.exact_rows = p.varint();
        if (Status s = check_delta(h); !s.ok()) return s;
    }
    if (h.profile == Profile::kKlt) {
        if (Status s = read_klt(p, h); !s.ok()) return s;
    }
    if (!p.ok() || p.left() != 0) return bad("the profile's parameters have the wrong length");
    if (h.exact_rows > h.tokens)
        return bad(fmt::format("{} exact rows in a chunk of {} tokens", h.exact_rows, h.tokens));
    return {};
}

// How many plane words a layer has in the index.
std::size_t plane_words(const ChunkHeader& h) {
    return h.profile == Profile::kKlt ? 0 : h.layout.planes.size();
}

void write_index(const ChunkHeader& h, ByteWriter& out) {
    const std::size_t planes = plane_words(h);
    const std::size_t blocks = h.blocks_per_layer();
    for (std::size_t l = 0; l < h.layout.layers; ++l) {
        for (std::size_t p = 0; p < planes; ++p) out.u24(pack_plane(h.planes[l * planes + p]));
        for (std::size_t b = 0; b < blocks; ++b) out.varint(h.block_bytes[l * blocks + b] / 2);
        out.fixed(h.layer_crc[l]);
    }
}

Status check_plane_params(const ChunkHeader& h, const PlaneParams& p) {
    if (p.mode == PlaneMode::kExact) return {};
    if (h.profile == Profile::kLossless) return bad("a lossless chunk has a quantised plane");
    if (h.delta.predictor == Predictor::kAnchor && p.guard_bits < h.delta.anchor_shift) {
        return bad(fmt::format("{} guard bits do not carry anchors of step / 2^{}", p.guard_bits,
                               h.delta.anchor_shift));
    }
    return {};
}

Status read_index(ByteReader& in, ChunkHeader& h) {
    const std::size_t layers = h.layout.layers;
    const std::size_t planes = plane_words(h);
    const std::size_t blocks = h.blocks_per_layer();
    const std::size_t least = layers * (3 * planes + blocks + 4);
    if (in.left() < least)
        return bad(
            fmt::format("an index of {} layers needs {} bytes, {} are there", layers, least, in.left()));
    for (std::size_t l = 0; l < layers; ++l) {
        for (std::size_t p = 0; p < planes; ++p) {
            PlaneParams params;
            if (!unpack_plane(in.u24(), params))
                return bad(fmt::format("plane word {} of layer {} is not valid", p, l));
            if (Status s = check_plane_params(h, params); !s.ok()) return s;
            h.planes.push_back(params);
        }
        for (std::size_t b = 0; b < blocks; ++b) {
            const std::uint64_t half = in.varint();
            const std::size_t most = max_block_bytes(h, b);
            const std::size_t fewest = min_block_bytes(h, l);
            if (half > most / 2 || half * 2 < fewest) {
                return bad(fmt::format("block {} of layer {} claims {} bytes, {} to {} are possible", b, l,
                                       half * 2, fewest, most));
            }
            h.block_bytes.push_back(static_cast<std::uint32_t>(half * 2));
        }
        h.layer_crc.push_back(in.fixed<std::uint32_t>());
    }
    return in.ok() ? Status() : bad("the block index is cut short");
}

void write_hash(const Hash& hash, ByteWriter& out) {
    out.bytes(hash);
}

void read_hash(ByteReader& in, Hash& hash) {
    const auto bytes = in.take(hash.size());
    if (!bytes.empty()) std::memcpy(hash.data(), bytes.data(), hash.size());
}

Status read_identity(ByteReader& in, ChunkHeader& h) {
    const auto profile = in.fixed<std::uint8_t>();
    if (profile > static_cast<std::uint8_t>(Profile::kKlt)) {
        return {ErrorCode::kUnsupportedProfile,
                fmt::format("profile {} is not one of lossless (0), delta (1) and klt (2)", profile)};
    }
    h.level = in.fixed<std::uint8_t>();
    const std::uint64_t flags = in.varint();
    const auto model_bytes = in.fixed<std::uint8_t>();
    const auto model = in.take(model_bytes);
    h.model.assign(model.begin(), model.end());
    const auto calibration_bytes = in.fixed<std::uint8_t>();
    if (calibration_bytes != 0) read_hash(in, h.calibration.emplace());
    if (!in.ok()) return bad("the header is cut short");
    h.profile = static_cast<Profile>(profile);
    if (flags > kFlagUnrotated) return bad(fmt::format("flags {:#x} are not defined", flags));
    h.unrotated = flags == kFlagUnrotated;
    if (calibration_bytes != 0 && calibration_bytes != sizeof(Hash))
        return bad(fmt::format("a calibration id of {} bytes", calibration_bytes));
    return {};
}

Status read_range(ByteReader& in, ChunkHeader& h) {
    h.tokens = in.varint();
    h.first_token = in.varint();
    h.base_position = in.varint();
    read_hash(in, h.chain);
    read_hash(in, h.parent);
    if (!in.ok()) return bad("the header is cut short");
    if (h.tokens == 0) return bad("a chunk needs at least one token");
    if (h.tokens > ChunkLimits::kTokens || h.first_token > ChunkLimits::kPosition ||
        h.base_position > ChunkLimits::kPosition) {
        return {ErrorCode::kLimitExceeded, fmt::format("{} tokens from {} at position {} exceed the limits",
                                                       h.tokens, h.first_token, h.base_position)};
    }
    return read_ids(in, h.tokens, h.token_ids) ? Status() : bad("the token ids are not valid");
}

// What a header must satisfy beyond the validity of each field.
Status check_header(const ChunkHeader& h) {
    if ((h.profile == Profile::kLossless) != (h.level == 0)) {
        return bad(fmt::format("level {} is not one of profile {}", h.level, profile_name(h.profile)));
    }
    if (h.unrotated && h.layout.rope.pairing == RopePairing::kNone)
        return bad("un-rotated, but the layout has no RoPE");
    if (h.unrotated && h.profile == Profile::kLossless) return bad("a lossless chunk is never un-rotated");
    const bool klt = h.profile == Profile::kKlt;
    if (klt != h.calibration.has_value())
        return bad(klt ? "the header names no calibration" : "a calibration, but not profile klt");
    const std::size_t heads = h.layout.heads_per_layer();
    if (klt && h.block_heads != heads) return bad("a layer of profile klt is one block");
    if (klt && h.unrotated != (h.layout.rope.pairing != RopePairing::kNone))
        return bad("profile klt is un-rotated wherever there is RoPE");
    if (h.block_heads == 0 || h.block_heads > heads) {
        return bad(fmt::format("{} heads per block in layers of {} heads", h.block_heads, heads));
    }
    return check_block_values(h.layout, h.block_heads, h.tokens);
}

Status check_for_writing(const ChunkHeader& h) {
    if (Status s = check_layout(h.layout); !s.ok()) return s;
    const std::size_t layers = h.layout.layers;
    const bool sizes_fit = h.token_ids.size() == h.tokens && h.planes.size() == layers * plane_words(h) &&
                           h.block_bytes.size() == layers * h.blocks_per_layer() &&
                           h.layer_crc.size() == layers;
    if (!sizes_fit)
        return {ErrorCode::kBadArgument, "the header's arrays do not fit its layout and token count"};
    if (h.model.size() > ChunkLimits::kModelBytes) {
        return {ErrorCode::kBadArgument, fmt::format("a model id of {} bytes, at most {} allowed",
                                                     h.model.size(), ChunkLimits::kModelBytes)};
    }
    return check_header(h);
}

}  // namespace

const char* profile_name(Profile profile) {
    switch (profile) {
        case Profile::kLossless:
            return "lossless";
        case Profile::kDelta:
            return "delta";
        case Profile::kKlt:
            return "klt";
    }
    return "unknown";
}

std::size_t ChunkHeader::blocks_per_layer() const {
    return (layout.heads_per_layer() + block_heads - 1) / block_heads;
}

std::uint64_t ChunkHeader::payload_bytes() const {
    std::uint64_t sum = 0;
    for (const std::uint32_t b : block_bytes) sum += b;
    return sum;
}

std::uint64_t ChunkHeader::layer_payload_bytes(std::size_t layer) const {
    const std::size_t blocks = blocks_per_layer();
    std::uint64_t sum = 0;
    for (std::size_t b = 0; b < blocks; ++b) sum += block_bytes[layer * blocks + b];
    return sum;
}

Status check_block_values(const Layout& layout, std::size_t block_heads, std::size_t tokens) {
    std::size_t widest = 0;
    for (const PlaneShape& p : layout.planes) widest = std::max(widest, p.head_dim);
    if (block_heads * widest * tokens <= ChunkLimits::kBlockValues) return {};
    return {ErrorCode::kLimitExceeded,
            fmt::format("blocks of {} heads x {} channels x {} tokens exceed {} values", block_heads, widest,
                        tokens, ChunkLimits::kBlockValues)};
}

std::size_t min_block_bytes(const ChunkHeader& h, std::size_t layer) {
    const bool goes_on = h.profile == Profile::kKlt && layer % h.klt.run_layers != 0;
    return goes_on ? 0 : kBlockStateBytes;
}

std::size_t max_block_bytes(const ChunkHeader& h, std::size_t block) {
    // A value costs at most a refill word, an escape word and 24 raw bits; side vectors cost at most six
    // values a channel; 64 bytes a token cover the word of an exact row and the rounding of its raw planes.
    std::size_t bytes = kBlockStateBytes;
    const std::size_t first = block * h.block_heads;
    const std::size_t k_heads = h.layout.planes[0].heads;
    for (std::size_t head = first; head < std::min(first + h.block_heads, h.layout.heads_per_layer());
         ++head) {
        const std::size_t dim = h.layout.planes[head < k_heads ? 0 : 1].head_dim;
        bytes += (h.tokens + 64) * dim * 8 + h.tokens * 64 + 64;
    }
    return std::min(bytes, ChunkLimits::kBlockBytes);
}

Result<std::size_t> header_length(std::span<const std::uint8_t> prefix) {
    ByteReader in(prefix);
    const auto magic = in.take(kMagic.size());
    if (!in.ok() || !std::equal(magic.begin(), magic.end(), kMagic.begin())) {
        const bool cut =
            prefix.size() < kMagic.size() && std::equal(prefix.begin(), prefix.end(), kMagic.begin());
        if (cut)
            return Status(ErrorCode::kTruncated, fmt::format("a chunk needs {} bytes or more, {} are there",
                                                             ChunkLimits::kPrefixBytes, prefix.size()));
        return Status(ErrorCode::kBadMagic, "not a kvcast chunk: it does not start with 89 4b 56 43");
    }
    const auto version = in.fixed<std::uint16_t>();
    const auto reserved = in.fixed<std::uint16_t>();
    const auto length = in.fixed<std::uint32_t>();
    if (!in.ok())
        return Status(ErrorCode::kTruncated, fmt::format("a chunk needs {} bytes or more, {} are there",
                                                         ChunkLimits::kPrefixBytes, prefix.size()));
    if (version != kFormatVersion || reserved != 0) {
        return Status(ErrorCode::kUnsupportedVersion,
                      fmt::format("format version {}.{}, this reader knows version {}.0", version, reserved,
                                  kFormatVersion));
    }
    if (length < ChunkLimits::kPrefixBytes + kCrcBytes || length > ChunkLimits::kHeaderBytes) {
        return Status(ErrorCode::kLimitExceeded,
                      fmt::format("a header of {} bytes, {} to {} are possible", length,
                                  ChunkLimits::kPrefixBytes + kCrcBytes, ChunkLimits::kHeaderBytes));
    }
    return std::size_t{length};
}

Result<ChunkHeader> read_header(std::span<const std::uint8_t> bytes) {
    const Result<std::size_t> length = header_length(bytes);
    if (!length.ok()) return length.status();
    if (bytes.size() < length.value()) {
        return Status(ErrorCode::kTruncated,
                      fmt::format("a header of {} bytes, {} are there", length.value(), bytes.size()));
    }
    const auto body = bytes.first(length.value() - kCrcBytes);
    ByteReader trailer(bytes.subspan(body.size(), kCrcBytes));
    if (trailer.fixed<std::uint32_t>() != crc32(body)) {
        return Status(ErrorCode::kHeaderChecksum, "the header's checksum does not match its bytes");
    }
    ByteReader in(body.subspan(ChunkLimits::kPrefixBytes));
    ChunkHeader h;
    h.header_bytes = length.value();
    if (Status s = read_identity(in, h); !s.ok()) return s;
    Result<Layout> layout = read_layout(in);
    if (!layout.ok()) return layout.status();
    h.layout = std::move(layout.value());
    if (Status s = read_range(in, h); !s.ok()) return s;
    if (Status s = read_params(in, h); !s.ok()) return s;
    h.block_heads = in.varint();
    if (Status s = check_header(h); !s.ok()) return s;
    if (Status s = read_index(in, h); !s.ok()) return s;
    if (in.left() != 0) return bad(fmt::format("{} bytes after the block index", in.left()));
    return h;
}

Result<std::vector<std::uint8_t>> write_header(const ChunkHeader& h) {
    if (Status s = check_for_writing(h); !s.ok()) return s;
    std::vector<std::uint8_t> bytes;
    ByteWriter out(bytes);
    out.bytes(kMagic);
    out.fixed(kFormatVersion);
    out.fixed(std::uint16_t{0});
    out.fixed(std::uint32_t{0});  // the length, below
    out.fixed(static_cast<std::uint8_t>(h.profile));
    out.fixed(static_cast<std::uint8_t>(h.level));
    out.varint(h.unrotated ? kFlagUnrotated : 0);
    out.fixed(static_cast<std::uint8_t>(h.model.size()));
    out.bytes({reinterpret_cast<const std::uint8_t*>(h.model.data()), h.model.size()});
    out.fixed(static_cast<std::uint8_t>(h.calibration ? h.calibration->size() : 0));
    if (h.calibration) write_hash(*h.calibration, out);
    write_layout(h.layout, out);
    out.varint(h.tokens);
    out.varint(h.first_token);
    out.varint(h.base_position);
    write_hash(h.chain, out);
    write_hash(h.parent, out);
    write_ids(h.token_ids, out);
    write_params(h, out);
    out.varint(h.block_heads);
    write_index(h, out);
    const auto length = static_cast<std::uint32_t>(bytes.size() + kCrcBytes);
    if (length > ChunkLimits::kHeaderBytes)
        return Status(ErrorCode::kLimitExceeded, "the header grows past 16 MiB");
    std::memcpy(bytes.data() + 8, &length, sizeof(length));
    out.fixed(crc32(bytes));
    // What a reader would refuse is not written: the reader's rules are the only copy of the limits.
    if (const Result<ChunkHeader> back = read_header(bytes); !back.ok()) return back.status();
    return bytes;
}

std::uint32_t crc32(std::span<const std::uint8_t> bytes, std::uint32_t before) {
    return libdeflate_crc32(before, bytes.data(), bytes.size());
}

}  // namespace kvcast
