#include "tests/fuzz/inputs.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace kvcast::fuzz {
namespace {

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

}  // namespace

void repair_header(std::vector<std::uint8_t>& chunk) {
    const Result<std::size_t> length = header_length(chunk);
    if (!length.ok() || length.value() > chunk.size()) return;
    const std::uint32_t crc = crc32(std::span(chunk).first(length.value() - 4));
    std::memcpy(chunk.data() + length.value() - 4, &crc, sizeof(crc));
}

bool repair_chunk(std::vector<std::uint8_t>& chunk, const Hash* calibration) {
    repair_header(chunk);
    Result<ChunkHeader> header = read_header(chunk);
    if (!header.ok()) return false;
    ChunkHeader& h = header.value();
    if (calibration != nullptr) {
        if (h.profile != Profile::kKlt) return false;
        h.calibration = *calibration;
    }
    std::size_t at = h.header_bytes;
    for (std::size_t l = 0; l < h.layout.layers; ++l) {
        const std::size_t size = std::min<std::uint64_t>(h.layer_payload_bytes(l), chunk.size() - at);
        h.layer_crc[l] = crc32(std::span(chunk).subspan(at, size));
        at += size;
    }
    Result<std::vector<std::uint8_t>> out = write_header(h);
    if (!out.ok()) return false;
    out.value().insert(out.value().end(), chunk.begin() + static_cast<std::ptrdiff_t>(h.header_bytes),
                       chunk.end());
    chunk = std::move(out.value());
    return true;
}

std::optional<KltInput> klt_input(std::span<const std::uint8_t> data) {
    std::uint32_t split = 0;
    if (data.size() < sizeof(split)) return std::nullopt;
    std::memcpy(&split, data.data(), sizeof(split));
    data = data.subspan(sizeof(split));
    split = static_cast<std::uint32_t>(std::min<std::size_t>(split, data.size()));
    const auto read = Calibration::read(repaired_calibration(data.first(split)));
    if (!read.ok()) return std::nullopt;
    data = data.subspan(split);
    KltInput input = {changed(*read.value(), data), {}};
    if (input.calibration == nullptr) return std::nullopt;
    input.chunk.assign(data.begin(), data.end());
    const Hash id = input.calibration->id();
    if (!repair_chunk(input.chunk, &id)) return std::nullopt;
    return input;
}

Rows::Rows(const ChunkHeader& header, Dtype dtype, std::size_t layers) {
    const std::size_t planes = header.layout.planes.size();
    for (std::size_t i = 0; i < layers * planes; ++i) {
        const std::size_t row = header.layout.planes[i % planes].width() * kernels::dtype_bytes(dtype);
        bytes_.emplace_back(row * header.tokens);
        planes_.push_back({bytes_.back().data(), row});
    }
}

std::uint64_t values_of(const ChunkHeader& header) {
    return header.tokens * header.layout.values_per_token();
}

}  // namespace kvcast::fuzz
