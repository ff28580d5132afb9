// What encoder and decoder of the klt profile share about a chunk: which tokens are coded, at which level.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "codec/format/chunk_header.h"
#include "codec/klt/calibration.h"
#include "codec/klt/reconstruction.h"

namespace kvcast {

// kOk where the chunk can be decoded with the calibration: kMissingCalibration, kWrongCalibration,
// kBadHeader.
Status check_calibration(const ChunkHeader& header, const Calibration* calibration);

// kOk where an encoder can code the chunk with the calibration: kBadArgument (its layout, or no such level).
Status check_klt_options(const ChunkHeader& header, const CalibrationData& data);

// Tokens that are coded by coefficients, in order.
std::vector<std::uint32_t> body_tokens(const ChunkHeader& header);

// Makes exact tokens of those that are marked as unfit, beside those that are exact already. `unfit` [token].
void add_exact_tokens(ChunkHeader& header, std::span<std::uint8_t> unfit);

// Runs of `count` tokens, or ids, at most `longest` each.
std::vector<TokenSlice> slices_of(std::size_t count, std::size_t longest);

// Runs of body tokens of one level, at most `longest` each.
std::vector<TokenSlice> body_slices(const ChunkHeader& header, const std::vector<std::uint32_t>& body,
                                    std::size_t longest);

// Whether a token is one of the chunk's last, which may have a level of their own.
bool in_tail(const ChunkHeader& header, std::size_t token);

// The level of a token, counted from 0.
std::size_t level_index(const ChunkHeader& header, std::size_t token);

// Some tokens that code each coefficient with one class: they are of one level, and neighbours by their
// gains.
struct TokenStrip {
    std::size_t level;    // counted from 0
    std::int16_t gain;    // the greatest one of its tokens
    std::uint32_t first;  // in TokenStrips::tokens()
    std::uint32_t count;  // at most kernels::kLanes
};

// How a unit's coefficients lie in its block: tokens by level, by falling gain, and in order, 32 to a strip.
// Spreads differ more between coefficients than between tokens of like gain, so that a strip of one
// coefficient has few surprises; FORMAT.md, section 11.2.
class TokenStrips {
  public:
    // `gains` [body token], in kGainLow..kGainHigh.
    void make(const ChunkHeader& header, std::span<const std::uint32_t> body,
              std::span<const std::int16_t> gains);

    std::span<const TokenStrip> strips() const { return strips_; }
    std::span<const std::uint32_t> tokens(const TokenStrip& strip) const {
        return std::span(tokens_).subspan(strip.first, strip.count);
    }

  private:
    void add(std::size_t level, std::span<const std::uint32_t> body, std::span<const std::int16_t> gains);

    std::vector<std::uint32_t> tokens_;
    std::vector<TokenStrip> strips_;
};

// Coefficients up to the last one that has bits with a gain.
std::size_t leading_coded(std::span<const std::int8_t> classes, std::int16_t gain);

// Tokens that go through the transforms at once: their states stay in the cache.
inline constexpr std::size_t kSliceTokens = 64;

}  // namespace kvcast
