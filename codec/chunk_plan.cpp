#include "codec/chunk_plan.h"

#include <fmt/format.h>

#include <algorithm>

#include "codec/format/chain.h"
#include "codec/klt/calibration.h"

namespace kvcast {
namespace {

constexpr std::size_t kTargetBlockValues = std::size_t{96} << 10;

std::size_t auto_block_heads(const Layout& layout, std::size_t tokens) {
    std::size_t widest = 1;
    for (const PlaneShape& p : layout.planes) widest = std::max(widest, p.head_dim);
    return std::clamp<std::size_t>(kTargetBlockValues / (widest * tokens), 1, layout.heads_per_layer());
}

std::size_t planned_block_heads(const ChunkInput& input, const EncodeOptions& options) {
    const std::size_t heads = input.layout->heads_per_layer();
    if (options.profile == Profile::kKlt) return heads;
    if (options.block_heads != 0) return std::min(options.block_heads, heads);
    return auto_block_heads(*input.layout, input.token_ids.size());
}

void plan_klt(const ChunkInput& input, const EncodeOptions& options, std::size_t exact, ChunkHeader& h) {
    h.calibration = options.calibration->id();
    h.klt.run_layers = std::min(options.run_layers, h.layout.layers);
    h.klt.tail_level = options.tail_level != 0 ? options.tail_level : options.level;
    h.klt.tail_tokens = options.tail_level != 0 ? std::min(input.tail_tokens, h.tokens) : 0;
    for (std::uint32_t t = 0; t < exact; ++t) h.klt.exact_tokens.push_back(t);
}

// How many leading tokens of a lossless chunk are coded row by row, so that no channel ends in a group of
// fewer than 16 tokens: raw bits of a group come in words of 16 lanes. A row has a model of its own, and its
// channels' exponents are less alike than one channel's, by a quarter of a bit.
std::size_t rows_of_lossless(const Layout& layout, std::size_t tokens) {
    constexpr std::size_t kLanesOfWord = 16, kQuarters = 4, kModelBits = 16;
    const std::size_t raw_bits = kernels::mantissa_bits(layout.dtype) + 1, rest = tokens % kLanesOfWord;
    std::size_t saved = 0, spent = 0;  // quarters of bits
    for (const PlaneShape& p : layout.planes) {
        const std::size_t rests = (kLanesOfWord - p.head_dim % kLanesOfWord) % kLanesOfWord;
        saved += p.width() * (kLanesOfWord - rest) * raw_bits * kQuarters;
        spent += p.heads * rest * ((rests * raw_bits + kModelBits) * kQuarters + p.head_dim);
    }
    return saved > spent ? rest : 0;
}

// Of a delta chunk: attention sinks, and whatever is left alone by them, which has no spread.
std::size_t rows_of_delta(std::size_t sinks, std::size_t tokens) {
    return sinks + 1 == tokens ? tokens : sinks;
}

}  // namespace

Status check_input(const ChunkInput& input, const EncodeOptions& options) {
    if (input.layout == nullptr) return {ErrorCode::kBadArgument, "no layout given"};
    if (Status s = check_layout(*input.layout); !s.ok()) return s;
    const std::size_t planes = input.layout->layers * input.layout->planes.size();
    if (input.planes.size() != planes) {
        return {ErrorCode::kBadArgument,
                fmt::format("{} planes given, the layout has {}", input.planes.size(), planes)};
    }
    if (input.token_ids.empty() || input.token_ids.size() > ChunkLimits::kTokens) {
        return {ErrorCode::kBadArgument, fmt::format("a chunk of {} tokens, 1 to {} are possible",
                                                     input.token_ids.size(), ChunkLimits::kTokens)};
    }
    if (input.first_token > ChunkLimits::kPosition || input.base_position > ChunkLimits::kPosition) {
        return {ErrorCode::kLimitExceeded,
                fmt::format("token {} at base position {}, at most 2^48 are possible", input.first_token,
                            input.base_position)};
    }
    const std::size_t block_heads = planned_block_heads(input, options);
    if (Status s = check_block_values(*input.layout, block_heads, input.token_ids.size()); !s.ok()) return s;
    if (options.profile == Profile::kKlt) {
        if (options.calibration == nullptr)
            return {ErrorCode::kMissingCalibration, "the klt profile needs a calibration, none was given"};
        if (options.level == 0 || options.run_layers == 0)
            return {ErrorCode::kBadArgument, "the klt profile needs a level and run_layers from 1 on"};
        return {};
    }
    if (options.profile == Profile::kLossless) return {};
    if (options.level == 0 || options.level > kDeltaLevels) {
        return {ErrorCode::kBadArgument,
                fmt::format("level {}, the delta profile has 1 to {}", options.level, kDeltaLevels)};
    }
    return options.layer_steps.empty() ? Status() : check_layer_steps(options.layer_steps, *input.layout);
}

ChunkHeader plan_header(const ChunkInput& input, const EncodeOptions& options) {
    ChunkHeader h;
    const bool lossy = options.profile != Profile::kLossless;
    const bool klt = options.profile == Profile::kKlt;
    h.profile = options.profile;
    h.level = lossy ? options.level : 0;
    h.unrotated = lossy && (klt || options.unrotate) && input.layout->rope.pairing != RopePairing::kNone;
    h.model = input.model;
    h.layout = *input.layout;
    h.tokens = input.token_ids.size();
    h.first_token = input.first_token;
    h.base_position = input.base_position;
    h.parent = input.parent;
    h.chain = chain_hash(input.parent, input.salt, layout_hash(*input.layout), input.model, input.token_ids);
    h.token_ids.assign(input.token_ids.begin(), input.token_ids.end());
    h.delta.predictor = options.predictor;
    const std::uint64_t sinks = std::max<std::uint64_t>(options.sinks, input.first_token) - input.first_token;
    const auto exact = static_cast<std::size_t>(std::min<std::uint64_t>(sinks, h.tokens));
    if (klt) plan_klt(input, options, exact, h);
    if (!klt) h.exact_rows = lossy ? rows_of_delta(exact, h.tokens) : rows_of_lossless(h.layout, h.tokens);
    h.block_heads = planned_block_heads(input, options);
    if (!klt) h.planes.resize(h.layout.layers * h.layout.planes.size());
    h.block_bytes.resize(h.layout.layers * h.blocks_per_layer());
    h.layer_crc.resize(h.layout.layers);
    return h;
}

}  // namespace kvcast
