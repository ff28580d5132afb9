#include "codec/entropy/model.h"

#include <algorithm>
#include <array>
#include <bit>
#include <limits>
#include <vector>

namespace kvcast::entropy {
namespace {

#include "codec/entropy/tables.inc"

static_assert(std::size(kFrequencies) == kTables);

using kernels::AliasTable;
using kernels::ByteTable;
using kernels::DecodeTable;
using kernels::EncodeBytes;
using kernels::EncodeHalves;
using kernels::EncodeTable;
using kernels::HalfTable;
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
        encode.start[s] = static_cast<std::uint16_t>(total);
        encode.reciprocal[s] = static_cast<std::uint32_t>(
            std::min((std::uint64_t{1} << 32) / frequency[s], std::uint64_t{0xffffffff}));
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

// An alias table in halves. The carry of a slot's bucket doubles the bucket, lets what is within it run over
// into the bit below from the divider on, and takes off bit 14, which a sixth bit of low / 1024 would show.
HalfTable half_table(const AliasTable& alias) {
    HalfTable out = {};
    for (std::uint32_t i = 0; i < 2 * kSymbols; ++i) {
        const std::uint32_t bucket = i % kSymbols, above = i / kSymbols;
        out.carry[i] = static_cast<std::uint16_t>((bucket + 1) * kBucketSlots - alias.divider[bucket] -
                                                  above * kernels::kProbabilityTotal);
        const std::uint32_t entry = alias.entry[i];
        const std::uint32_t slot = i / 2 * kBucketSlots + (i % 2 == 0 ? 0 : alias.divider[i / 2]);
        const std::uint32_t rank = (slot + kernels::entry_adjust(entry)) & kernels::kProbabilityMask;
        out.frequency[i] = static_cast<std::uint16_t>(kernels::entry_frequency(entry) * 4);
        out.rank[i] = static_cast<std::uint16_t>(rank - slot);
        const std::uint32_t symbol = kernels::entry_symbol(entry);
        out.value[i] = symbol == kernels::kEscape
                           ? kernels::kEscapeMark
                           : static_cast<std::int16_t>(static_cast<int>(symbol) - kernels::kSymbolZero);
        out.symbol[i] = static_cast<std::uint16_t>(2 * symbol);
    }
    return out;
}

template <std::size_t N>
void put(std::uint8_t (&bytes)[2][N], std::size_t at, std::uint32_t number) {
    bytes[0][at] = static_cast<std::uint8_t>(number);
    bytes[1][at] = static_cast<std::uint8_t>(number >> 8);
}

ByteTable byte_table(const DecodeTable& t) {
    ByteTable out = {};
    for (std::size_t b = 0; b < kSymbols; ++b) {
        put(out.last, b, t.alias.divider[b] - 1);
        out.second[b] = static_cast<std::uint8_t>(kernels::entry_symbol(t.alias.entry[2 * b + 1]));
        for (std::size_t e = 0; e < 2; ++e) {
            put(out.rank[e], b, t.halves.rank[2 * b + e]);
            put(out.frequency, kernels::entry_symbol(t.alias.entry[2 * b + e]),
                t.halves.frequency[2 * b + e]);
        }
    }
    return out;
}

constexpr std::uint32_t kCellRanks = 1u << EncodeHalves::kCellBits;

// The ranks of a symbol whose slot does not follow the slot before.
std::vector<std::uint32_t> jumps_of(std::span<const std::uint16_t> slot) {
    std::vector<std::uint32_t> jumps;
    for (std::uint32_t r = 1; r < slot.size(); ++r) {
        if (slot[r] != slot[r - 1] + 1) jumps.push_back(r);
    }
    return jumps;
}

// How far into its first cell a symbol's ranks begin, so that no cell has more jumps inside than bounds: not
// at all, or so that a jump meets the edge of a cell.
std::uint32_t phase_for(std::span<const std::uint32_t> jumps) {
    const auto fits = [&](std::uint32_t phase) {
        std::size_t inside = 0;
        std::uint32_t cell = 0;
        for (const std::uint32_t jump : jumps) {
            const std::uint32_t at = jump + phase;
            if (at % kCellRanks == 0) continue;
            inside = at / kCellRanks == cell ? inside + 1 : 1;
            cell = at / kCellRanks;
            if (inside > EncodeHalves::kBounds) return false;
        }
        return true;
    };
    std::uint32_t phase = 0;
    for (std::size_t i = 0; !fits(phase); ++i) phase = (kCellRanks - jumps[i] % kCellRanks) % kCellRanks;
    return phase;
}

// The slots of a symbol's ranks, cell by cell.
void fill_cells(std::span<const std::uint16_t> slot, std::uint32_t first, EncodeHalves& out) {
    std::size_t bounds = 0;
    for (std::uint32_t r = 0; r < slot.size(); ++r) {
        const std::uint32_t index = first + r, cell = index / kCellRanks;
        const auto offset = static_cast<std::uint16_t>(slot[r] - index);
        if (r == 0 || index % kCellRanks == 0) {
            bounds = 0;
        } else if (offset != out.offset[bounds][cell]) {
            out.bound[bounds++][cell] = static_cast<std::uint16_t>(index);
        }
        for (std::size_t n = bounds; n <= EncodeHalves::kBounds; ++n) out.offset[n][cell] = offset;
    }
}

EncodeHalves encode_halves(const EncodeTable& encode) {
    EncodeHalves out = {};
    for (auto& bound : out.bound) std::fill(std::begin(bound), std::end(bound), std::uint16_t{0xffff});
    std::uint32_t cell = 0;
    for (std::size_t s = 0; s < kSymbols; ++s) {
        const std::uint32_t divisor = encode.frequency[s] * 4;
        const auto shift = static_cast<unsigned>(std::countl_zero(static_cast<std::uint16_t>(divisor)));
        out.frequency[s] = static_cast<std::uint16_t>(divisor);
        out.shift[s] = static_cast<std::uint16_t>(shift);
        out.reciprocal[s] = static_cast<std::uint16_t>(0xffffffffu / (divisor << shift) - 0x10000u);
        const std::span slot(encode.slot + encode.start[s], encode.frequency[s]);
        const std::uint32_t begin = cell * kCellRanks + phase_for(jumps_of(slot));
        out.first[s] = static_cast<std::uint16_t>(begin);
        fill_cells(slot, begin, out);
        cell = (begin + encode.frequency[s] + kCellRanks - 1) / kCellRanks;
    }
    return out;
}

EncodeBytes encode_bytes(const EncodeHalves& h) {
    EncodeBytes out = {};
    for (std::size_t s = 0; s < kSymbols; ++s) {
        put(out.frequency, s, h.frequency[s]);
        put(out.scale, s, 1u << h.shift[s]);
        put(out.reciprocal, s, h.reciprocal[s]);
        put(out.first, s, h.first[s]);
    }
    for (std::size_t cell = 0; cell < EncodeBytes::kCells; ++cell) {
        for (std::size_t n = 0; n < EncodeBytes::kBounds; ++n) put(out.bound[n], cell, h.bound[n][cell]);
        for (std::size_t n = 0; n <= EncodeBytes::kBounds; ++n) {
            const std::uint32_t before = n == 0 ? 0u : h.offset[n - 1][cell];
            put(out.offset[n], cell, h.offset[n][cell] - before);
        }
    }
    return out;
}

struct AllTables {
    std::array<DecodeTable, kTables> decode;
    std::array<EncodeTable, kTables> encode;

    AllTables() {
        for (std::size_t t = 0; t < kTables; ++t) {
            build(kFrequencies[t], decode[t].alias, encode[t]);
            decode[t].halves = half_table(decode[t].alias);
            decode[t].bytes = byte_table(decode[t]);
            encode[t].halves = encode_halves(encode[t]);
            encode[t].bytes = encode_bytes(encode[t].halves);
        }
    }
};

const AllTables& all_tables() {
    static const AllTables tables;
    return tables;
}

// As Ops::choose_exponents takes them.
struct ExponentCosts {
    alignas(64) kernels::ExponentCosts of;

    ExponentCosts() {
        for (std::size_t s = 0; s < kSymbols; ++s) {
            for (std::size_t t = 0; t < kExponentTables; ++t) {
                const std::uint16_t* costs = kCosts[kFirstExponentTable + t];
                const int beyond = s == kernels::kEscape ? 0 : costs[kernels::kEscape];
                of[s / 2][t][s % 2] = static_cast<std::int16_t>(costs[s] - beyond);
            }
        }
    }
};

const ExponentCosts& exponent_costs() {
    static const ExponentCosts costs;
    return costs;
}

}  // namespace

const DecodeTable& decode_table(std::size_t table) {
    return all_tables().decode[table];
}

const ClassDecoding* class_decodings() {
    static const std::array<ClassDecoding, kClasses> decodings = [] {
        std::array<ClassDecoding, kClasses> out = {};
        for (unsigned c = 1; c < kClasses; ++c)
            out[c] = {&decode_table(class_coding(c).table), class_coding(c).shift};
        return out;
    }();
    return decodings.data();
}

kernels::Strip decoding_strip(unsigned spread_class, std::size_t count, std::int16_t* values) {
    const ClassDecoding& c = class_decodings()[spread_class];
    return {c.table, c.shift, count, values, nullptr, 0};
}

const DecodeTable* exponent_decodings() {
    return &all_tables().decode[kFirstExponentTable];
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

namespace {

// [bits]: thresholds that are at most 2^(bits - 1), which any mean of so many bits has reached.
constexpr auto kReached = [] {
    std::array<std::uint8_t, 65> reached = {};
    for (unsigned bits = 1; bits < reached.size(); ++bits) {
        while (reached[bits] < std::size(kClassThresholds) &&
               kClassThresholds[reached[bits]] <= std::uint64_t{1} << (bits - 1))
            ++reached[bits];
    }
    return reached;
}();

// With one behind them that no mean reaches.
constexpr auto kThresholds = [] {
    std::array<std::uint64_t, std::size(kClassThresholds) + 1> out = {};
    std::copy(std::begin(kClassThresholds), std::end(kClassThresholds), out.begin());
    out.back() = 1u << 31;
    return out;
}();

// Thresholds within two octaves, which is how little is known of a quotient by the bits of its parts.
constexpr unsigned kWithinTwoOctaves = [] {
    unsigned most = 0;
    for (std::size_t i = 0; i < std::size(kClassThresholds); ++i) {
        unsigned n = 0;
        while (kThresholds[i + n] <= 4 * kThresholds[i]) ++n;
        most = std::max(most, n);
    }
    return most;
}();

}  // namespace

// The mean reaches a threshold where the sum reaches so much of it for each value.
unsigned class_for(std::uint64_t sum_of_magnitudes, std::size_t count) {
    if (sum_of_magnitudes == 0) return 0;
    const std::uint64_t sum = sum_of_magnitudes * 256;
    const int least_bits = static_cast<int>(std::bit_width(sum)) - static_cast<int>(std::bit_width(count));
    unsigned c = kReached[static_cast<std::size_t>(std::max(least_bits, 0))];
    for (unsigned i = 0; i < kWithinTwoOctaves; ++i)
        c += static_cast<unsigned>(kThresholds[c] * count <= sum);
    return c + 1;
}

namespace {

using SymbolCounts = std::array<std::int32_t, kSymbols>;

// How many of some values are below a bound. Values that lie close together are counted once, for all bounds.
class Distribution {
  public:
    explicit Distribution(std::span<const std::int16_t> values) : values_(values) {
        const auto [least, most] = std::minmax_element(values.begin(), values.end());
        least_ = *least;
        range_ = *most - *least + 1;
        if (range_ >= kRange) return;
        std::fill_n(below_.begin(), range_ + 1, 0u);
        for (const std::int16_t v : values) ++below_[static_cast<std::size_t>(v - least_) + 1];
        for (std::int32_t i = 0; i < range_; ++i)
            below_[static_cast<std::size_t>(i) + 1] += below_[static_cast<std::size_t>(i)];
    }

    bool is_one_value() const { return range_ == 1; }

    // The value in the middle of all in order, the upper one of two.
    std::int32_t median() const {
        const std::size_t middle = values_.size() / 2;
        if (range_ >= kRange) {
            std::vector<std::int16_t> sorted(values_.begin(), values_.end());
            const auto place = sorted.begin() + static_cast<std::ptrdiff_t>(middle);
            std::nth_element(sorted.begin(), place, sorted.end());
            return *place;
        }
        const auto* end = below_.data() + range_ + 1;
        return least_ +
               static_cast<std::int32_t>(std::upper_bound(below_.data(), end, middle) - below_.data()) - 1;
    }

    // How often each symbol occurs where values, as differences to `reference`, lose their lowest bits.
    SymbolCounts symbols(std::int32_t reference, unsigned shift) const {
        const std::int32_t half = shift == 0 ? 0 : 1 << (shift - 1);
        SymbolCounts counts = {};
        if (range_ >= kRange) {
            for (const std::int16_t v : values_) {
                const auto symbol =
                    static_cast<std::uint32_t>(((v - reference + half) >> shift) + kernels::kSymbolZero);
                ++counts[std::min(symbol, std::uint32_t{kernels::kEscape})];
            }
            return counts;
        }
        std::int32_t inside = 0;
        std::int32_t bound = reference - half - least_ - (kernels::kSymbolZero << shift);
        std::int32_t before = below(bound);
        for (std::size_t s = 0; s < kernels::kEscape; ++s) {
            const std::int32_t after = below(bound += 1 << shift);
            counts[s] = after - before;
            inside += counts[s];
            before = after;
        }
        counts[kernels::kEscape] = static_cast<std::int32_t>(values_.size()) - inside;
        return counts;
    }

  private:
    static constexpr std::int32_t kRange = 512;

    // `bound` is relative to the least value.
    std::int32_t below(std::int32_t bound) const {
        return static_cast<std::int32_t>(below_[static_cast<std::size_t>(std::clamp(bound, 0, range_))]);
    }

    std::span<const std::int16_t> values_;
    std::int32_t least_ = 0;
    std::int32_t range_ = 0;
    std::array<std::uint32_t, kRange + 1> below_;  // [value - least_]
};

std::uint64_t cost_of(const SymbolCounts& counts, std::size_t table) {
    std::uint64_t cost = 0;
    for (std::size_t s = 0; s < kSymbols; ++s)
        cost += static_cast<std::uint32_t>(counts[s]) * std::uint64_t{kCosts[table][s]};
    return cost;
}

}  // namespace

// Of classes that cost the same, the lowest.
VectorModel cheapest_vector_model(std::span<const std::int16_t> values) {
    if (values.empty()) return {0, 0};
    const Distribution distribution(values);
    VectorModel model = {std::clamp(distribution.median(), kLeastReference, kMostReference), 0};
    if (distribution.is_one_value() && values[0] == model.reference) return model;
    std::uint64_t least = std::numeric_limits<std::uint64_t>::max();
    // Raw bits alone may cost as much; so do more of them.
    for (unsigned c = 1, shift = 0; c < kClasses && std::uint64_t{shift} * 256 * values.size() < least;
         ++shift) {
        const SymbolCounts counts = distribution.symbols(model.reference, shift);
        for (; c < kClasses && class_coding(c).shift == shift; ++c) {
            const std::uint64_t cost =
                std::uint64_t{shift} * 256 * values.size() + cost_of(counts, class_coding(c).table);
            if (cost >= least) continue;
            least = cost;
            model.spread_class = c;
        }
    }
    return model;
}

void cheapest_exponent_models(const kernels::Ops& ops, const kernels::ElementRows& rows,
                              std::span<ExponentModel> models) {
    constexpr std::size_t kAtOnce = 64;
    std::array<std::uint32_t, kAtOnce> chosen;
    kernels::ElementRows some = rows;
    for (std::size_t i = 0; i < rows.rows; i += kAtOnce) {
        some.elements = rows.row(i);
        some.rows = std::min(kAtOnce, rows.rows - i);
        ops.choose_exponents(some, exponent_costs().of, chosen.data());
        for (std::size_t k = 0; k < some.rows; ++k)
            models[i + k] = {chosen[k] / kSymbols, chosen[k] % kSymbols};
    }
}

}  // namespace kvcast::entropy
