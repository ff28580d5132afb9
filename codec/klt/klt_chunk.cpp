#include "codec/klt/klt_chunk.h"

#include <fmt/format.h>

#include <algorithm>

#include "codec/format/chain.h"

namespace kvcast {

Status check_calibration(const ChunkHeader& h, const Calibration* calibration) {
    if (calibration == nullptr) {
        return {ErrorCode::kMissingCalibration,
                fmt::format("the chunk needs calibration {}, none was given", to_hex(*h.calibration))};
    }
    if (calibration->id() != *h.calibration) {
        return {ErrorCode::kWrongCalibration, fmt::format("the chunk needs calibration {}, {} was given",
                                                          to_hex(*h.calibration), to_hex(calibration->id()))};
    }
    const std::size_t levels = calibration->data().levels.size();
    if (h.level > levels || h.klt.tail_level > levels) {
        return {ErrorCode::kBadHeader,
                fmt::format("levels {} and {}, the calibration has {}", h.level, h.klt.tail_level, levels)};
    }
    if (!fits(calibration->data(), h.layout))
        return {ErrorCode::kBadHeader, "the chunk's layout is not the calibration's"};
    return {};
}

Status check_klt_options(const ChunkHeader& h, const CalibrationData& data) {
    if (!fits(data, h.layout))
        return {ErrorCode::kBadArgument,
                fmt::format("the calibration is of model '{}' with another layout", data.model)};
    const std::size_t level = std::max(h.level, h.klt.tail_level);
    if (level > data.levels.size()) {
        return {ErrorCode::kBadArgument,
                fmt::format("level {}, the calibration has 1 to {}", level, data.levels.size())};
    }
    return {};
}

std::vector<std::uint32_t> body_tokens(const ChunkHeader& h) {
    std::vector<std::uint32_t> body;
    std::size_t next_exact = 0;
    for (std::uint32_t t = 0; t < h.tokens; ++t) {
        const bool exact = next_exact < h.klt.exact_tokens.size() && h.klt.exact_tokens[next_exact] == t;
        exact ? static_cast<void>(++next_exact) : body.push_back(t);
    }
    return body;
}

std::vector<TokenSlice> body_slices(const ChunkHeader& h, const std::vector<std::uint32_t>& body,
                                    std::size_t longest) {
    std::vector<TokenSlice> slices;
    for (const std::uint32_t t : body) {
        const bool goes_on = !slices.empty() && slices.back().first + slices.back().count == t &&
                             slices.back().count < longest &&
                             level_index(h, slices.back().first) == level_index(h, t);
        if (!goes_on) slices.push_back({t, 0});
        ++slices.back().count;
    }
    return slices;
}

std::size_t level_index(const ChunkHeader& h, std::size_t token) {
    return (token + h.klt.tail_tokens >= h.tokens ? h.klt.tail_level : h.level) - 1;
}

}  // namespace kvcast
