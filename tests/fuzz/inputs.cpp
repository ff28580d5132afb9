#include "tests/fuzz/inputs.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "tests/chunks.h"

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
    if (!test::repair_chunk(input.chunk, &id)) return std::nullopt;
    return input;
}

}  // namespace kvcast::fuzz
