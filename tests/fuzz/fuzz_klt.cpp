// Any calibration is either refused or harmless, whatever chunk is decoded with it. Input: u32 length of the
// calibration, the calibration, u8 count of changes, changes, a chunk. Lengths, ids and checksums are
// repaired first, so that mutations reach the rules behind them. A mutation within a block breaks it nearly
// always: what blocks may hold is changed after they are read, and written again.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "codec/decoder.h"
#include "codec/klt/calibration.h"

namespace {

using namespace kvcast;

constexpr std::uint64_t kMostOutput = std::uint64_t{1} << 20;

std::vector<std::uint8_t> repaired_calibration(std::span<const std::uint8_t> data) {
    std::vector<std::uint8_t> bytes(data.begin(), data.end());
    if (bytes.size() < 20) return bytes;
    const std::uint64_t length = bytes.size();
    std::memcpy(bytes.data() + 8, &length, sizeof(length));
    const std::uint32_t crc = crc32(std::span(bytes).first(bytes.size() - 4));
    std::memcpy(bytes.data() + bytes.size() - 4, &crc, sizeof(crc));
    return bytes;
}

struct Change {
    std::uint32_t place;
    std::int16_t value;
};
constexpr std::size_t kChangeBytes = 6;

template <typename T>
void set(std::vector<T>& values, std::uint32_t place, std::int16_t value) {
    if (!values.empty()) values[place % values.size()] = static_cast<T>(value);
}

void apply(const Change& change, CalibrationData& data) {
    CalibrationUnit& unit = data.units[change.place % data.units.size()];
    const std::uint32_t kind = change.place / 64 % 8, place = change.place / 512;
    switch (kind) {
        case 0:
            return set(unit.transform.entries, place, change.value);
        case 1:
            return set(unit.transform.shifts, place, change.value);
        case 2:
            return set(unit.classes, place, change.value);
        case 3:
            return set(data.tokens.rows, place, change.value);
        case 4:
            return set(data.tokens.shifts, place, change.value);
        default:
            break;
    }
    if (unit.terms.empty()) return;
    PredictionTerm& term = unit.terms[place % unit.terms.size()];
    kind == 5 ? set(term.matrix.shifts, place / 8, change.value)
              : set(term.matrix.entries, place / 8, change.value);
}

// The calibration with the changes that `data` begins with, which are taken from it; null where the rules
// forbid the result.
std::shared_ptr<const Calibration> changed(const Calibration& calibration,
                                           std::span<const std::uint8_t>& data) {
    if (data.empty()) return nullptr;
    const std::size_t count = std::min<std::size_t>(data[0], (data.size() - 1) / kChangeBytes);
    CalibrationData out = calibration.data();
    for (std::size_t i = 0; i < count; ++i) {
        Change change = {};
        std::memcpy(&change.place, data.data() + 1 + i * kChangeBytes, sizeof(change.place));
        std::memcpy(&change.value, data.data() + 5 + i * kChangeBytes, sizeof(change.value));
        apply(change, out);
    }
    data = data.subspan(1 + count * kChangeBytes);
    const auto written = write_calibration(out);
    return written.ok() ? Calibration::read(written.value()).value() : nullptr;
}

// The chunk under another calibration id, all checksums right; empty where its header is refused.
std::vector<std::uint8_t> repaired_chunk(std::span<const std::uint8_t> data, const Hash& id) {
    std::vector<std::uint8_t> bytes(data.begin(), data.end());
    const Result<std::size_t> length = header_length(bytes);
    if (!length.ok() || length.value() > bytes.size()) return {};
    const std::uint32_t crc = crc32(std::span(bytes).first(length.value() - 4));
    std::memcpy(bytes.data() + length.value() - 4, &crc, sizeof(crc));
    Result<ChunkHeader> header = read_header(bytes);
    if (!header.ok() || header.value().profile != Profile::kKlt) return {};
    ChunkHeader& h = header.value();
    h.calibration = id;
    std::size_t at = length.value();
    for (std::size_t l = 0; l < h.layout.layers; ++l) {
        const std::size_t size = std::min<std::uint64_t>(h.layer_payload_bytes(l), bytes.size() - at);
        h.layer_crc[l] = crc32(std::span(bytes).subspan(at, size));
        at += size;
    }
    Result<std::vector<std::uint8_t>> out = write_header(h);
    if (!out.ok()) return {};
    out.value().insert(out.value().end(), bytes.begin() + static_cast<std::ptrdiff_t>(length.value()),
                       bytes.end());
    return std::move(out.value());
}

void decode(const ChunkDecoder& decoder) {
    const ChunkHeader& h = decoder.header();
    std::vector<std::vector<std::uint8_t>> planes;
    std::vector<PlaneBuffer> buffers;
    for (const PlaneShape& p : h.layout.planes) {
        const std::size_t row = p.width() * kernels::dtype_bytes(decoder.dtype());
        planes.emplace_back(row * h.tokens);
        buffers.push_back({planes.back().data(), row});
    }
    DecodeWorkspace workspace;
    for (std::size_t l = 0; l < h.layout.layers; ++l) {
        if (!decoder.decode_layer(l, buffers, workspace).ok()) return;
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    std::uint32_t split = 0;
    if (size < sizeof(split)) return 0;
    std::memcpy(&split, data, sizeof(split));
    const std::span all(data + sizeof(split), size - sizeof(split));
    split = static_cast<std::uint32_t>(std::min<std::size_t>(split, all.size()));
    const auto read = Calibration::read(repaired_calibration(all.first(split)));
    if (!read.ok()) return 0;
    std::span<const std::uint8_t> rest = all.subspan(split);
    const auto calibration = changed(*read.value(), rest);
    if (calibration == nullptr) return 0;
    const auto chunk = repaired_chunk(rest, calibration->id());
    const auto decoder = ChunkDecoder::open(chunk, {.calibration = calibration});
    if (!decoder.ok()) return 0;
    const ChunkHeader& h = decoder.value().header();
    if (h.tokens * h.layout.values_per_token() <= kMostOutput) decode(decoder.value());
    return 0;
}
