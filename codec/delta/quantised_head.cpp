#include "codec/delta/quantised_head.h"

#include <algorithm>
#include <array>

#include "kernels/plane_scale.h"

namespace kvcast {
namespace {

using kernels::kMeanFraction;
using kernels::kMeanLimit;
using kernels::kSymbolLimit;
using kernels::unit_of;

// How the tokens of a body are split: anchors first, then the rest, each in order of time.
class Anchors {
  public:
    Anchors(const DeltaParams& delta, std::size_t tokens)
        : group_(delta.anchor_group), tokens_(tokens), count_((tokens + group_ - 1) / group_) {}

    std::size_t count() const { return count_; }

    template <typename T>
    void split(const T* row, T* anchors_then_rest) const {
        T* rest = anchors_then_rest + count_;
        for (std::size_t t = 0; t < tokens_; ++t) (t % group_ == 0 ? *anchors_then_rest++ : *rest++) = row[t];
    }

    template <typename T>
    void join(const T* anchors_then_rest, T* row) const {
        const T* rest = anchors_then_rest + count_;
        for (std::size_t t = 0; t < tokens_; ++t) row[t] = t % group_ == 0 ? *anchors_then_rest++ : *rest++;
    }

    // What the tokens that are no anchors are predicted from: their anchor's state.
    void spread(const std::int16_t* anchors, std::int16_t* rest) const {
        for (std::size_t t = 0; t < tokens_; ++t) {
            if (t % group_ != 0) *rest++ = anchors[t / group_];
        }
    }

  private:
    std::size_t group_;
    std::size_t tokens_;
    std::size_t count_;
};

std::int16_t mean_state(std::int16_t mean, const PlaneParams& plane) {
    return kernels::mean_state(mean, plane.guard_bits);
}

// The mean of a channel in quarter steps.
std::int16_t quantised_mean(const kernels::Ops& ops, const float* row, std::size_t count, float inverse_unit,
                            unsigned guard_bits) {
    const std::int64_t sum = ops.rounded_sum(row, count, inverse_unit);
    const double mean =
        static_cast<double>(sum) / static_cast<double>(count) / (1 << (guard_bits - kMeanFraction));
    constexpr double shifter = 0x1.8p52;  // rounds at the unit, ties to even
    return static_cast<std::int16_t>(std::clamp<double>(mean + shifter - shifter, -kMeanLimit, kMeanLimit));
}

struct HeadWriter {
    const kernels::Ops& ops;
    const DeltaParams& delta;
    const PlaneParams& plane;
    QuantisedScratch& scratch;
    FetchAhead& ahead;
    float inverse_unit;

    std::int16_t mean(std::size_t channel) const { return mean_state(scratch.means[channel], plane); }

    // The sum of symbols' magnitudes.
    std::uint64_t quantise(const float* row, std::size_t count, const std::int16_t* prediction,
                           std::int16_t mean, unsigned shift, std::int16_t* symbols) const {
        return ops.quantise({row, count, prediction, mean, inverse_unit, shift, kSymbolLimit, symbols});
    }

    static std::int16_t class_for(std::uint64_t sum, std::size_t count) {
        return static_cast<std::int16_t>(entropy::class_for(sum, count));
    }

    // Every mean is found before the channel in front of its own is quantised, and classes at last, so that
    // no step waits for the one before it.
    void quantise_by_means(const float* tile, TileShape shape, std::int16_t* symbols) const {
        const auto find_mean = [&](std::size_t c) {
            if (c < shape.channels)
                scratch.means[c] = quantised_mean(ops, tile + c * shape.stride, shape.tokens, inverse_unit,
                                                  plane.guard_bits);
        };
        find_mean(0);
        for (std::size_t c = 0; c < shape.channels; ++c) {
            ahead.step();
            find_mean(c + 1);
            scratch.sums[c] = quantise(tile + c * shape.stride, shape.tokens, nullptr, mean(c),
                                       plane.guard_bits, symbols + c * shape.stride);
        }
        for (std::size_t c = 0; c < shape.channels; ++c)
            scratch.classes[c] = class_for(scratch.sums[c], shape.tokens);
    }

    void quantise_by_anchor(std::size_t c, const float* row, TileShape shape, std::int16_t* symbols) const {
        ahead.step();
        const Anchors anchors(delta, shape.tokens);
        const std::size_t rest = shape.tokens - anchors.count();
        const unsigned fine = plane.guard_bits - delta.anchor_shift;
        float* gathered = scratch.gathered.data();
        anchors.split(row, gathered);
        scratch.means[c] = quantised_mean(ops, gathered, anchors.count(), inverse_unit, plane.guard_bits);
        scratch.classes[c] =
            class_for(quantise(gathered, anchors.count(), nullptr, mean(c), fine, symbols), anchors.count());
        std::fill_n(scratch.prediction.data(), anchors.count(), mean(c));
        ops.reconstruct(symbols, scratch.prediction.data(), anchors.count(), fine, scratch.states.data());
        anchors.spread(scratch.states.data(), scratch.prediction.data());
        scratch.delta_classes[c] = 0;
        if (rest == 0) return;
        const std::uint64_t sum = quantise(gathered + anchors.count(), rest, scratch.prediction.data(), 0,
                                           plane.guard_bits, symbols + anchors.count());
        scratch.delta_classes[c] = class_for(sum, rest);
    }
};

void resize(QuantisedScratch& s, TileShape shape) {
    for (auto* v : {&s.classes, &s.delta_classes, &s.means}) v->resize(shape.channels);
    s.sums.resize(shape.channels);
    s.prediction.resize(shape.tokens);
    s.states.resize(shape.tokens);
    s.joined.resize(shape.tokens);
    s.gathered.resize(shape.tokens);
}

unsigned as_class(std::int16_t spread_class) {
    return static_cast<unsigned>(spread_class);
}

}  // namespace

unsigned least_guard_bits(const DeltaParams& delta) {
    return delta.predictor == Predictor::kAnchor ? std::max(3u, delta.anchor_shift) : 3u;
}

PlaneParams choose_params(double step, float max_magnitude, const DeltaParams& delta) {
    const kernels::PlaneScale chosen = kernels::choose_scale(step, max_magnitude, least_guard_bits(delta));
    if (!chosen.quantised) return {};
    return {PlaneMode::kQuantised, chosen.guard_bits, chosen.scale};
}

void write_quantised_head(entropy::BlockWriter& out, const kernels::Ops& ops, const DeltaParams& delta,
                          const PlaneParams& plane, const float* tile, TileShape shape, std::int16_t* symbols,
                          QuantisedScratch& scratch, FetchAhead& ahead) {
    resize(scratch, shape);
    const HeadWriter head = {ops, delta, plane, scratch, ahead, 1.0f / unit_of(plane.scale)};
    const bool anchored = delta.predictor == Predictor::kAnchor;
    if (anchored) {
        for (std::size_t c = 0; c < shape.channels; ++c)
            head.quantise_by_anchor(c, tile + c * shape.stride, shape, symbols + c * shape.stride);
    } else {
        head.quantise_by_means(tile, shape, symbols);
    }
    out.vector(scratch.classes);
    if (anchored) out.vector(scratch.delta_classes);
    out.vector(scratch.means);
    const std::size_t first = anchored ? Anchors(delta, shape.tokens).count() : shape.tokens;
    for (std::size_t c = 0; c < shape.channels; ++c) {
        const std::int16_t* q = symbols + c * shape.stride;
        out.strip(as_class(scratch.classes[c]), {q, first});
        if (anchored) out.strip(as_class(scratch.delta_classes[c]), {q + first, shape.tokens - first});
    }
}

namespace {

// Side information of heads.
void read_side(std::span<entropy::BlockReader* const> readers, const DeltaParams& delta,
               std::span<QuantisedHead> heads, std::span<QuantisedScratch> scratch) {
    constexpr std::int32_t last_class = entropy::kClasses - 1;
    const auto read = [&](std::vector<std::int16_t> QuantisedScratch::*values, std::int32_t low,
                          std::int32_t high) {
        std::array<entropy::SideVector, entropy::BlockReader::kMostAbreast> vectors;
        for (std::size_t i = 0; i < readers.size(); ++i) vectors[i] = {scratch[i].*values, &heads[i].fits};
        entropy::BlockReader::vectors(readers, {vectors.data(), readers.size()}, low, high);
    };
    read(&QuantisedScratch::classes, 0, last_class);
    if (delta.predictor == Predictor::kAnchor) read(&QuantisedScratch::delta_classes, 0, last_class);
    read(&QuantisedScratch::means, -kMeanLimit, kMeanLimit);
}

// Symbols of one channel, in place, to states.
void reconstruct_by_anchor(const kernels::Ops& ops, const DeltaParams& delta, const PlaneParams& plane,
                           std::size_t c, std::int16_t* row, TileShape shape, QuantisedScratch& s) {
    const Anchors anchors(delta, shape.tokens);
    const std::size_t first = anchors.count(), rest = shape.tokens - first;
    std::fill_n(s.prediction.data(), first, mean_state(s.means[c], plane));
    ops.reconstruct(row, s.prediction.data(), first, plane.guard_bits - delta.anchor_shift, s.joined.data());
    anchors.spread(s.joined.data(), s.prediction.data());
    ops.reconstruct(row + first, s.prediction.data(), rest, plane.guard_bits, s.joined.data() + first);
    anchors.join(s.joined.data(), row);
}

}  // namespace

void read_quantised_heads(std::span<entropy::BlockReader* const> readers, const kernels::Ops& ops,
                          const DeltaParams& delta, std::span<QuantisedHead> heads, TileShape shape,
                          std::span<QuantisedScratch> scratch, std::span<kernels::Outgoing> outgoing) {
    const bool anchored = delta.predictor == Predictor::kAnchor;
    const std::size_t n = readers.size();
    const std::size_t first = anchored ? Anchors(delta, shape.tokens).count() : shape.tokens;
    std::array<kernels::Meaning, entropy::BlockReader::kMostAbreast> meanings;
    for (std::size_t i = 0; i < n; ++i) {
        resize(scratch[i], shape);
        meanings[i] = {heads[i].plane.guard_bits, heads[i].elements, heads[i].plane.scale};
    }
    read_side(readers, delta, heads, scratch);
    const entropy::ClassDecoding* const decodings = entropy::class_decodings();
    std::vector<kernels::Strip>& strips = scratch[0].strips;
    strips.resize(shape.channels * n * (anchored ? 2 : 1));
    kernels::Strip* strip = strips.data();
    for (std::size_t c = 0; c < shape.channels; ++c) {
        for (std::size_t i = 0; i < n; ++i) {
            const entropy::ClassDecoding& coded = decodings[scratch[i].classes[c]];
            *strip++ = {coded.table,
                        coded.shift,
                        first,
                        heads[i].tile + c * shape.stride,
                        anchored ? nullptr : &meanings[i],
                        mean_state(scratch[i].means[c], heads[i].plane)};
        }
        for (std::size_t i = 0; anchored && i < n; ++i) {
            *strip++ = entropy::decoding_strip(as_class(scratch[i].delta_classes[c]), shape.tokens - first,
                                               heads[i].tile + c * shape.stride + first);
        }
    }
    entropy::BlockReader::strips(readers, strips, outgoing);
    for (std::size_t i = 0; anchored && i < n; ++i) {
        for (std::size_t c = 0; c < shape.channels; ++c)
            reconstruct_by_anchor(ops, delta, heads[i].plane, c, heads[i].tile + c * shape.stride, shape,
                                  scratch[i]);
    }
}

}  // namespace kvcast
