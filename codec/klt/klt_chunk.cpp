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

void add_exact_tokens(ChunkHeader& header, std::span<std::uint8_t> unfit) {
    for (const std::uint32_t t : header.klt.exact_tokens) unfit[t] = 1;
    header.klt.exact_tokens.clear();
    for (std::uint32_t t = 0; t < header.tokens; ++t) {
        if (unfit[t] != 0) header.klt.exact_tokens.push_back(t);
    }
}

std::vector<TokenSlice> slices_of(std::size_t count, std::size_t longest) {
    std::vector<TokenSlice> slices;
    for (std::size_t first = 0; first < count; first += longest)
        slices.push_back({first, std::min(longest, count - first)});
    return slices;
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

bool in_tail(const ChunkHeader& h, std::size_t token) {
    return token + h.klt.tail_tokens >= h.tokens;
}

std::size_t level_index(const ChunkHeader& h, std::size_t token) {
    return (in_tail(h, token) ? h.klt.tail_level : h.level) - 1;
}

std::size_t leading_coded(std::span<const std::int8_t> classes, std::int16_t gain) {
    std::size_t coded = classes.size();
    while (coded > 0 && klt_class(classes[coded - 1], gain) == 0) --coded;
    return coded;
}

void TokenStrips::make(const ChunkHeader& h, std::span<const std::uint32_t> body,
                       std::span<const std::int16_t> gains) {
    tokens_.clear();
    strips_.clear();
    const auto tail = std::find_if(body.begin(), body.end(), [&](std::uint32_t t) { return in_tail(h, t); });
    const auto main = static_cast<std::size_t>(tail - body.begin());
    add(h.level - 1u, body.first(main), gains.first(main));
    add(h.klt.tail_level - 1u, body.subspan(main), gains.subspan(main));
}

// Tokens of one level, sorted by counting.
void TokenStrips::add(std::size_t level, std::span<const std::uint32_t> body,
                      std::span<const std::int16_t> gains) {
    const auto first = static_cast<std::uint32_t>(tokens_.size());
    std::array<std::uint32_t, kGainHigh - kGainLow + 2> begins = {};  // by kGainHigh - gain
    const auto place = [](std::int16_t gain) { return static_cast<std::size_t>(kGainHigh - gain); };
    for (const std::int16_t gain : gains) ++begins[place(gain) + 1];
    for (std::size_t i = 1; i < begins.size(); ++i) begins[i] += begins[i - 1];
    tokens_.resize(first + body.size());
    auto at = begins;
    for (std::size_t i = 0; i < body.size(); ++i) tokens_[first + at[place(gains[i])]++] = body[i];
    for (std::uint32_t t = 0, place_of_t = 0; t < body.size(); t += kernels::kLanes) {
        while (begins[place_of_t + 1] <= t) ++place_of_t;
        strips_.push_back(
            {level, static_cast<std::int16_t>(kGainHigh - static_cast<int>(place_of_t)), first + t,
             std::min<std::uint32_t>(kernels::kLanes, static_cast<std::uint32_t>(body.size()) - t)});
    }
}

}  // namespace kvcast
