#include "codec/entropy/model.h"

#include <algorithm>
#include <array>
#include <limits>

namespace kvcast::entropy {
namespace {

#include "codec/entropy/tables.inc"

static_assert(std::size(kFrequencies) == kTables);

using kernels::AliasTable;
using kernels::EncodeTable;
using kernels::kBucketSlots;
using kernels::kSymbols;

// Which symbol fills the front of each bucket is fixed (its own); who fills the rest, FORMAT.md section 5.2
// says.
struct Buckets {
    std::uint32_t divider[kSymbols];
    std::uint32_t other[kSymbols];
};

Buckets fill_buckets(const std::uint16_t (&frequency)[kSymbols]) {
    Buckets b = {};
    std::array<std::uint32_t, kSymbols> left;
    std::copy(std::begin(frequency), std::end(frequency), left.begin());
    std::array<bool, kSymbols> done = {};
    const auto first = [&](auto wanted) {
        std::uint32_t s = 0;
        while (done[s] || !wanted(left[s])) ++s;
        return s;
    };
    for (unsigned round = 0; round < kSymbols; ++round) {
        const std::uint32_t small = first([](std::uint32_t n) { return n <= kBucketSlots; });
        b.divider[small] = left[small];
        b.other[small] = small;
        done[small] = true;
        if (left[small] < kBucketSlots) {
            const std::uint32_t large = first([](std::uint32_t n) { return n > kBucketSlots; });
            b.other[small] = large;
            left[large] -= kBucketSlots - left[small];
        }
    }
    return b;
}

// Walks the slots in order, handing each symbol's slots their ranks.
void build(const std::uint16_t (&frequency)[kSymbols], AliasTable& alias, EncodeTable& encode) {
    const Buckets b = fill_buckets(frequency);
    std::uint32_t total = 0;
    for (unsigned s = 0; s < kSymbols; ++s) {
        encode.frequency[s] = frequency[s];
        encode.start[s] = total;
        total += frequency[s];
    }
    std::array<std::uint32_t, kSymbols> rank = {};
    for (std::uint32_t bucket = 0; bucket < kSymbols; ++bucket) {
        alias.divider[bucket] = b.divider[bucket];
        const std::uint32_t owners[2] = {bucket, b.other[bucket]};
        const std::uint32_t edges[3] = {0, b.divider[bucket], kBucketSlots};
        for (unsigned part = 0; part < 2; ++part) {
            const std::uint32_t s = owners[part];
            const std::uint32_t slot = bucket * kBucketSlots + edges[part];
            alias.entry[2 * bucket + part] = kernels::pack_entry(s, frequency[s], rank[s] - slot);
            for (std::uint32_t i = edges[part]; i < edges[part + 1]; ++i) {
                encode.slot[encode.start[s] + rank[s]++] =
                    static_cast<std::uint16_t>(bucket * kBucketSlots + i);
            }
        }
    }
}

struct AllTables {
    std::array<AliasTable, kTables> alias;
    std::array<EncodeTable, kTables> encode;

    AllTables() {
        for (std::size_t t = 0; t < kTables; ++t) build(kFrequencies[t], alias[t], encode[t]);
    }
};

const AllTables& all_tables() {
    static const AllTables tables;
    return tables;
}

// Cost of a histogram of symbols under a table.
std::uint64_t histogram_cost(std::size_t table, const std::array<std::uint32_t, kSymbols>& counts) {
    std::uint64_t cost = 0;
    for (unsigned s = 0; s < kSymbols; ++s) cost += std::uint64_t{counts[s]} * kCosts[table][s];
    return cost;
}

std::array<std::uint32_t, kSymbols> symbols_around(std::span<const std::uint32_t> counts,
                                                   std::int32_t center) {
    std::array<std::uint32_t, kSymbols> out = {};
    for (std::size_t e = 0; e < counts.size(); ++e) {
        const std::int32_t d = center - static_cast<std::int32_t>(e) + kernels::kSymbolZero;
        out[d >= 0 && d < static_cast<std::int32_t>(kernels::kEscape) ? d : kernels::kEscape] += counts[e];
    }
    return out;
}

}  // namespace

const AliasTable& alias_table(std::size_t table) {
    return all_tables().alias[table];
}
const EncodeTable& encode_table(std::size_t table) {
    return all_tables().encode[table];
}

std::uint32_t symbol_cost(std::size_t table, unsigned symbol) {
    return kCosts[table][symbol];
}

std::uint64_t value_cost(unsigned spread_class, std::int32_t value) {
    const ClassCoding c = class_coding(spread_class);
    const std::int32_t half = c.shift == 0 ? 0 : 1 << (c.shift - 1);
    const std::int32_t high = (value + half) >> c.shift;
    const bool inside = high >= -kernels::kSymbolZero && high <= kernels::kSymbolZero;
    return kCosts[c.table][inside ? static_cast<unsigned>(high + kernels::kSymbolZero) : kernels::kEscape] +
           std::uint64_t{c.shift} * 256;
}

std::uint64_t element_cost(ExponentModel model, kernels::Dtype dtype, std::uint32_t bits) {
    const unsigned mantissa = kernels::mantissa_bits(dtype);
    const std::uint32_t exponent = bits >> mantissa & kernels::exponent_mask(dtype);
    const auto d = static_cast<std::int32_t>(model.center - exponent) + kernels::kSymbolZero;
    const bool inside = d >= 0 && d < static_cast<std::int32_t>(kernels::kEscape);
    return kCosts[kFirstExponentTable + model.table][inside ? static_cast<unsigned>(d) : kernels::kEscape] +
           std::uint64_t{mantissa + 1} * 256;
}

std::span<const std::uint32_t> class_thresholds() {
    return kClassThresholds;
}

unsigned class_for(std::uint64_t sum_of_magnitudes, std::size_t count) {
    if (sum_of_magnitudes == 0) return 0;
    const std::uint64_t mean = sum_of_magnitudes * 256 / count;
    const auto* at = std::upper_bound(std::begin(kClassThresholds), std::end(kClassThresholds), mean);
    return static_cast<unsigned>(at - std::begin(kClassThresholds)) + 1;
}

unsigned cheapest_class(std::span<const std::int16_t> values, std::int32_t reference) {
    const bool all_equal =
        std::all_of(values.begin(), values.end(), [&](std::int16_t v) { return v == reference; });
    if (all_equal) return 0;
    unsigned best = 1;
    std::uint64_t least = std::numeric_limits<std::uint64_t>::max();
    for (unsigned c = 1; c < kClasses; ++c) {
        std::uint64_t cost = 0;
        for (const std::int16_t v : values) cost += value_cost(c, v - reference);
        if (cost < least) {
            least = cost;
            best = c;
        }
    }
    return best;
}

ExponentModel cheapest_exponent_model(std::span<const std::uint32_t> counts) {
    const auto mode =
        static_cast<std::int32_t>(std::max_element(counts.begin(), counts.end()) - counts.begin());
    ExponentModel best = {static_cast<std::uint32_t>(mode), 0};
    std::uint64_t least = std::numeric_limits<std::uint64_t>::max();
    for (std::int32_t center = mode - 1; center <= mode + 1; ++center) {
        if (center < 0 || center >= static_cast<std::int32_t>(counts.size())) continue;
        const auto symbols = symbols_around(counts, center);
        for (std::uint32_t t = 0; t < kExponentTables; ++t) {
            const std::uint64_t cost = histogram_cost(kFirstExponentTable + t, symbols);
            if (cost >= least) continue;
            least = cost;
            best = {static_cast<std::uint32_t>(center), t};
        }
    }
    return best;
}

}  // namespace kvcast::entropy
