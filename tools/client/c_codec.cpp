// The C interface: errors, layouts and the codec.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <optional>

#include "codec/decoder.h"
#include "codec/klt/calibration.h"
#include "tools/client/c_boundary.h"
#include "tools/client/publication.h"

namespace kvcast::client {
namespace {

constexpr std::size_t kMessageBytes = 1024;
thread_local char last_message[kMessageBytes] = "";

static_assert(KVCAST_TRUNCATED == static_cast<int>(ErrorCode::kTruncated));
static_assert(KVCAST_LIMIT_EXCEEDED == static_cast<int>(ErrorCode::kLimitExceeded));
static_assert(KVCAST_CORRUPT_BLOCK == static_cast<int>(ErrorCode::kCorruptBlock));
static_assert(KVCAST_BUFFER_TOO_SMALL == static_cast<int>(ErrorCode::kBufferTooSmall));
static_assert(KVCAST_DEVICE == static_cast<int>(ErrorCode::kDevice));
static_assert(KVCAST_FP32 == static_cast<int>(Dtype::kF32));
static_assert(KVCAST_INTERLEAVED == static_cast<int>(RopePairing::kInterleaved));

Status read_rope(const kvcast_layout& given, Rope& rope) {
    if (given.rope_pairing > KVCAST_INTERLEAVED)
        return bad_argument(fmt::format("pairing {} is not defined", given.rope_pairing));
    rope.pairing = static_cast<RopePairing>(given.rope_pairing);
    if (rope.pairing == RopePairing::kNone) return {};
    rope.offset = given.rope_offset;
    rope.dim = given.rope_dim;
    if (rope.dim > LayoutLimits::kHeadDim || rope.dim % 2 != 0)
        return bad_argument(fmt::format("{} rotated channels", rope.dim));
    if (given.rope_theta != 0 && given.rope_frequencies != nullptr)
        return bad_argument("rope_theta and rope_frequencies given, of which one says all");
    if (given.rope_theta != 0) {
        if (!std::isfinite(given.rope_theta) || given.rope_theta <= 1)
            return bad_argument(fmt::format("rope_theta is {}", given.rope_theta));
        rope.frequencies = geometric_frequencies(given.rope_theta, rope.dim);
        return {};
    }
    if (given.rope_frequencies == nullptr)
        return bad_argument("neither rope_theta nor rope_frequencies given");
    for (const double radians : std::span(given.rope_frequencies, rope.dim / 2)) {
        if (!(std::abs(radians) < 0x1p62)) return bad_argument(fmt::format("a frequency of {}", radians));
        rope.frequencies.push_back(frequency_from_radians(radians));
    }
    return {};
}

kvcast_layout described(const Layout& layout) {
    kvcast_layout out = {};
    out.layers = static_cast<std::uint32_t>(layout.layers);
    out.planes = static_cast<std::uint32_t>(layout.planes.size());
    for (std::size_t p = 0; p < layout.planes.size(); ++p) {
        out.heads[p] = static_cast<std::uint32_t>(layout.planes[p].heads);
        out.head_dim[p] = static_cast<std::uint32_t>(layout.planes[p].head_dim);
    }
    out.dtype = static_cast<std::uint32_t>(layout.dtype);
    out.rope_pairing = static_cast<std::uint32_t>(layout.rope.pairing);
    out.rope_offset = static_cast<std::uint32_t>(layout.rope.offset);
    out.rope_dim = static_cast<std::uint32_t>(layout.rope.dim);
    if (layout.rope.pairing != RopePairing::kNone) out.rope_theta = geometric_theta(layout.rope.frequencies);
    return out;
}

// Rows [layer][plane] of a layout as the library takes them, or `code` and which of them do not hold its
// planes.
template <typename Out, typename Given>
Result<std::vector<Out>> rows_that_hold(const Given* given, const Layout& layout, ErrorCode code,
                                        const char* name) {
    std::vector<Out> out;
    for (std::size_t i = 0; i < layout.layers * layout.planes.size(); ++i) {
        const std::size_t row = layout.row_bytes(i);
        const std::size_t there = given[i].rows != nullptr ? given[i].row_bytes : 0;
        if (there < row)
            return Status(code, fmt::format("{} {}: rows of {} bytes, {} are needed", name, i, there, row));
        out.push_back({given[i].rows, given[i].row_bytes});
    }
    return out;
}

// Buffers [layer][plane] that hold a chunk.
Result<std::vector<PlaneBuffer>> buffers_of(std::span<const kvcast_buffer> given, std::size_t tokens,
                                            const ChunkHeader& h) {
    const std::size_t planes = h.layout.layers * h.layout.planes.size();
    if (given.size() != planes)
        return Status(ErrorCode::kBufferTooSmall,
                      fmt::format("{} buffers, the chunk has {} planes", given.size(), planes));
    if (tokens < h.tokens)
        return Status(ErrorCode::kBufferTooSmall,
                      fmt::format("room for {} tokens, the chunk has {}", tokens, h.tokens));
    return rows_that_hold<PlaneBuffer>(given.data(), h.layout, ErrorCode::kBufferTooSmall, "buffer");
}

}  // namespace

int told(int code, const char* message) noexcept {
    std::size_t length = std::min(std::strlen(message), kMessageBytes - 1);
    while (length > 0 && (static_cast<unsigned char>(message[length]) & 0xc0) == 0x80)
        --length;  // whole characters
    std::memcpy(last_message, message, length);
    last_message[length] = '\0';
    return code;
}

Result<Layout> layout_of(const kvcast_layout* given) {
    if (given == nullptr) return bad_argument("no layout given");
    if (given->planes < 1 || given->planes > LayoutLimits::kPlanes)
        return bad_argument(fmt::format("{} planes, 1 or 2 are possible", given->planes));
    if (given->dtype > KVCAST_FP32) return bad_argument(fmt::format("dtype {} is not defined", given->dtype));
    Layout out;
    out.layers = given->layers;
    for (std::size_t p = 0; p < given->planes; ++p)
        out.planes.push_back({given->heads[p], given->head_dim[p]});
    out.dtype = static_cast<Dtype>(given->dtype);
    if (Status s = read_rope(*given, out.rope); !s.ok()) return s;
    if (Status s = check_layout(out); !s.ok()) return s;
    return out;
}

Result<std::vector<PlaneRows>> rows_of(const kvcast_rows* given, const Layout& layout) {
    if (given == nullptr) return bad_argument("no planes given");
    return rows_that_hold<PlaneRows>(given, layout, ErrorCode::kBadArgument, "plane");
}

}  // namespace kvcast::client

using namespace kvcast;
using namespace kvcast::client;

struct kvcast_codec {
    explicit kvcast_codec(std::size_t threads) : pool(threads), workspaces(pool.workers()) {}

    // The encoder of a level, which keeps its buffers.
    Result<ChunkEncoder*> encoder(unsigned level) {
        const unsigned last = last_level(calibration.get());
        if (level > last) return bad_argument(fmt::format("level {}, there are 0 to {}", level, last));
        const auto known = encoders.find(level);
        if (known != encoders.end()) return &known->second;
        return &encoders.try_emplace(level, level_options(level, calibration)).first->second;
    }

    ThreadPool pool;
    std::vector<DecodeWorkspace> workspaces;
    std::shared_ptr<const Calibration> calibration;
    std::map<unsigned, ChunkEncoder> encoders;
    std::vector<std::uint8_t> object;
};

extern "C" {

const char* kvcast_version(void) {
    return KVCAST_VERSION;
}

const char* kvcast_code_name(int code) {
    if (code == KVCAST_PENDING) return "pending";
    return code < 0 || code > 0xffff ? "unknown" : error_name(static_cast<ErrorCode>(code));
}

const char* kvcast_message(void) {
    return last_message;
}

int kvcast_codec_open(size_t threads, const void* calibration, size_t calibration_bytes,
                      kvcast_codec** codec) {
    return guarded([&]() -> Status {
        if (codec == nullptr) return bad_argument("no place for the codec given");
        *codec = nullptr;
        if (Status s = check_threads(threads); !s.ok()) return s;
        if (Status s =
                check_list(static_cast<const char*>(calibration), calibration_bytes, "bytes of calibration");
            !s.ok())
            return s;
        auto made = std::make_unique<kvcast_codec>(threads_or_all(threads));
        if (calibration != nullptr) {
            auto read = Calibration::read(octets_of(calibration, calibration_bytes), made->pool);
            if (!read.ok()) return read.status();
            made->calibration = std::move(read.value());
        }
        *codec = made.release();
        return {};
    });
}

void kvcast_codec_close(kvcast_codec* codec) {
    delete codec;
}

int kvcast_encode(kvcast_codec* codec, const kvcast_chunk* chunk, uint32_t level, const void** object,
                  size_t* object_bytes, uint8_t chain[32]) {
    return guarded([&]() -> Status {
        if (codec == nullptr || object == nullptr || object_bytes == nullptr || chain == nullptr)
            return bad_argument("no codec, or no place for the object, its size or its chain given");
        if (Status s = check_struct(chunk, "chunk"); !s.ok()) return s;
        const Result<Layout> layout = layout_of(chunk->layout);
        if (!layout.ok()) return layout.status();
        const auto planes = rows_of(chunk->planes, layout.value());
        if (!planes.ok()) return planes.status();
        if (text_or_none(chunk->model).empty()) return bad_argument("no model given");
        const Result<ChunkEncoder*> encoder = codec->encoder(level);
        if (!encoder.ok()) return encoder.status();
        const std::string model = chunk->model, salt = text_or_none(chunk->salt);
        ChunkInput input = {&layout.value(),
                            model,
                            salt,
                            span_of(chunk->token_ids, chunk->tokens),
                            chunk->first_token,
                            chunk->base_position,
                            {},
                            planes.value(),
                            0};
        std::copy_n(chunk->parent, input.parent.size(), input.parent.begin());
        Hash identity = {};
        if (Status s = encoder.value()->encode(input, codec->pool, codec->object, identity); !s.ok())
            return s;
        std::ranges::copy(identity, chain);
        *object = codec->object.data();
        *object_bytes = codec->object.size();
        return {};
    });
}

int kvcast_inspect(const void* object, size_t bytes, kvcast_chunk_info* info) {
    return guarded([&]() -> Status {
        if (Status s = check_struct(info, "chunk_info"); !s.ok()) return s;
        const Result<ChunkHeader> read = read_header(octets_of(object, bytes));
        if (!read.ok()) return read.status();
        const ChunkHeader& h = read.value();
        *info = {};
        info->struct_bytes = sizeof *info;
        info->object_bytes = h.header_bytes + h.payload_bytes();
        info->first_token = h.first_token;
        info->base_position = h.base_position;
        info->tokens = static_cast<std::uint32_t>(h.tokens);
        info->level = h.level;
        info->layout = described(h.layout);
        std::ranges::copy(h.chain, info->chain);
        std::ranges::copy(h.parent, info->parent);
        if (h.calibration) std::ranges::copy(*h.calibration, info->calibration);
        static_assert(sizeof info->model > ChunkLimits::kModelBytes);
        std::ranges::copy(h.model, info->model);
        return {};
    });
}

int kvcast_decode(kvcast_codec* codec, const void* object, size_t bytes, size_t tokens,
                  const kvcast_buffer* buffers, size_t buffer_count) {
    return guarded([&]() -> Status {
        if (codec == nullptr) return bad_argument("no codec given");
        const auto decoder =
            ChunkDecoder::open(octets_of(object, bytes), {.calibration = codec->calibration});
        if (!decoder.ok()) return decoder.status();
        const auto planes = buffers_of(span_of(buffers, buffer_count), tokens, decoder.value().header());
        if (!planes.ok()) return planes.status();
        return decoder.value().decode(planes.value(), codec->pool, codec->workspaces);
    });
}

}  // extern "C"
