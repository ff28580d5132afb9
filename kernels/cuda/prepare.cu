// From planes whose scales are decided to strips (kernels/cuda/strip_list.h): means, classes, symbols,
// exponent models, side vectors. Arithmetic as in analyse.cu.
#include "kernels/cuda/encode_launch.h"
#include "kernels/cuda/exponent_model.cuh"
#include "kernels/cuda/platform.cuh"
#include "kernels/cuda/rows.cuh"
#include "kernels/cuda/short_channels.cuh"
#include "kernels/cuda/strip_record.cuh"
#include "kernels/cuda/tile_values.cuh"
#include "kernels/plane_scale.h"

namespace kvcast::kernels::cuda {
namespace {

constexpr std::uint32_t kThreads = 128;
constexpr std::uint32_t kWarps = kThreads / kLanes;
[[maybe_unused]] constexpr std::uint32_t kPrepareBlocks = 5;  // of threads, at least, at a time

// Where the strips of a head go.
struct HeadStrips {
    const EncodePlaneTask& plane;
    StripList list;
    std::uint32_t* words;
    std::uint32_t* records;
    std::int16_t* side;

    __device__ HeadStrips(Memory memory, const EncodePlaneTask& p, bool quantised, std::uint32_t head)
        : plane(p),
          list(strip_list(p, quantised)),
          words(reinterpret_cast<std::uint32_t*>(memory.workspace + p.words) +
                std::uint64_t{head} * p.head_batches),
          records(reinterpret_cast<std::uint32_t*>(memory.workspace + p.records) +
                  std::uint64_t{head} * p.head_batches * record_words(p.plane_lines)),
          side(reinterpret_cast<std::int16_t*>(memory.workspace + p.side) +
               std::uint64_t{head} * kMostVectors * p.channels) {}

    __device__ std::uint32_t* record(std::uint32_t batch) const {
        return records + std::uint64_t{batch} * record_words(plane.plane_lines);
    }
    __device__ std::int16_t* vector(std::uint32_t v) const { return side + v * plane.channels; }

    // A strip of split(0) to split(count - 1), from batch `first` on, whose last one is of kind `end`.
    template <typename Split>
    __device__ void put(std::uint32_t first, std::uint32_t end, BatchWord word, std::uint32_t count,
                        Split split) const {
        const std::uint32_t batches = div_up(count, kBatchValues);
        by_lanes(batches, [&](std::uint32_t b) {
            const BatchWord own = b == 0 ? word : word.continued();
            words[first + b] = (b + 1 == batches ? own.ending(end) : own).bits();
        });
        if (uniform(word.coded() ? 1 : 0) != 0)
            write_records(record(first), plane.plane_lines, word.planes(), count, split);
    }
    template <typename Split>
    __device__ void put_part(std::uint32_t channel, std::uint32_t part, BatchWord word, Split split) const {
        put(list.part(channel, part), StripList::part_end(part), word, list.counts[part], split);
    }
    template <typename Split>
    __device__ void put_wide(std::uint32_t first, BatchWord word, Split split) const {
        put(first, StripList::kWideEnd, word, plane.channels, split);
    }
};

__device__ BatchWord floats_word(const ExponentModel& m, Dtype dtype) {
    return BatchWord::of(kFirstExponentTable + m.table, mantissa_bits(dtype) + 1);
}

// ---- quantised channels

// The class for `count` values whose magnitudes sum to `sum`.
__device__ unsigned class_for(const CoderTables& tables, std::uint64_t sum, std::uint32_t count) {
    if (sum == 0) return 0;
    const std::uint64_t mean = sum * 256 / count;
    unsigned spread_class = 1;
    for (const std::uint32_t threshold : tables.class_thresholds) spread_class += threshold <= mean ? 1 : 0;
    return spread_class;
}

// Values against predictions, in steps of 2^shift states.
struct Quantiser {
    float inverse_unit;
    float step;  // 2^-shift

    __device__ Quantiser(float inverse, unsigned shift)
        : inverse_unit(inverse), step(power_of_two(-static_cast<int>(shift))) {}

    __device__ std::int16_t operator()(float value, std::int16_t prediction) const {
        return static_cast<std::int16_t>(of_states(value * inverse_unit, static_cast<float>(prediction)));
    }

    // Of a value in states; numbers, as all of a quantised plane are.
    __device__ __forceinline__ std::int32_t of_states(float states, float prediction) const {
        constexpr auto bound = static_cast<float>(kSymbolLimit);
        return nearest_integer(fminf(fmaxf((states - prediction) * step, -bound), bound));
    }
};

// The mean of a channel in quarter steps, from the sum of its states.
__device__ std::int16_t mean_of(std::int64_t sum, std::uint32_t count, unsigned guard_bits) {
    const double mean =
        static_cast<double>(sum) / static_cast<double>(count) / (1 << (guard_bits - kMeanFraction));
    const double rounded = nearbyint(mean);
    return static_cast<std::int16_t>(rounded < -kMeanLimit  ? -kMeanLimit
                                     : rounded > kMeanLimit ? kMeanLimit
                                                            : rounded);
}

// Sums of 2^16 states stay within 32 bits: those of a quantised plane are 32000 at most.
template <typename Value>
__device__ std::int64_t sum_of_states(std::uint32_t count, float inverse_unit, Value value) {
    std::int32_t sum = 0;
    by_lanes(count, [&](std::uint32_t i) { sum += nearest_integer(value(i) * inverse_unit); });
    return sum_of_lanes(sum);
}

// A channel on its way to its strips.
struct Channel {
    const HeadStrips& head;
    const PlaneChoice& choice;
    const CoderTables& tables;
    std::uint32_t index;
    float inverse_unit;

    __device__ Channel(const HeadStrips& h, const PlaneChoice& c, const CoderTables& t, std::uint32_t i)
        : head(h), choice(c), tables(t), index(i), inverse_unit(1.0f / unit_of(c.scale)) {}

    // Part `part`, whose quantised values are q(i): its class, which the strip is coded with.
    template <typename Quantised>
    __device__ unsigned put_part(std::uint32_t part, Quantised q) const {
        const std::uint32_t count = uniform(head.list.counts[part]);
        std::int64_t sum = 0;
        by_lanes(count, [&](std::uint32_t i) {
            const std::int16_t v = q(i);
            sum += v < 0 ? -v : v;
        });
        const unsigned spread_class =
            count == 0 ? 0 : class_for(tables, static_cast<std::uint64_t>(sum_of_lanes(sum)), count);
        const BatchWord word = BatchWord::of_class(spread_class);
        const SplitByClass split = {word.planes()};
        head.put_part(index, part, word, [&](std::uint32_t i) { return split(q(i)); });
        return spread_class;
    }

    __device__ void put_side(std::uint32_t vector, std::int32_t value) const {
        if (lane_id() == 0) head.vector(vector)[index] = static_cast<std::int16_t>(value);
    }
};

template <typename Value>
__device__ void quantise_anchored(const Channel& c, Value value) {
    const EncodePlaneTask& p = c.head.plane;
    const unsigned guard = c.choice.guard_bits, fine = guard - p.anchor_shift;
    const std::uint32_t stride = p.anchor_group, between = stride - 1, anchors = c.head.list.counts[0];
    const std::int64_t sum =
        sum_of_states(anchors, c.inverse_unit, [&](std::uint32_t i) { return value(i * stride); });
    const std::int16_t mean = mean_of(sum, anchors, guard), prediction = mean_state(mean, guard);
    const Quantiser finely(c.inverse_unit, fine), coarsely(c.inverse_unit, guard);
    const auto anchor = [&](std::uint32_t i) { return finely(value(i * stride), prediction); };
    c.put_side(0, static_cast<std::int32_t>(c.put_part(0, anchor)));
    const unsigned delta_class = c.put_part(1, [&](std::uint32_t i) {
        const std::uint32_t group = i / between;
        return coarsely(value(group * stride + 1 + i % between), state_of(prediction, anchor(group), fine));
    });
    c.put_side(1, static_cast<std::int32_t>(delta_class));
    c.put_side(2, mean);
}

template <typename Value>
__device__ void quantise_channel(const Channel& c, Value value) {
    const unsigned guard = c.choice.guard_bits;
    const std::uint32_t count = c.head.list.counts[0];
    const std::int16_t mean = mean_of(sum_of_states(count, c.inverse_unit, value), count, guard);
    const std::int16_t prediction = mean_state(mean, guard);
    const Quantiser quantised(c.inverse_unit, guard);
    const unsigned spread_class =
        c.put_part(0, [&](std::uint32_t i) { return quantised(value(i), prediction); });
    c.put_side(0, static_cast<std::int32_t>(spread_class));
    c.put_side(1, mean);
}

template <typename Value>
__device__ void put_quantised(const Channel& c, Value value) {
    if (uniform(c.head.plane.anchor_group) != 0) {
        quantise_anchored(c, value);
    } else {
        quantise_channel(c, value);
    }
}

// ---- the same in registers

// Where the strips of a plane's short channels go, of which each one is a batch.
struct ShortStrips {
    std::uint32_t count;  // of values
    std::uint32_t* words;
    std::uint32_t* records;
    std::int16_t* side;
    std::uint32_t channels;
    std::uint32_t plane_lines;
    std::uint32_t head_batches;
    std::uint32_t first_batch;  // of a head's channels

    __device__ ShortStrips(Memory memory, const EncodePlaneTask& p)
        : count(p.body_tokens),
          words(reinterpret_cast<std::uint32_t*>(memory.workspace + p.words)),
          records(reinterpret_cast<std::uint32_t*>(memory.workspace + p.records)),
          side(reinterpret_cast<std::int16_t*>(memory.workspace + p.side)),
          channels(p.channels),
          plane_lines(p.plane_lines),
          head_batches(p.head_batches),
          first_batch(strip_list(p, false).part(0, 0)) {}

    // A strip's word and its elements of both side vectors. What is left to write is its record.
    __device__ __forceinline__ std::uint32_t* put(std::uint32_t head, std::uint32_t channel, BatchWord word,
                                                  std::int32_t first, std::int32_t second) const {
        const std::uint32_t batch = head * head_batches + first_batch + channel;
        if (lane_id() == 0) {
            words[batch] = word.ending(StripList::part_end(0)).bits();
            std::int16_t* own = side + (std::uint64_t{head} * kMostVectors * channels + channel);
            own[0] = static_cast<std::int16_t>(first);
            own[channels] = static_cast<std::int16_t>(second);
        }
        __syncwarp();
        return records + std::uint64_t{batch} * record_words(plane_lines);
    }
};

// How the short channels of a plane are quantised.
struct ShortQuantiser {
    std::uint32_t count;  // of values
    float inverse_unit;
    float step;                // 2^-guard bits
    unsigned mean_shift;       // a mean is in steps of 2^mean_shift states
    std::uint32_t reciprocal;  // of `count`, 2^31 times it, rounded up
    std::uint32_t threshold;   // the lane's class is reached from count times its mean on

    __device__ ShortQuantiser(std::uint32_t values, const PlaneChoice& choice, const CoderTables& tables)
        : count(values),
          inverse_unit(1.0f / unit_of(choice.scale)),
          step(power_of_two(-static_cast<int>(choice.guard_bits))),
          mean_shift(choice.guard_bits - kMeanFraction),
          reciprocal(((1u << 31) + count - 1) / count),
          threshold(kNone) {
        const std::uint64_t own =
            lane_id() < kThresholds ? std::uint64_t{tables.class_thresholds[lane_id()]} * count : kNone;
        threshold = own < kNone ? static_cast<std::uint32_t>(own) : kNone;
    }

    // mean_of() in integers: halves to even, of an even divisor. Of up to 256 states of up to 32000 each.
    __device__ __forceinline__ std::int32_t mean_of(std::int32_t sum) const {
        const auto magnitude = static_cast<std::uint32_t>(sum < 0 ? -sum : sum);
        const auto whole =
            static_cast<std::uint32_t>(std::uint64_t{magnitude >> mean_shift} * reciprocal >> 31);
        const std::uint32_t divisor = count << mean_shift, twice = 2 * (magnitude - whole * divisor);
        const auto rounded = static_cast<std::int32_t>(whole + (twice + (whole & 1u) > divisor ? 1 : 0));
        const std::int32_t limited = rounded < kMeanLimit ? rounded : kMeanLimit;
        return sum < 0 ? -limited : limited;
    }

    // class_for() of magnitudes of up to 2^14 each.
    __device__ __forceinline__ unsigned class_of(std::uint32_t magnitudes) const {
        const unsigned reached = __ballot_sync(kFullWarp, threshold <= magnitudes * 256 ? 1 : 0);
        return magnitudes == 0 ? 0 : 1 + static_cast<unsigned>(__popc(reached));
    }
};

// A channel's strip, which is one batch, from its values. Integers are kept as the bits of floats near
// 2^23, as nearest_integer() makes them. No value needs a limit: with three guard bits or more, what is left
// of 2 * 32767 states is below 2^14.
template <bool kMost>
__device__ __forceinline__ void quantise_short_channel(const ShortStrips& strips, const ShortQuantiser& p,
                                                       std::uint32_t head, std::uint32_t channel,
                                                       const float (&values)[kBatchGroups]) {
    std::uint32_t sum = 0;
    float states[kBatchGroups];
    KVCAST_UNROLL(8)
    for (std::uint32_t g = 0; g < kBatchGroups; ++g) {
        states[g] = values[g] * p.inverse_unit;
        sum += near_bits(states[g]) - kNearZero;
    }
    const std::int32_t mean = p.mean_of(sum_of_signed(static_cast<std::int32_t>(sum)));
    const auto prediction =
        static_cast<float>(mean_state(static_cast<std::int16_t>(mean), p.mean_shift + kMeanFraction));
    std::uint32_t near[kBatchGroups], magnitudes = 0;
    KVCAST_UNROLL(8)
    for (std::uint32_t g = 0; g < kBatchGroups; ++g) {
        // The product is exact: one rounding, as if it came first.
        const float q = fmaf(states[g] - prediction, p.step, kNearZeroFloat);
        near[g] = is_inside<kMost>(g, p.count) ? std::bit_cast<std::uint32_t>(q) : kNearZero;
        magnitudes = plus_distance(magnitudes, near[g], kNearZero);
    }
    const unsigned spread_class = p.class_of(__reduce_add_sync(kFullWarp, magnitudes));
    const BatchWord word = BatchWord::of_class(spread_class);
    std::uint32_t* record = strips.put(head, channel, word, static_cast<std::int32_t>(spread_class), mean);
    if (!word.coded()) return;
    // As SplitByClass has it, but for bits above the planes, which nobody looks at.
    const unsigned shift = word.planes();
    const std::uint32_t half = shift == 0 ? 0 : 1u << (shift - 1);
    SplitBatch split;
    KVCAST_UNROLL(8)
    for (std::uint32_t g = 0; g < kBatchGroups; ++g) {
        const std::uint32_t shifted = is_inside<kMost>(g, p.count) ? near[g] + (half - kNearZero) : 0;
        split.high[g] = static_cast<std::int32_t>(shifted) >> shift;
        split.raw[g] = shifted;
    }
    write_split(record, strips.plane_lines, shift, split);
}

template <bool kMost>
__device__ __forceinline__ void quantise_run(Memory memory, const EncodePlaneTask& p, const RotationTask* r,
                                             const PlaneChoice& choice, const CoderTables& tables,
                                             const DuoRun& run) {
    const Duo duo = duo_of(p, r, run.index);
    const DuoSource source(memory, p, r, duo);
    const ShortStrips strips(memory, p);
    const ShortQuantiser quantiser(p.body_tokens, choice, tables);
    const std::uint32_t end = uniform(run.end_head), count = uniform(duo.count);
    KVCAST_UNROLL(1)
    for (std::uint32_t head = uniform(run.first_head); head < end; ++head) {
        const auto values = source.values(source.stored(head));
        quantise_short_channel<kMost>(strips, quantiser, head, duo.channel[0], values.of[0]);
        if (count == 2) quantise_short_channel<kMost>(strips, quantiser, head, duo.channel[1], values.of[1]);
    }
}

// A lane's elements of a strip of bf16 that is one batch, where inside(g): the model that they are coded
// with, and what they are split into.
struct ExactBatch {
    std::uint32_t bits[kBatchGroups];

    template <typename Inside>
    __device__ __forceinline__ ExponentModel modelled(const ShortModeller& model, std::uint32_t count,
                                                      Inside inside) const {
        std::uint32_t exponents[kBatchGroups];
        KVCAST_UNROLL(8)
        for (std::uint32_t g = 0; g < kBatchGroups; ++g)
            exponents[g] = bits[g] >> mantissa_bits(Dtype::kBf16) & exponent_mask(Dtype::kBf16);
        return model(exponents, count, inside);
    }

    template <typename Inside>
    __device__ __forceinline__ void write(std::uint32_t* record, std::uint32_t plane_lines,
                                          const ExponentModel& m, Inside inside) const {
        const SplitByExponent split = {m.center, Dtype::kBf16};
        SplitBatch batch;
        KVCAST_UNROLL(8)
        for (std::uint32_t g = 0; g < kBatchGroups; ++g) {
            const SplitValue v = inside(g) ? split(bits[g]) : SplitValue{0, 0};
            batch.high[g] = v.high;
            batch.raw[g] = v.raw;
        }
        write_split(record, plane_lines, mantissa_bits(Dtype::kBf16) + 1, batch);
    }
};

// Two values a word.
template <bool kMost>
__device__ __forceinline__ void model_short_channel(const ShortStrips& strips, const ShortModeller& model,
                                                    std::uint32_t head, std::uint32_t channel,
                                                    const uint4& stored) {
    const std::uint32_t pairs[] = {stored.x, stored.y, stored.z, stored.w};
    ExactBatch batch;
    KVCAST_UNROLL(8)
    for (std::uint32_t g = 0; g < kBatchGroups; ++g)
        batch.bits[g] = g % 2 == 0 ? pairs[g / 2] & 0xffffu : pairs[g / 2] >> 16;
    const auto inside = [&](std::uint32_t g) { return is_inside<kMost>(g, strips.count); };
    const ExponentModel m = batch.modelled(model, strips.count, inside);
    batch.write(strips.put(head, channel, floats_word(m, Dtype::kBf16), static_cast<std::int32_t>(m.center),
                           static_cast<std::int32_t>(m.table)),
                strips.plane_lines, m, inside);
}

template <bool kMost>
__device__ KVCAST_APART void model_run(Memory memory, const EncodePlaneTask& p, const RotationTask* r,
                                       const CoderTables& tables, const DuoRun& run,
                                       ShortModeller::Counts& counts) {
    const Duo duo = duo_of(p, r, run.index);
    const ShortStrips strips(memory, p);
    const DuoSource source(memory, p, nullptr, {{duo.channel[0], duo.channel[1]}, duo.count, kNone});
    const ShortModeller model(tables, counts);
    const std::uint32_t end = uniform(run.end_head), count = uniform(duo.count);
    KVCAST_UNROLL(1)
    for (std::uint32_t head = uniform(run.first_head); head < end; ++head) {
        const DuoSource::Stored stored = source.stored(head);
        KVCAST_UNROLL(1)
        for (std::uint32_t c = 0; c < count; ++c)
            model_short_channel<kMost>(strips, model, head, duo.channel[c],
                                       c == 0 ? stored.of[0] : stored.of[1]);
    }
}

// A run of a short body.
template <bool kMost>
__device__ __forceinline__ void prepare_short_run(Memory memory, const EncodePlaneTask& p,
                                                  const RotationTask* r, const PlaneChoice& choice,
                                                  const CoderTables& tables, const DuoRun& run,
                                                  ShortModeller::Counts& counts) {
    if (uniform(choice.quantised) != 0) {
        quantise_run<kMost>(memory, p, r, choice, tables, run);
    } else {
        model_run<kMost>(memory, p, r, tables, run, counts);
    }
}

// ---- exact channels and rows

// The strip of a channel's stored bits.
__device__ void model_channel(const HeadStrips& head, const CoderTables& tables, std::uint32_t channel,
                              const std::byte* row, std::uint32_t* counts) {
    const EncodePlaneTask& p = head.plane;
    const auto bits = [&](std::uint32_t i) { return tile_bits(row, p.source, i); };
    expect_row(row, p.body_tokens * static_cast<std::uint32_t>(dtype_bytes(p.source)));
    const ExponentModel m = exponent_model(tables, p.source, p.body_tokens, counts, bits);
    const SplitByExponent split = {m.center, p.source};
    head.put_part(channel, 0, floats_word(m, p.source), [&](std::uint32_t i) { return split(bits(i)); });
    if (lane_id() != 0) return;
    head.vector(0)[channel] = static_cast<std::int16_t>(m.center);
    head.vector(1)[channel] = static_cast<std::int16_t>(m.table);
}

__device__ KVCAST_APART void prepare_channel(Memory memory, const HeadStrips& strips, const RotationTask* r,
                                             const PlaneChoice& choice, const CoderTables& tables,
                                             std::uint32_t head, std::uint32_t index, std::uint32_t* counts) {
    const EncodePlaneTask& p = strips.plane;
    const TileChannel c = tile_channel(index, r);
    if (uniform(choice.quantised) != 0) {
        put_quantised(Channel(strips, choice, tables, c.channel), TileValues(memory, p, r, head, c));
    } else {
        model_channel(strips, tables, c.channel, tile_row(memory, p, head, c.channel), counts);
    }
}

// A run of duos of a body, by a warp.
__device__ __forceinline__ void prepare_run(Memory memory, const EncodePlaneTask* planes, std::uint32_t count,
                                            std::uint32_t item, const RotationTask* rotations,
                                            const PlaneChoice* choices, const CoderTables& tables,
                                            ShortModeller::Counts& counts) {
    const std::uint32_t plane = task_of_warp<&EncodePlaneTask::first_duo>(planes, count, item);
    const EncodePlaneTask& p = planes[plane];
    if (p.body_tokens == 0) return;
    const PlaneChoice choice = choices[plane];
    const RotationTask* r = p.rotation == kNone ? nullptr : rotations + p.rotation;
    const DuoRun run(p, item - p.first_duo);
    if (uniform(is_short(p) ? 1 : 0) != 0) {
        if (uniform(is_most_of_a_batch(p.body_tokens) ? 1 : 0) != 0) {
            prepare_short_run<true>(memory, p, r, choice, tables, run, counts);
        } else {
            prepare_short_run<false>(memory, p, r, choice, tables, run, counts);
        }
        return;
    }
    for (std::uint32_t head = run.first_head; head < run.end_head; ++head) {
        const HeadStrips strips(memory, p, choice.quantised != 0, head);
        for (std::uint32_t i = 2 * run.index; i < 2 * run.index + 2 && i < p.channels; ++i)
            prepare_channel(memory, strips, r, choice, tables, head, i, counts.of);
    }
}

__device__ BatchWord row_word(const ExponentModel& m, Dtype dtype) {
    return floats_word(m, dtype).after(m.center | m.table << 8);
}

__device__ KVCAST_APART void prepare_any_row(const HeadStrips& strips, std::uint32_t first,
                                             const std::uint8_t* row, const CoderTables& tables,
                                             std::uint32_t* counts) {
    const Dtype dtype = strips.plane.source;
    const auto bits = [&](std::uint32_t c) { return element_of(row, dtype, c); };
    const ExponentModel m = exponent_model(tables, dtype, strips.plane.channels, counts, bits);
    const SplitByExponent split = {m.center, dtype};
    strips.put_wide(first, row_word(m, dtype), [&](std::uint32_t c) { return split(bits(c)); });
}

// A row of bf16 that is one batch.
__device__ __forceinline__ void prepare_short_row(const HeadStrips& strips, std::uint32_t first,
                                                  const std::uint8_t* row, const CoderTables& tables,
                                                  ShortModeller::Counts& counts) {
    const std::uint32_t count = strips.plane.channels;
    const auto inside = [&](std::uint32_t g) { return g * kLanes + lane_id() < count; };
    ExactBatch batch;
    KVCAST_UNROLL(8)
    for (std::uint32_t g = 0; g < kBatchGroups; ++g)
        batch.bits[g] = inside(g) ? element_of(row, Dtype::kBf16, g * kLanes + lane_id()) : 0;
    const ExponentModel m = batch.modelled(ShortModeller(tables, counts), count, inside);
    if (lane_id() == 0) strips.words[first] = row_word(m, Dtype::kBf16).ending(StripList::kWideEnd).bits();
    __syncwarp();
    batch.write(strips.record(first), strips.plane.plane_lines, m, inside);
}

// An exact row of a head, by a warp.
__device__ KVCAST_APART void prepare_row(Memory memory, const EncodePlaneTask* planes, std::uint32_t count,
                                         std::uint32_t item, const PlaneChoice* choices,
                                         const CoderTables& tables, ShortModeller::Counts& counts) {
    const std::uint32_t index = task_of_warp<&EncodePlaneTask::first_row>(planes, count, item);
    const EncodePlaneTask& p = planes[index];
    const std::uint32_t local = item - p.first_row, head = local / p.exact_rows, token = local % p.exact_rows;
    const std::uint8_t* row = row_of(p.in, token) + head * p.in.head_bytes;
    const HeadStrips strips(memory, p, choices[index].quantised != 0, head);
    const std::uint32_t first = strips.list.row(token);
    if (uniform(p.source == Dtype::kBf16 && p.channels <= kBatchValues ? 1 : 0) != 0) {
        prepare_short_row(strips, first, row, tables, counts);
    } else {
        prepare_any_row(strips, first, row, tables, counts.of);
    }
}

// One warp per exact row of a head, and one per run of duos of a body. Rows come first: they are few and take
// long, and nothing waits for them meanwhile.
__global__ void __launch_bounds__(kThreads, kPrepareBlocks)
    prepare_strips(Memory memory, const EncodePlaneTask* planes, Extents n, const RotationTask* rotations,
                   const PlaneChoice* choices, const CoderTables* tables) {
    __shared__ ShortModeller::Counts counts[kWarps];
    const std::uint32_t warp = warp_id(), item = blockIdx.x * kWarps + warp;
    if (item < n.rows) {
        prepare_row(memory, planes, n.planes, item, choices, *tables, counts[warp]);
    } else if (item - n.rows < n.duo_runs) {
        prepare_run(memory, planes, n.planes, item - n.rows, rotations, choices, *tables, counts[warp]);
    }
}

// ---- side vectors

__device__ KVCAST_APART void prepare_any_vector(const HeadStrips& head, std::uint32_t v,
                                                const CoderTables& tables) {
    const std::int16_t* values = head.vector(v);
    const SideVector vector =
        side_vector(tables, head.plane.channels, [&](std::uint32_t c) { return std::int32_t{values[c]}; });
    const BatchWord word = BatchWord::of_class(vector.spread_class);
    const SplitByClass split = {word.planes()};
    head.put_wide(head.list.vector(v), word.after(vector.word()),
                  [&](std::uint32_t c) { return split(values[c] - vector.reference); });
}

// Of a head of up to kGroups * 32 channels, a batch at most.
template <std::uint32_t kGroups>
__device__ __forceinline__ void prepare_short_vector(const HeadStrips& head, std::uint32_t v,
                                                     const CoderTables& tables) {
    const std::int16_t* values = head.vector(v);
    const std::uint32_t batch = head.list.vector(v);
    const ShortVector<kGroups> vector(head.plane.channels,
                                      [&](std::uint32_t c) { return std::int32_t{__ldg(values + c)}; });
    const SideVector chosen = vector.chosen(tables);
    const BatchWord word = BatchWord::of_class(chosen.spread_class);
    if (lane_id() == 0) head.words[batch] = word.after(chosen.word()).ending(StripList::kWideEnd).bits();
    __syncwarp();
    if (!word.coded()) return;
    const SplitByClass split = {word.planes()};
    SplitBatch split_batch;
    KVCAST_UNROLL(8)
    for (std::uint32_t g = 0; g < kBatchGroups; ++g) {
        const SplitValue s =
            vector.inside(g) ? split(vector.value(g % kGroups) - chosen.reference) : SplitValue{0, 0};
        split_batch.high[g] = s.high;
        split_batch.raw[g] = s.raw;
    }
    write_split(head.record(batch), head.plane.plane_lines, word.planes(), split_batch);
}

// One warp per side vector of a head, of channels that are prepared.
__global__ void prepare_vectors(Memory memory, const EncodePlaneTask* planes, std::uint32_t count,
                                std::uint32_t heads, const PlaneChoice* choices, const CoderTables* tables) {
    const std::uint32_t item = blockIdx.x * kWarps + warp_id();
    if (item >= heads * kMostVectors) return;
    const std::uint32_t v = item % kMostVectors;
    const std::uint32_t index =
        task_of_warp<&EncodePlaneTask::first_head>(planes, count, item / kMostVectors);
    const EncodePlaneTask& p = planes[index];
    const HeadStrips head(memory, p, choices[index].quantised != 0, item / kMostVectors - p.first_head);
    if (v >= uniform(head.list.vectors)) return;
    const std::uint32_t channels = uniform(p.channels);
    if (channels <= kBatchValues / 2) {
        prepare_short_vector<kBatchGroups / 2>(head, v, *tables);
    } else if (channels <= kBatchValues) {
        prepare_short_vector<kBatchGroups>(head, v, *tables);
    } else {
        prepare_any_vector(head, v, *tables);
    }
}

}  // namespace

cudaError_t launch_prepare(Memory memory, const EncodePlaneTask* planes, Extents n,
                           const RotationTask* rotations, const CoderTables* tables,
                           const PlaneChoice* choices, cudaStream_t stream) {
    const Shape per_strip = {div_up(n.rows + n.duo_runs, kWarps), kThreads};
    const cudaError_t e =
        launch(prepare_strips, per_strip, stream, memory, planes, n, rotations, choices, tables);
    if (e != cudaSuccess) return e;
    return launch(prepare_vectors, {div_up(n.heads * kMostVectors, kWarps), kThreads}, stream, memory, planes,
                  n.planes, n.heads, choices, tables);
}

}  // namespace kvcast::kernels::cuda
