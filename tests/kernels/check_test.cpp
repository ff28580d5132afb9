// Every slot of every backend gives what the scalar one gives: odd sizes, odd alignments, damaged streams,
// and nothing read or written outside. A slot that a backend has not replaced is compared with itself.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <random>
#include <string_view>
#include <vector>

#include "codec/entropy/model.h"
#include "codec/rope/rope_table.h"
#include "kernels/ops.h"
#include "tests/guarded.h"

namespace kvcast::test {
namespace {

using namespace kernels;

class Backend : public testing::TestWithParam<const Ops*> {};

// A projection within its contract, from memory of any alignment, with guards around the sums.
struct Problem {
    std::size_t inputs = 0;
    std::size_t outputs = 0;
    std::size_t tokens = 0;
    std::size_t offset = 0;  // of all arrays, in elements
    double zeros = 0;        // share of features that are zero
    bool extreme = false;    // largest magnitudes that the contract allows
    std::int32_t multiplier = 1;
    int most_feature = 32767;  // largest magnitudes of random ones
    int most_entry = 32767;
    std::size_t wide_every = 0;  // every so many tokens, one has a random one of any magnitude
};

constexpr std::int32_t kGuard = 0x5a5a5a5a;

struct Run {
    std::vector<std::int16_t> features;
    std::vector<std::int16_t> matrix;
    PackedMatrix packed;
    std::vector<std::uint8_t> shifts;
    std::vector<std::int32_t> sums;
    Projection projection = {};
};

Run make(const Problem& p, std::uint64_t seed) {
    std::mt19937_64 random(seed);
    Run r = {};
    const std::size_t feature_stride = p.inputs + seed % 3, sum_stride = p.outputs + seed % 5;
    r.features.resize(p.offset + p.tokens * feature_stride + 1);
    r.matrix.resize(p.offset + p.inputs * p.outputs);
    r.shifts.resize(p.offset + p.outputs);
    r.sums.assign(p.offset + p.tokens * sum_stride + 16, kGuard);
    for (auto& f : r.features) {
        const bool zero = std::uniform_real_distribution<double>(0, 1)(random) < p.zeros;
        const auto x = p.extreme ? -32768 : static_cast<std::int16_t>(random()) % (p.most_feature + 1);
        f = static_cast<std::int16_t>(zero ? 0 : x);
    }
    // Nothing but zeros behind some feature, of each token another one.
    for (std::size_t t = 0; t < p.tokens && p.zeros > 0; ++t) {
        const auto row = r.features.begin() + static_cast<std::ptrdiff_t>(p.offset + t * feature_stride);
        std::fill(row + static_cast<std::ptrdiff_t>(random() % (p.inputs + 1)),
                  row + static_cast<std::ptrdiff_t>(p.inputs), std::int16_t{0});
    }
    for (std::size_t t = 0; p.wide_every != 0 && t < p.tokens; t += p.wide_every)
        r.features[p.offset + t * feature_stride + random() % p.inputs] = static_cast<std::int16_t>(random());
    const auto bound = static_cast<std::int64_t>(65024 / std::max<std::size_t>(p.inputs, 2));
    const auto most = std::min<std::int64_t>(bound, p.most_entry);
    for (auto& m : r.matrix) {
        const auto x = p.extreme ? -most : static_cast<std::int64_t>(random() % (2 * most + 1)) - most;
        m = static_cast<std::int16_t>(std::clamp<std::int64_t>(x, -32768, 32767));
    }
    for (auto& s : r.shifts) s = static_cast<std::uint8_t>(4 + random() % 20);
    for (std::size_t t = 0; t < p.tokens; ++t) {
        for (std::size_t o = 0; o < p.outputs; ++o)
            r.sums[p.offset + t * sum_stride + o] = static_cast<std::int32_t>(random() % 2000) - 1000;
    }
    r.packed = pack_matrix(std::span(r.matrix).subspan(p.offset), p.outputs, p.inputs);
    r.projection = {r.features.data() + p.offset,
                    feature_stride,
                    p.inputs,
                    r.matrix.data() + p.offset,
                    nullptr,
                    r.shifts.data() + p.offset,
                    p.outputs,
                    p.tokens,
                    r.sums.data() + p.offset,
                    sum_stride,
                    p.multiplier};
    return r;
}

std::vector<Problem> problems() {
    std::vector<Problem> out;
    for (const std::size_t inputs : {1, 2, 3, 31, 32, 33, 64, 65, 192, 320, 511, 512, 513, 2048, 2049}) {
        for (const std::size_t outputs : {1, 7, 16, 17, 31, 48, 64, 65, 100, 192, 193, 257})
            out.push_back({inputs, outputs, inputs % 9 + 1, outputs % 4, inputs % 2 ? 0.9 : 0.0, false});
    }
    out.push_back({192, 192, 256, 0, 0.8, false});
    out.push_back({192, 192, 5, 1, 0, true});
    out.push_back({2, 40, 5, 1, 0, true});
    out.push_back({4097, 33, 3, 0, 0, false});
    // Every number of limbs, multiplied, in whole and broken groups of tokens.
    for (const int most_feature : {100, 127, 128, 7000}) {
        for (const int most_entry : {100, 128, 300}) {
            for (const std::size_t tokens : {1, 16, 17, 33, 64, 65, 130}) {
                const int multiplier = 1 + most_entry % 4;
                out.push_back({200, 49, tokens, 0, tokens % 2 ? 0.95 : 0.0, false, multiplier, most_feature,
                               most_entry});
            }
        }
    }
    // Of few tokens of a group, or of groups, not all features are narrow; groups by the hundred.
    for (const std::size_t inputs : {1, 30, 33, 127, 192, 320, 4096, 8200})
        out.push_back({inputs, 70, 131, inputs % 2, 0.3, false, 3, 128, 127, 11});
    out.push_back({192, 64, 64, 0, 1, false});
    for (const auto& [inputs, outputs, tokens] : {std::tuple(64, 64, 0), {0, 20, 5}, {64, 0, 5}})
        out.push_back({std::size_t(inputs), std::size_t(outputs), std::size_t(tokens), 0, 0, false});
    return out;
}

TEST_P(Backend, ProjectsLikeScalar) {
    std::uint64_t seed = 1;
    for (const Problem& p : problems()) {
        auto expected = make(p, seed), got = make(p, seed);
        got.projection.packed = &got.packed;
        scalar_ops().project(expected.projection);
        GetParam()->project(got.projection);
        ASSERT_EQ(got.sums, expected.sums)
            << p.inputs << " inputs, " << p.outputs << " outputs, " << p.tokens;
        ++seed;
    }
}

// ---- strips ----

constexpr std::size_t kRoom = 64;

struct StripCase {
    unsigned spread_class;
    std::size_t count;
};

// Strips of odd lengths and every class, some of them not coded, with values far beyond their class.
std::vector<StripCase> strip_cases(std::uint64_t seed) {
    std::mt19937_64 random(seed);
    std::vector<StripCase> out;
    for (const std::size_t count : {0, 1, 2, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 252, 256, 300})
        out.push_back({static_cast<unsigned>(random() % entropy::kClasses), count});
    for (unsigned c = 0; c < entropy::kClasses; ++c) out.push_back({c, 1 + random() % 100});
    return out;
}

std::vector<std::int16_t> strip_values(const StripCase& c, std::mt19937_64& random) {
    std::vector<std::int16_t> out(c.count);
    if (c.spread_class == 0) return out;
    std::normal_distribution<double> draw(0, 0.125 * std::exp2(0.5 * (c.spread_class - 1.0)));
    for (auto& v : out) {
        const double wide = random() % 50 == 0 ? 40 : 1;
        v = static_cast<std::int16_t>(std::clamp(std::nearbyint(draw(random) * wide), -28000.0, 28000.0));
    }
    return out;
}

// What an encoder wrote, and its states.
struct Stream {
    std::vector<std::uint8_t> bytes;
    std::vector<std::uint32_t> states;
    bool operator==(const Stream&) const = default;
};

// Encodes through guarded memory with no more room than the contract asks for; damage in front is noticed.
template <typename F>
std::vector<Stream> encode_with(std::size_t encoders, std::size_t room, F&& encode) {
    std::vector<std::unique_ptr<Guarded<std::uint8_t>>> memory;
    std::vector<RansEncoder> state(encoders);
    std::vector<RansEncoder*> pointers;
    for (RansEncoder& e : state) {
        memory.push_back(std::make_unique<Guarded<std::uint8_t>>(room + kRoom));
        std::fill(std::begin(e.state), std::end(e.state), kStateLow);
        e.next = memory.back()->data() + room + kRoom;
        pointers.push_back(&e);
    }
    encode(std::span<RansEncoder* const>(pointers));
    std::vector<Stream> out;
    for (std::size_t i = 0; i < encoders; ++i) {
        EXPECT_TRUE(memory[i]->intact());
        const std::uint8_t* end = memory[i]->data() + room + kRoom;
        out.push_back({{static_cast<const std::uint8_t*>(state[i].next), end},
                       {std::begin(state[i].state), std::end(state[i].state)}});
    }
    return out;
}

// Where decoders stopped, and what they found.
struct Decoded {
    std::vector<std::vector<std::int32_t>> values;
    std::vector<std::vector<std::uint32_t>> states;
    std::vector<std::ptrdiff_t> left;
    std::vector<bool> overrun;
    bool operator==(const Decoded&) const = default;
};

template <typename F>
Decoded decode_with(const std::vector<Stream>& streams, F&& decode) {
    std::vector<std::unique_ptr<Guarded<std::uint8_t>>> memory;
    std::vector<RansDecoder> state(streams.size());
    std::vector<RansDecoder*> pointers;
    for (std::size_t i = 0; i < streams.size(); ++i) {
        memory.push_back(
            std::make_unique<Guarded<std::uint8_t>>(std::span<const std::uint8_t>(streams[i].bytes)));
        std::copy(streams[i].states.begin(), streams[i].states.end(), state[i].state);
        state[i].next = memory[i]->data();
        state[i].end = memory[i]->data() + streams[i].bytes.size();
        state[i].overrun = 0;
        pointers.push_back(&state[i]);
    }
    Decoded out;
    out.values = decode(std::span<RansDecoder* const>(pointers));
    for (const RansDecoder& d : state) {
        out.states.emplace_back(std::begin(d.state), std::end(d.state));
        out.left.push_back(d.end - d.next);
        out.overrun.push_back(d.overrun != 0);
    }
    return out;
}

// Rows that leave while something is decoded, of odd numbers and none, into memory with other rows between.
class Leaving {
  public:
    explicit Leaving(std::uint64_t seed) {
        std::mt19937_64 random(seed);
        for (std::size_t i = 0; i < seed % 4; ++i) {
            const std::size_t row = (1 + random() % 4) * Outgoing::kLine, rows = random() % 90;
            const std::size_t stride = row + random() % 3 * Outgoing::kLine;
            std::vector<std::uint8_t> bytes(row * rows), there(stride * rows, 0xee);
            for (auto& b : bytes) b = static_cast<std::uint8_t>(random());
            from_.push_back(std::make_unique<Guarded<std::uint8_t>>(bytes));
            to_.push_back(std::make_unique<Guarded<std::uint8_t>>(there));
            outgoing_.push_back(
                {from_.back()->data(), to_.back()->data(), row, stride - row, row, row * rows});
            for (std::size_t r = 0; r < rows; ++r)
                std::memcpy(there.data() + r * stride, bytes.data() + r * row, row);
            expected_.push_back(there);
        }
    }

    std::span<Outgoing> outgoing() { return outgoing_; }

    std::size_t left() const {
        std::size_t bytes = 0;
        for (const Outgoing& o : outgoing_) bytes += o.left;
        return bytes;
    }

    // Sends what is left; whether all has arrived, and nothing else was touched.
    bool arrived(const Ops& ops) {
        for (Outgoing& o : outgoing_) ops.send(o);
        bool same = left() == 0;
        for (std::size_t i = 0; i < to_.size(); ++i)
            same = same && to_[i]->intact() && to_[i]->values() == expected_[i];
        return same;
    }

  private:
    std::vector<std::unique_ptr<Guarded<std::uint8_t>>> from_;
    std::vector<std::unique_ptr<Guarded<std::uint8_t>>> to_;
    std::vector<Outgoing> outgoing_;
    std::vector<std::vector<std::uint8_t>> expected_;
};

// Some strips per decoder, encoded by `ops` side by side.
struct StripProblem {
    std::size_t abreast;
    std::vector<StripCase> cases;                   // [step * abreast + decoder]
    std::vector<std::vector<std::int16_t>> values;  // the same

    StripProblem(std::size_t n, bool same_counts, std::uint64_t seed) : abreast(n) {
        std::mt19937_64 random(seed);
        for (const StripCase& c : strip_cases(seed)) {
            for (std::size_t d = 0; d < n; ++d) {
                StripCase own = c;
                if (d != 0) own.spread_class = static_cast<unsigned>(random() % entropy::kClasses);
                if (d != 0 && !same_counts) own.count = random() % 80;
                cases.push_back(own);
                values.push_back(strip_values(own, random));
            }
        }
    }

    std::vector<Stream> encode(const Ops& ops) const {
        std::size_t room = 0;
        for (const StripCase& c : cases) room += 4 * c.count + (c.count + 15) / 16 * 2 * 12;
        return encode_with(abreast, room, [&](std::span<RansEncoder* const> encoders) {
            // Strips of class 0 are not coded: each encoder has its own number of strips.
            for (std::size_t step = cases.size() / abreast; step-- > 0;) {
                std::vector<EncodeStrip> strips;
                std::vector<RansEncoder*> active;
                for (std::size_t d = 0; d < abreast; ++d) {
                    const std::size_t i = step * abreast + d;
                    if (cases[i].spread_class == 0) continue;
                    const entropy::ClassCoding c = entropy::class_coding(cases[i].spread_class);
                    strips.push_back(
                        {&entropy::encode_table(c.table), c.shift, cases[i].count, values[i].data()});
                    active.push_back(encoders[d]);
                }
                ops.encode_strips(active, strips);
            }
        });
    }

    // To values, or to what `meant` makes of strip number i.
    Decoded decode(const Ops& ops, const std::vector<Stream>& streams,
                   const std::function<void(std::size_t, Strip&)>& meant = {}) const {
        return decode_with(streams, [&](std::span<RansDecoder* const> decoders) {
            std::vector<std::unique_ptr<Guarded<std::int16_t>>> out;
            std::vector<Strip> strips;
            for (const StripCase& c : cases) {
                out.push_back(std::make_unique<Guarded<std::int16_t>>(c.count));
                const auto coding = entropy::class_coding(std::max(c.spread_class, 1u));
                strips.push_back({c.spread_class == 0 ? nullptr : &entropy::decode_table(coding.table),
                                  coding.shift, c.count, out.back()->data()});
                if (meant) meant(strips.size() - 1, strips.back());
            }
            Leaving leaving(streams.size());
            ops.decode_strips(decoders, strips, leaving.outgoing());
            EXPECT_TRUE(leaving.arrived(ops));
            std::vector<std::vector<std::int32_t>> got;
            for (auto& v : out) {
                EXPECT_TRUE(v->intact());
                const auto read = v->values();
                got.emplace_back(read.begin(), read.end());
            }
            return got;
        });
    }
};

TEST_P(Backend, CodesStripsLikeScalar) {
    for (const std::size_t abreast : {1, 2, 3, 4, 5, 7}) {
        for (const bool same : {true, false}) {
            const StripProblem problem(abreast, same, abreast);
            const auto streams = problem.encode(scalar_ops());
            ASSERT_EQ(problem.encode(*GetParam()), streams) << abreast;
            const Decoded expected = problem.decode(scalar_ops(), streams);
            ASSERT_EQ(problem.decode(*GetParam(), streams), expected) << abreast;
            for (std::size_t i = 0; i < problem.values.size(); ++i)
                ASSERT_TRUE(std::equal(problem.values[i].begin(), problem.values[i].end(),
                                       expected.values[i].begin(), expected.values[i].end()));
            for (const auto left : expected.left) ASSERT_EQ(left, 0);
        }
    }
}

// States and elements of values, for means at both ends of their range and between.
TEST_P(Backend, MakesOfStripsWhatTheyMean) {
    for (const std::size_t abreast : {1, 2, 3, 4}) {
        const StripProblem problem(abreast, true, 10 + abreast);
        const auto streams = problem.encode(scalar_ops());
        for (int round = 0; round < 40; ++round) {
            std::mt19937_64 random(static_cast<std::uint64_t>(round));
            std::vector<Meaning> meanings;
            const int exponents[] = {kMinExponent, -12, kMaxExponent};
            for (std::size_t d = 0; d < abreast; ++d) {
                meanings.push_back(
                    {static_cast<unsigned>(random() % 15),
                     std::nullopt,
                     {static_cast<std::int32_t>(128 + random() % 128), exponents[random() % 3]}});
                if (random() % 3 != 0) meanings.back().dtype = random() % 2 == 0 ? Dtype::kBf16 : Dtype::kF16;
            }
            std::vector<std::int16_t> means;
            for (std::size_t i = 0; i < problem.cases.size(); ++i) {
                const auto near = static_cast<int>(random() % 9);
                const int ends[] = {32767 - near, near - 32768,
                                    static_cast<std::int16_t>(random() >> random() % 16)};
                means.push_back(static_cast<std::int16_t>(ends[random() % 3]));
            }
            const auto meant = [&](std::size_t i, Strip& strip) {
                strip.meaning = &meanings[i % abreast];
                strip.mean = means[i];
            };
            Decoded expected = problem.decode(scalar_ops(), streams);
            for (std::size_t i = 0; i < expected.values.size(); ++i) {
                const Meaning& m = meanings[i % abreast];
                for (auto& v : expected.values[i]) {
                    const std::int16_t state = state_of(means[i], static_cast<std::int16_t>(v), m.shift);
                    v = m.dtype ? static_cast<std::int16_t>(to_bits(*m.dtype, value_of(state, m.scale)))
                                : state;
                }
            }
            ASSERT_EQ(problem.decode(scalar_ops(), streams, meant), expected) << round;
            ASSERT_EQ(problem.decode(*GetParam(), streams, meant), expected) << round << " of " << abreast;
        }
    }
}

TEST_P(Backend, SendsRowsMeanwhile) {
    const StripProblem problem(4, true, 3);
    const auto streams = problem.encode(scalar_ops());
    for (std::uint64_t seed = 0; seed < 40; ++seed) {
        Leaving leaving(seed);
        const std::size_t before = leaving.left();
        std::vector<std::vector<std::int16_t>> out;
        decode_with(streams, [&](std::span<RansDecoder* const> decoders) {
            std::vector<Strip> strips;
            for (const StripCase& c : problem.cases) {
                const auto coding = entropy::class_coding(std::max(c.spread_class, 1u));
                out.emplace_back(c.count);
                strips.push_back({c.spread_class == 0 ? nullptr : &entropy::decode_table(coding.table),
                                  coding.shift, c.count, out.back().data()});
            }
            GetParam()->decode_strips(decoders, strips, leaving.outgoing());
            return std::vector<std::vector<std::int32_t>>();
        });
        ASSERT_TRUE(before == 0 || leaving.left() < before) << seed;
        ASSERT_TRUE(leaving.arrived(*GetParam())) << seed;
    }
}

// Cut, flipped and random: whatever scalar makes of it, at whatever length.
template <typename Problem>
void compare_damaged(const Problem& problem, const Ops& ops, int rounds) {
    std::mt19937_64 random(1);
    const auto whole = problem.encode(scalar_ops());
    for (int round = 0; round < rounds; ++round) {
        auto streams = whole;
        for (Stream& s : streams) {
            if (round % 3 == 0) s.bytes.resize(random() % (s.bytes.size() + 1));
            if (round % 3 == 1 && !s.bytes.empty())
                s.bytes[random() % s.bytes.size()] ^= static_cast<std::uint8_t>(1u << random() % 8);
            if (round % 3 == 2) {
                s.bytes.resize(random() % 700);
                for (auto& b : s.bytes) b = static_cast<std::uint8_t>(random());
                for (auto& x : s.states) x = static_cast<std::uint32_t>(random());
            }
        }
        ASSERT_EQ(problem.decode(ops, streams), problem.decode(scalar_ops(), streams)) << round;
    }
}

TEST_P(Backend, CodesNothingAtAll) {
    RansDecoder decoder = {};
    RansDecoder* const one = &decoder;
    const Ops& ops = *GetParam();
    ops.decode_strips({&one, 1}, {}, {});
    ops.decode_strips({}, {}, {});
    ops.encode_strips({}, {});
    ops.decode_floats({}, {}, Dtype::kBf16, 8, {});
    Outgoing nothing;
    ops.send(nothing);
    ops.encode_floats({}, {}, Dtype::kBf16, 8);
    EXPECT_EQ(decoder.overrun, 0u);
}

TEST_P(Backend, ReadsDamagedStripsLikeScalar) {
    for (const std::size_t abreast : {1, 2, 4})
        compare_damaged(StripProblem(abreast, true, 3), *GetParam(), 150);
}

// ---- floats ----

// Runs one slot on guarded arrays and returns what it wrote.
template <typename T, typename F>
std::vector<T> written(std::size_t count, T fill, F&& run) {
    const std::vector<T> before(count, fill);
    Guarded<T> out{std::span<const T>(before)};
    run(out.data());
    EXPECT_TRUE(out.intact());
    return out.values();
}

// Some strips of as many elements each per decoder.
struct FloatProblem {
    static constexpr std::size_t kSteps = 2;

    Dtype dtype;
    std::size_t count;
    std::size_t abreast;
    std::vector<entropy::ExponentModel> models;
    std::vector<std::vector<std::uint8_t>> elements;

    FloatProblem(Dtype d, std::size_t n, std::size_t width, std::uint64_t seed)
        : dtype(d), count(n), abreast(width) {
        std::mt19937_64 random(seed);
        const std::uint32_t range = exponent_mask(d);
        for (std::size_t i = 0; i < kSteps * abreast; ++i) {
            const auto center = static_cast<std::uint32_t>(random() % (range + 1));
            models.push_back({center, static_cast<std::uint32_t>(random() % entropy::kExponentTables)});
            std::vector<std::uint8_t> own(count * dtype_bytes(d));
            for (std::size_t at = 0; at < count; ++at) {
                const std::uint32_t near = (center + static_cast<std::uint32_t>(random() % 7) - 3) & range;
                const std::uint32_t exponent =
                    random() % 20 == 0 ? static_cast<std::uint32_t>(random()) & range : near;
                const unsigned mantissa = mantissa_bits(d);
                const auto sign = static_cast<std::uint32_t>(random() & 1) << (8 * dtype_bytes(d) - 1);
                const std::uint32_t bits = sign | exponent << mantissa |
                                           (static_cast<std::uint32_t>(random()) & ((1u << mantissa) - 1));
                std::memcpy(&own[at * dtype_bytes(d)], &bits, dtype_bytes(d));
            }
            elements.push_back(std::move(own));
        }
    }

    std::vector<Stream> encode(const Ops& ops) const {
        const std::size_t room = kSteps * (4 * count + (count + 15) / 16 * 2 * 24);
        return encode_with(abreast, room, [&](std::span<RansEncoder* const> encoders) {
            std::vector<EncodeFloatStrip> strips;
            for (std::size_t step = kSteps; step-- > 0;) {
                for (std::size_t i = step * abreast; i < (step + 1) * abreast; ++i)
                    strips.push_back({&entropy::encode_table(entropy::kFirstExponentTable + models[i].table),
                                      models[i].center, elements[i].data()});
            }
            ops.encode_floats(encoders, strips, dtype, count);
        });
    }

    Decoded decode(const Ops& ops, const std::vector<Stream>& streams) const {
        return decode_with(streams, [&](std::span<RansDecoder* const> decoders) {
            std::vector<std::unique_ptr<Guarded<std::uint8_t>>> out;
            std::vector<FloatStrip> strips;
            for (const auto& m : models) {
                out.push_back(std::make_unique<Guarded<std::uint8_t>>(count * dtype_bytes(dtype)));
                strips.push_back({&entropy::decode_table(entropy::kFirstExponentTable + m.table), m.center,
                                  out.back()->data()});
            }
            Leaving leaving(count);
            ops.decode_floats(decoders, strips, dtype, count, leaving.outgoing());
            EXPECT_TRUE(leaving.arrived(ops));
            std::vector<std::vector<std::int32_t>> got;
            for (auto& v : out) {
                EXPECT_TRUE(v->intact());
                const auto read = v->values();
                got.emplace_back(read.begin(), read.end());
            }
            return got;
        });
    }
};

constexpr Dtype kDtypes[] = {Dtype::kBf16, Dtype::kF16, Dtype::kF32};

TEST_P(Backend, CodesFloatsLikeScalar) {
    for (const Dtype dtype : kDtypes) {
        for (const std::size_t count : {0, 1, 15, 16, 17, 31, 32, 33, 100, 252, 256}) {
            for (const std::size_t abreast : {1, 2, 3, 4, 6}) {
                const FloatProblem problem(dtype, count, abreast, count + abreast);
                const auto streams = problem.encode(scalar_ops());
                ASSERT_EQ(problem.encode(*GetParam()), streams) << count << " of " << abreast;
                const Decoded expected = problem.decode(scalar_ops(), streams);
                ASSERT_EQ(problem.decode(*GetParam(), streams), expected) << count << " of " << abreast;
                for (std::size_t i = 0; i < problem.elements.size(); ++i) {
                    ASSERT_TRUE(std::equal(expected.values[i].begin(), expected.values[i].end(),
                                           problem.elements[i].begin(), problem.elements[i].end()));
                }
            }
        }
    }
}

// Elements whose exponents are of so many kinds around `low`, modulo their range, the first ones more often.
std::vector<std::uint8_t> elements_of(Dtype dtype, std::size_t count, std::uint32_t low, std::uint32_t kinds,
                                      std::mt19937_64& random) {
    std::vector<std::uint8_t> bytes(count * dtype_bytes(dtype));
    for (std::size_t i = 0; i < count; ++i) {
        const auto kind = static_cast<std::uint32_t>(std::min(random() % kinds, random() % kinds));
        std::uint32_t bits = ((low + kind) & exponent_mask(dtype)) << mantissa_bits(dtype);
        bits |= static_cast<std::uint32_t>(random()) & 1;
        if (random() % 2 != 0) bits |= 1u << (8 * dtype_bytes(dtype) - 1);
        std::memcpy(&bytes[i * dtype_bytes(dtype)], &bits, dtype_bytes(dtype));
    }
    return bytes;
}

void draw_costs(ExponentCosts& costs, std::uint64_t kinds, std::mt19937_64& random) {
    for (auto& pair : costs) {
        for (auto& table : pair) {
            for (auto& cost : table)
                cost = static_cast<std::int16_t>(static_cast<std::int64_t>(random() % kinds) -
                                                 static_cast<std::int64_t>(kinds / 2));
        }
    }
    // So that no sum is negative.
    for (auto& table : costs[kSymbols / 2 - 1])
        table[1] = static_cast<std::int16_t>(kinds / 2 + random() % 2);
}

TEST_P(Backend, TurnsLikeScalar) {
    std::mt19937_64 random(5);
    for (const std::size_t count : {0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 256}) {
        for (int round = 0; round < 300; ++round) {
            // Any angle, and those that lie around eighths of a turn.
            const std::uint64_t first = round % 3 == 0 ? random() : (random() % 16 << 60) + random() % 3 - 1;
            const std::uint64_t step = round % 5 == 0 ? random() : random() % 3 << (round % 2 == 0 ? 32 : 60);
            const auto run = [&](const Ops& ops) {
                return written<std::int16_t>(count, 9, [&](std::int16_t* cos) {
                    const auto sine = written<std::int16_t>(
                        count, 8, [&](std::int16_t* sin) { ops.turns(first, step, count, cos, sin); });
                    // Both at once.
                    for (std::size_t i = 0; i < count; ++i)
                        cos[i] = static_cast<std::int16_t>(cos[i] * 3 + sine[i] * 5);
                });
            };
            ASSERT_EQ(run(*GetParam()), run(scalar_ops())) << first << " + t * " << step;
        }
    }
}

using Chosen = std::vector<std::uint32_t>;

Chosen choose(const Ops& ops, const ElementRows& rows, const ExponentCosts& costs) {
    Chosen chosen(rows.rows);
    ops.choose_exponents(rows, costs, chosen.data());
    return chosen;
}

TEST_P(Backend, ChoosesExponentsLikeScalar) {
    constexpr std::size_t kRows = 5;
    std::mt19937_64 random(2);
    ExponentCosts costs;
    std::map<std::uint32_t, int> seen;
    constexpr std::size_t counts[] = {0,   1,   15,  16,  17,  31,   32,   33,   63,   64,   65,  100,
                                      252, 256, 511, 512, 513, 1500, 1983, 1984, 1985, 4000, 5000};
    for (const Dtype dtype : kDtypes) {
        for (const std::size_t count : counts) {
            for (const std::uint32_t kinds : {1u, 2u, 9u, 15u, 16u, 17u, 30u, 31u, 32u, 33u, 48u, 256u}) {
                for (int round = 0; round < 4; ++round) {
                    // Few different costs: the lowest of several has to win.
                    draw_costs(costs, round % 2 == 0 ? 2 : 8000, random);
                    const auto range = exponent_mask(dtype);
                    const auto low = static_cast<std::uint32_t>(round == 0   ? 0
                                                                : round == 1 ? range + 1 - kinds / 2
                                                                             : random()) &
                                     range;
                    // Rows of one kind, and one of all kinds in between.
                    std::vector<std::uint8_t> bytes;
                    for (std::size_t row = 0; row < kRows; ++row) {
                        const auto more =
                            elements_of(dtype, count, low, row == kRows / 2 ? 256 : kinds, random);
                        bytes.insert(bytes.end(), more.begin(), more.end());
                    }
                    const Guarded<std::uint8_t> from(bytes);
                    const ElementRows rows = {from.data(), count * dtype_bytes(dtype), kRows, count, dtype};
                    const Chosen expected = choose(scalar_ops(), rows, costs);
                    ASSERT_EQ(choose(*GetParam(), rows, costs), expected)
                        << count << " from " << low << " of " << kinds << " kinds";
                    for (const std::uint32_t c : expected) ++seen[c % kSymbols];
                }
            }
        }
    }
    ASSERT_EQ(seen.size(), std::size_t{kSymbols});
}

// Numbers so rare, and so far below the others, that they do not matter; and so frequent that they do.
TEST_P(Backend, ChoosesExponentsBesideZeros) {
    std::mt19937_64 random(3);
    ExponentCosts costs;
    for (const std::size_t zeros : {1, 20, 100, 127, 128, 129, 200, 255, 256}) {
        for (const std::uint32_t kinds : {1u, 8u, 16u, 31u, 32u}) {
            draw_costs(costs, 8000, random);
            auto bytes = elements_of(Dtype::kBf16, 256, 100, kinds, random);
            for (std::size_t i = 0; i < zeros; ++i)
                bytes[2 * (i * 37 % 256)] = bytes[2 * (i * 37 % 256) + 1] = 0;
            const Guarded<std::uint8_t> from(bytes);
            const ElementRows row = {from.data(), 0, 1, 256, Dtype::kBf16};
            ASSERT_EQ(choose(*GetParam(), row, costs), choose(scalar_ops(), row, costs))
                << zeros << " zeros, " << kinds << " kinds";
        }
    }
}

// Distances from the bias, multiplied, rounded half up and cut off.
TEST(StateFeatures, AreRoundedDistances) {
    EXPECT_EQ(state_feature(7, 4, 16384), 2);
    EXPECT_EQ(state_feature(4, 7, 16384), -1);
    EXPECT_EQ(state_feature(1000, 0, 128), 4);
    EXPECT_EQ(state_feature(32767, -32768, 128), 127);
    EXPECT_EQ(state_feature(-32768, 32767, 32767), -128);
    for (int state = -32768; state <= 32767; state += 3) {
        for (const int bias : {-32768, -777, 0, 32767}) {
            for (const int factor : {128, 129, 1000, 20001, 32767}) {
                const double distance = (state - bias) * std::ldexp(factor, -15);
                const double rounded = std::floor(distance + 0.5);
                ASSERT_EQ(state_feature(static_cast<std::int16_t>(state), static_cast<std::int16_t>(bias),
                                        static_cast<std::int16_t>(factor)),
                          std::clamp(rounded, -128.0, 127.0));
            }
        }
    }
}

// The smallest sum of what exponents cost, found in the plainest way.
TEST(ScalarExponents, AreTheCheapestOfThreeCenters) {
    std::mt19937_64 random(4);
    ExponentCosts costs;
    for (int round = 0; round < 200; ++round) {
        draw_costs(costs, 100, random);
        const auto bytes =
            elements_of(Dtype::kF16, 60, static_cast<std::uint32_t>(random() % 32), 12, random);
        std::vector<std::uint32_t> exponents;
        for (std::size_t i = 0; i < 60; ++i) exponents.push_back((bytes[2 * i + 1] & 0x7cu) >> 2);
        std::uint32_t mode = 0;
        const auto times = [&](std::uint32_t e) { return std::count(exponents.begin(), exponents.end(), e); };
        for (std::uint32_t e = 1; e < 32; ++e) mode = times(e) > times(mode) ? e : mode;
        std::uint32_t best = 0;
        std::int64_t least = std::numeric_limits<std::int64_t>::max();
        for (std::uint32_t center = mode == 0 ? 0 : mode - 1; center <= std::min(mode + 1, 31u); ++center) {
            for (std::uint32_t table = 0; table < kSymbols; ++table) {
                std::int64_t sum = 60 * std::int64_t{costs[kEscape / 2][table][kEscape % 2]};
                for (const std::uint32_t e : exponents) {
                    const std::uint32_t s = center + kSymbolZero - e;
                    if (s < kEscape) sum += costs[s / 2][table][s % 2];
                }
                if (sum >= least) continue;
                least = sum;
                best = center * kSymbols + table;
            }
        }
        ASSERT_EQ(choose(scalar_ops(), {bytes.data(), 0, 1, 60, Dtype::kF16}, costs), Chosen{best});
    }
}

TEST_P(Backend, AddsCostsOfValuesLikeScalar) {
    constexpr std::uint32_t kPlaces = kValueCostStride - kValueCosts;
    std::mt19937_64 random(3);
    std::vector<std::int32_t> table((2 * kValueCostMost + 1) * kValueCostStride);
    for (auto& cost : table) cost = static_cast<std::int32_t>(random() % 600000) - 300000;
    std::fill_n(table.begin() + kValueCostMost * kValueCostStride, kValueCostStride, 0);
    Guarded<std::int32_t> costs(table);
    const std::int32_t* const zero = costs.data() + kValueCostMost * kValueCostStride;
    for (const std::size_t count : {0, 1, 2, 7, 31, 32, 33, 70}) {
        std::vector<std::int16_t> values(count);
        std::vector<std::uint16_t> drawn(count);
        for (std::size_t i = 0; i < count; ++i) {
            const int v = static_cast<int>(random() % (2 * kValueCostMost + 1)) - kValueCostMost;
            values[i] = static_cast<std::int16_t>(random() % 3 == 0 ? 0 : v);
            drawn[i] = static_cast<std::uint16_t>(random() % (kPlaces + 1));
        }
        Guarded<std::int16_t> from(values);
        Guarded<std::uint16_t> places(drawn);
        bool all[2] = {};
        const auto run = [&](const Ops& ops, bool& whole) {
            return written<std::int32_t>(kValueCosts, 9, [&](std::int32_t* sums) {
                for (std::size_t i = 0; i < kValueCosts; ++i) sums[i] = static_cast<std::int32_t>(i);
                whole = ops.value_costs(from.data(), places.data(), count, zero, sums);
            });
        };
        ASSERT_EQ(run(*GetParam(), all[0]), run(scalar_ops(), all[1])) << count;
        ASSERT_TRUE(all[0] && all[1]);
        for (const int too_large : {-kValueCostMost - 1, kValueCostMost + 1, -32768, 32767}) {
            if (count == 0) break;
            from.data()[random() % count] = static_cast<std::int16_t>(too_large);
            ASSERT_EQ(run(*GetParam(), all[0]), run(scalar_ops(), all[1])) << count << ", " << too_large;
            ASSERT_FALSE(all[0] || all[1]) << too_large;
        }
    }
}

TEST_P(Backend, ReadsDamagedFloatsLikeScalar) {
    for (const Dtype dtype : kDtypes) {
        for (const std::size_t abreast : {1, 2, 4})
            compare_damaged(FloatProblem(dtype, 90, abreast, 5), *GetParam(), 60);
    }
}

// ---- rows and tiles ----

// Shapes and turns of heads: whole and odd sizes, every pairing, part of the channels turned.
struct HeadCase {
    std::size_t tokens;
    std::size_t channels;
    RopePairing pairing;
    std::size_t turned;  // channels
};

std::vector<HeadCase> head_cases() {
    std::vector<HeadCase> out;
    for (const std::size_t tokens : {0, 1, 3, 15, 16, 17, 31, 32, 33, 64, 100, 256}) {
        for (const std::size_t channels : {1, 2, 4, 7, 8, 12, 16, 64, 100}) {
            out.push_back({tokens, channels, RopePairing::kNone, 0});
            for (const RopePairing pairing : {RopePairing::kHalf, RopePairing::kInterleaved}) {
                if (channels % 2 == 0) out.push_back({tokens, channels, pairing, channels});
                if (channels >= 12) out.push_back({tokens, channels, pairing, channels / 2 / 2 * 2});
            }
        }
    }
    out.push_back({40, 576, RopePairing::kInterleaved, 64});
    out.push_back({3, 1300, RopePairing::kHalf, 128});
    return out;
}

// Cosines and sines of a case, as the codec makes them; the turned channels may begin behind others.
struct Turn {
    std::vector<std::int16_t> cos;
    std::vector<std::int16_t> sin;
    Rotation rotation = {};

    std::vector<std::int16_t> cos_by_token;
    std::vector<std::int16_t> sin_by_token;
    Rotation by_token = {};  // the same turn, as store_states takes it

    Turn(const HeadCase& c, std::uint64_t seed) {
        if (c.pairing == RopePairing::kNone) return;
        const std::size_t pairs = c.turned / 2, stride = c.tokens + seed % 3;
        std::mt19937_64 random(seed);
        for (std::size_t i = 0; i < pairs * stride; ++i) {
            const SinCos t = sin_cos(random());
            cos.push_back(t.cos);
            sin.push_back(t.sin);
        }
        const bool half = c.pairing == RopePairing::kHalf;
        rotation = {pairs,          seed % 2 != 0 ? c.channels - c.turned : 0,
                    half ? 1u : 2u, half ? pairs : 1u,
                    cos.data(),     sin.data(),
                    stride};
        const std::size_t row = pairs + seed % 2;
        cos_by_token.resize(c.tokens * row);
        sin_by_token.resize(c.tokens * row);
        for (std::size_t t = 0; t < c.tokens; ++t) {
            for (std::size_t p = 0; p < pairs; ++p) {
                cos_by_token[t * row + p] = cos[p * stride + t];
                sin_by_token[t * row + p] = sin[p * stride + t];
            }
        }
        by_token = rotation;
        by_token.cos = cos_by_token.data();
        by_token.sin = sin_by_token.data();
        by_token.table_stride = row;
    }
};

std::vector<std::uint8_t> random_elements(std::size_t count, Dtype dtype, std::uint64_t seed) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> draw(0, 3);
    std::vector<std::uint8_t> out(count * dtype_bytes(dtype));
    for (std::size_t i = 0; i < count; ++i) {
        const bool any = random() % 16 == 0;
        std::uint32_t bits = any ? static_cast<std::uint32_t>(random()) : to_bits(dtype, draw(random));
        if (std::isnan(from_bits(dtype, dtype == Dtype::kF32 ? bits : bits & 0xffff))) bits = 0;
        std::memcpy(&out[i * dtype_bytes(dtype)], &bits, dtype_bytes(dtype));
    }
    return out;
}

std::vector<std::uint32_t> as_bits(const std::vector<float>& values) {
    std::vector<std::uint32_t> out;
    for (const float v : values) out.push_back(std::bit_cast<std::uint32_t>(v));
    return out;
}

TEST_P(Backend, LoadsHeadsLikeScalar) {
    std::uint64_t seed = 0;
    for (const HeadCase& c : head_cases()) {
        for (const Dtype dtype : kDtypes) {
            const Turn turn(c, ++seed);
            const std::size_t width = c.channels + seed % 3, stride = c.tokens + seed % 2;
            const std::size_t elements = c.tokens == 0 ? 0 : (c.tokens - 1) * width + c.channels;
            Guarded<std::uint8_t> rows(random_elements(elements, dtype, seed));
            const auto run = [&](const Ops& ops, float& magnitude) {
                return as_bits(written<float>(c.channels * stride, 7.0f, [&](float* tile) {
                    magnitude = ops.load_head({rows.data(), width * dtype_bytes(dtype), dtype, c.tokens,
                                               c.channels, turn.rotation, tile, stride});
                }));
            };
            float magnitude = -1, expected_magnitude = -1;
            const auto expected = run(scalar_ops(), expected_magnitude);
            ASSERT_EQ(run(*GetParam(), magnitude), expected)
                << c.tokens << " x " << c.channels << ", " << c.turned << " turned";
            ASSERT_EQ(magnitude, expected_magnitude) << c.tokens << " x " << c.channels;
            const auto copied = [&](const Ops& ops) {
                return written<std::uint8_t>(c.channels * stride * dtype_bytes(dtype), 7,
                                             [&](std::uint8_t* tile) {
                                                 ops.load_elements(rows.data(), width * dtype_bytes(dtype),
                                                                   dtype, c.tokens, c.channels, tile, stride);
                                             });
            };
            ASSERT_EQ(copied(*GetParam()), copied(scalar_ops())) << c.tokens << " x " << c.channels;
        }
    }
}

TEST_P(Backend, FindsTheLargestMagnitude) {
    const auto with = [](std::uint32_t element, std::size_t at) {
        constexpr std::size_t kTokens = 40, kChannels = 24;
        std::vector<std::uint16_t> rows(kTokens * kChannels, 0xc000);  // -2
        rows[at] = static_cast<std::uint16_t>(element);
        std::vector<float> tile(rows.size());
        return GetParam()->load_head(
            {rows.data(), 2 * kChannels, Dtype::kBf16, kTokens, kChannels, {}, tile.data(), kTokens});
    };
    for (const std::size_t at : {0, 7, 24 * 31 + 3, 24 * 32 + 23, 24 * 40 - 1}) {
        EXPECT_EQ(with(0xc000, at), 2.0f);
        EXPECT_EQ(with(0xc040, at), 3.0f);
        EXPECT_EQ(with(0x4040, at), 3.0f);
        EXPECT_EQ(with(0xff80, at), std::numeric_limits<float>::infinity());
        EXPECT_EQ(with(0x7fc0, at), std::numeric_limits<float>::infinity());
    }
}

TEST_P(Backend, LoadsRowsLikeTiles) {
    std::uint64_t seed = 0;
    for (const HeadCase& c : head_cases()) {
        for (const Dtype dtype : kDtypes) {
            const Turn turn(c, ++seed);
            const std::size_t width = c.channels + seed % 3, stride = c.channels + seed % 2;
            const std::size_t elements = c.tokens == 0 ? 0 : (c.tokens - 1) * width + c.channels;
            Guarded<std::uint8_t> rows(random_elements(elements, dtype, seed));
            std::vector<float> tile(c.channels * c.tokens);
            scalar_ops().load_head({rows.data(), width * dtype_bytes(dtype), dtype, c.tokens, c.channels,
                                    turn.rotation, tile.data(), c.tokens});
            std::vector<float> expected(c.tokens * stride, 7.0f);
            for (std::size_t t = 0; t < c.tokens; ++t) {
                for (std::size_t i = 0; i < c.channels; ++i)
                    expected[t * stride + i] = tile[i * c.tokens + t];
            }
            for (const Ops* ops : {&scalar_ops(), GetParam()}) {
                const auto got = written<float>(c.tokens * stride, 7.0f, [&](float* values) {
                    ops->load_rows({rows.data(), width * dtype_bytes(dtype), dtype, c.tokens, c.channels,
                                    turn.by_token, values, stride});
                });
                ASSERT_EQ(as_bits(got), as_bits(expected))
                    << ops->name << ", " << c.tokens << " x " << c.channels << ", " << c.turned << " turned";
            }
        }
    }
}

TEST_P(Backend, StoresHeadsLikeScalar) {
    std::uint64_t seed = 0;
    for (const HeadCase& c : head_cases()) {
        for (const Dtype dtype : kDtypes) {
            const Turn turn(c, ++seed);
            std::mt19937_64 random(seed);
            const std::size_t width = c.channels + seed % 3, stride = c.tokens + seed % 2;
            std::vector<std::int16_t> states(c.channels * stride);
            for (auto& s : states) s = static_cast<std::int16_t>(random() >> random() % 16);
            Guarded<std::int16_t> tile(states);
            const int exponents[] = {kMinExponent, -40, -12, 0, kMaxExponent};
            const Scale scale = {static_cast<std::int32_t>(128 + random() % 128), exponents[seed % 5]};
            const std::size_t bytes =
                c.tokens == 0 ? 0 : ((c.tokens - 1) * width + c.channels) * dtype_bytes(dtype);
            const auto run = [&](const Ops& ops) {
                return written<std::uint8_t>(bytes, 0xee, [&](std::uint8_t* rows) {
                    ops.store_head({tile.data(), stride, c.tokens, c.channels, turn.rotation, scale, dtype,
                                    rows, width * dtype_bytes(dtype)});
                });
            };
            ASSERT_EQ(run(*GetParam()), run(scalar_ops()))
                << c.tokens << " x " << c.channels << ", " << c.turned << " turned";
        }
    }
}

// Rows of whole lines, as allocators give them, of heads beside others that must stay as they are.
TEST_P(Backend, StoresLinesLikeScalar) {
    std::uint64_t seed = 0;
    for (const std::size_t tokens : {0, 1, 31, 32, 33, 63, 64, 100, 256}) {
        for (const std::size_t channels : {8, 32, 40, 64, 128}) {
            for (const std::size_t turned : {std::size_t{0}, channels / 2, channels}) {
                for (const Dtype dtype : kDtypes) {
                    const HeadCase c = {tokens, channels,
                                        turned == 0 ? RopePairing::kNone : RopePairing::kHalf, turned};
                    const Turn turn(c, ++seed);
                    std::mt19937_64 random(seed);
                    std::vector<std::int16_t> tile(channels * tokens);
                    for (auto& q : tile) q = static_cast<std::int16_t>(random() >> random() % 16);
                    const std::size_t row_bytes = (channels + 64) / 64 * 64 * 2 * dtype_bytes(dtype);
                    const std::size_t offset =
                        seed % 3 * 64 * (seed % 4 == 0 ? 1 : 0) + (seed % 5 == 0 ? 2 : 0);
                    const auto stored = [&](const Ops& ops, bool exact) {
                        Guarded<std::uint8_t> rows(tokens * row_bytes + 256, Edge::kBegin);
                        std::fill(rows.begin(), rows.end(), std::uint8_t{0xee});
                        if (exact) {
                            ops.store_exact({tile.data(),
                                             tokens,
                                             tokens,
                                             channels,
                                             {},
                                             Dtype::kBf16,
                                             Dtype::kBf16,
                                             rows.data() + offset,
                                             row_bytes});
                        } else {
                            ops.store_head({tile.data(),
                                            tokens,
                                            tokens,
                                            channels,
                                            turn.rotation,
                                            {200, -12},
                                            dtype,
                                            rows.data() + offset,
                                            row_bytes});
                        }
                        EXPECT_TRUE(rows.intact());
                        return rows.values();
                    };
                    for (const bool exact : {false, true})
                        ASSERT_EQ(stored(*GetParam(), exact), stored(scalar_ops(), exact))
                            << tokens << " x " << channels << ", " << turned << " turned";
                }
            }
        }
    }
}

TEST_P(Backend, StoresStatesLikeTiles) {
    std::uint64_t seed = 0;
    for (const HeadCase& c : head_cases()) {
        for (const Dtype dtype : kDtypes) {
            const Turn turn(c, ++seed);
            std::mt19937_64 random(seed);
            const std::size_t width = c.channels + seed % 3, stride = c.channels + seed % 4;
            std::vector<std::int16_t> by_token(c.tokens * stride), tile(c.channels * c.tokens);
            for (auto& s : by_token) s = static_cast<std::int16_t>(random() >> random() % 16);
            for (std::size_t t = 0; t < c.tokens; ++t) {
                for (std::size_t i = 0; i < c.channels; ++i)
                    tile[i * c.tokens + t] = by_token[t * stride + i];
            }
            by_token.resize(c.tokens == 0 ? 0 : (c.tokens - 1) * stride + c.channels);
            Guarded<std::int16_t> states(by_token);
            const Scale scale = {static_cast<std::int32_t>(128 + random() % 128), -12};
            const std::size_t bytes =
                c.tokens == 0 ? 0 : ((c.tokens - 1) * width + c.channels) * dtype_bytes(dtype);
            const auto expected = written<std::uint8_t>(bytes, 0xee, [&](std::uint8_t* rows) {
                scalar_ops().store_head({tile.data(), c.tokens, c.tokens, c.channels, turn.rotation, scale,
                                         dtype, rows, width * dtype_bytes(dtype)});
            });
            for (const Ops* ops : {&scalar_ops(), GetParam()}) {
                const auto got = written<std::uint8_t>(bytes, 0xee, [&](std::uint8_t* rows) {
                    ops->store_states({states.data(), stride, c.tokens, c.channels, turn.by_token, scale,
                                       dtype, rows, width * dtype_bytes(dtype)});
                });
                ASSERT_EQ(got, expected)
                    << ops->name << ", " << c.tokens << " x " << c.channels << ", " << c.turned << " turned";
            }
        }
    }
}

TEST_P(Backend, StoresExactHeadsLikeScalar) {
    std::uint64_t seed = 0;
    for (const HeadCase& c : head_cases()) {
        for (const Dtype source : kDtypes) {
            const Dtype dtype = ++seed % 2 != 0 ? source : kDtypes[seed % 3];
            const Turn turn(c, seed);
            const std::size_t width = c.channels + seed % 3, stride = c.tokens + seed % 2;
            Guarded<std::uint8_t> tile(random_elements(c.channels * stride, source, seed));
            const std::size_t bytes =
                c.tokens == 0 ? 0 : ((c.tokens - 1) * width + c.channels) * dtype_bytes(dtype);
            const auto run = [&](const Ops& ops) {
                return written<std::uint8_t>(bytes, 0xee, [&](std::uint8_t* rows) {
                    ops.store_exact({tile.data(), stride, c.tokens, c.channels, turn.rotation, source, dtype,
                                     rows, width * dtype_bytes(dtype)});
                });
            };
            ASSERT_EQ(run(*GetParam()), run(scalar_ops())) << c.tokens << " x " << c.channels;
        }
    }
}

// ---- rows of a tile ----

std::vector<float> random_floats(std::size_t count, double deviation, std::uint64_t seed) {
    std::mt19937_64 random(seed);
    std::normal_distribution<double> draw(0, deviation);
    std::vector<float> out(count);
    for (float& x : out) x = static_cast<float>(draw(random));
    return out;
}

constexpr std::size_t kCounts[] = {0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 252, 256, 1000};

TEST_P(Backend, MeasuresLikeScalar) {
    for (const std::size_t count : kCounts) {
        Guarded<float> v(random_floats(count, 1000, count));
        for (const float scale : {1.0f, 0.37f, 700.0f}) {
            const Moments expected = scalar_ops().moments(v.data(), count, scale);
            const Moments got = GetParam()->moments(v.data(), count, scale);
            ASSERT_EQ(got.sum, expected.sum) << count;
            ASSERT_EQ(got.sum_of_squares, expected.sum_of_squares) << count;
            ASSERT_EQ(GetParam()->rounded_sum(v.data(), count, scale), expected.sum) << count;
            ASSERT_EQ(scalar_ops().rounded_sum(v.data(), count, scale), expected.sum) << count;
        }
    }
}

TEST_P(Backend, QuantisesLikeScalar) {
    for (const std::size_t count : kCounts) {
        for (const unsigned shift : {0u, 1u, 3u, 8u, 11u}) {
            for (const std::int32_t limit : {7, 30000}) {
                std::mt19937_64 random(count + shift);
                std::vector<std::int16_t> predicted(count);
                for (auto& p : predicted) p = static_cast<std::int16_t>(random());
                Guarded<float> values(random_floats(count, 4000, count));
                Guarded<std::int16_t> prediction(predicted);
                std::uint64_t sums[2] = {};
                const auto run = [&](const Ops& ops, std::uint64_t& sum) {
                    return written<std::int16_t>(count, 99, [&](std::int16_t* q) {
                        sum = ops.quantise(
                            {values.data(), count, prediction.data(), 99, 1.3f, shift, limit, q});
                    });
                };
                const auto expected = run(scalar_ops(), sums[0]);
                ASSERT_EQ(run(*GetParam(), sums[1]), expected) << count << ", shift " << shift;
                ASSERT_EQ(sums[0], sums[1]);
                // One prediction for all is as many that are the same.
                const std::vector<std::int16_t> same(count, -321);
                const auto of_mean = [&](const Ops& ops, const std::int16_t* each, std::uint64_t& sum) {
                    return written<std::int16_t>(count, 99, [&](std::int16_t* q) {
                        sum = ops.quantise({values.data(), count, each, -321, 1.3f, shift, limit, q});
                    });
                };
                const auto expected_of_mean =
                    of_mean(scalar_ops(), count == 0 ? nullptr : same.data(), sums[0]);
                ASSERT_EQ(of_mean(*GetParam(), nullptr, sums[1]), expected_of_mean) << count;
                ASSERT_EQ(sums[0], sums[1]);
                ASSERT_EQ(of_mean(scalar_ops(), nullptr, sums[1]), expected_of_mean) << count;
                ASSERT_EQ(sums[0], sums[1]);
                Guarded<std::int16_t> q(expected);
                const auto back = [&](const Ops& ops) {
                    return written<std::int16_t>(count, 99, [&](std::int16_t* states) {
                        ops.reconstruct(q.data(), prediction.data(), count, shift, states);
                    });
                };
                ASSERT_EQ(back(*GetParam()), back(scalar_ops())) << count << ", shift " << shift;
            }
        }
    }
}

TEST_P(Backend, TakesResidualsAndStepsLikeScalar) {
    for (const std::size_t count : kCounts) {
        for (int special = 0; special < 4; ++special) {
            auto drawn = random_floats(count, 4000, count);
            if (count != 0 && special == 1) drawn[count / 2] = std::numeric_limits<float>::infinity();
            if (count != 0 && special == 2) drawn[count - 1] = std::numeric_limits<float>::quiet_NaN();
            if (count != 0 && special == 3) drawn[0] = -1e9f;
            std::mt19937_64 random(count);
            std::vector<std::int32_t> predicted(count);
            for (auto& p : predicted) p = static_cast<std::int32_t>(random() % 60000) - 30000;
            Guarded<float> values(drawn);
            Guarded<std::int32_t> sums(predicted);
            std::vector<std::int32_t> products;
            for (const std::int32_t p : predicted) products.push_back(p * 31);
            if (count != 0 && special == 1) products[count / 2] = std::numeric_limits<std::int32_t>::max();
            if (count != 0 && special == 2) products[count - 1] = std::numeric_limits<std::int32_t>::min();
            if (count != 0 && special == 3) products[0] = 960001;
            Guarded<std::int32_t> integers(products);
            const auto residual = [&](const Ops& ops, bool& fits) {
                return as_bits(written<float>(count, 7.0f, [&](float* out) {
                    fits = ops.residual(values.data(), sums.data(), count, 1.7f, 32000.0f, out);
                }));
            };
            const auto steps = [&](const Ops& ops, bool& fits) {
                return written<std::int16_t>(count, 99, [&](std::int16_t* q) {
                    fits = ops.round_steps(integers.data(), count, 0.03125f, 37.0f, 30000.0f, q);
                });
            };
            bool fits[4] = {};
            ASSERT_EQ(residual(*GetParam(), fits[0]), residual(scalar_ops(), fits[1])) << count;
            ASSERT_EQ(steps(*GetParam(), fits[2]), steps(scalar_ops(), fits[3])) << count;
            const bool expected = count == 0 || special == 0;
            for (const bool f : fits) ASSERT_EQ(f, expected);
        }
    }
}

TEST_P(Backend, TurnsStripsAndRowsLikeScalar) {
    for (const std::size_t coefficients : {0, 1, 7, 8, 9, 31, 64, 192}) {
        for (const std::size_t tokens : {0, 1, 7, 8, 15, 16, 31, 32}) {
            const std::size_t tile_size = coefficients * kLanes;
            std::mt19937_64 random(coefficients * 33 + tokens);
            std::vector<std::int16_t> drawn(std::max(tile_size, coefficients * tokens));
            for (auto& v : drawn) v = static_cast<std::int16_t>(random());
            // Rows lie in an order of their own, as those of tokens do.
            const auto row = [&](std::size_t t) { return (tokens - 1 - t) * coefficients; };
            Guarded<std::int16_t> tile(
                {drawn.begin(), drawn.begin() + static_cast<std::ptrdiff_t>(tile_size)});
            Guarded<std::int16_t> rows(drawn);
            const auto to_rows = [&](const Ops& ops) {
                return written<std::int16_t>(coefficients * tokens, 99, [&](std::int16_t* out) {
                    std::vector<std::int16_t*> at;
                    for (std::size_t t = 0; t < tokens; ++t) at.push_back(out + row(t));
                    ops.strips_to_rows(tile.data(), coefficients, at.data(), tokens);
                });
            };
            const auto to_strips = [&](const Ops& ops) {
                return written<std::int16_t>(tile_size, 99, [&](std::int16_t* out) {
                    std::vector<const std::int16_t*> at;
                    for (std::size_t t = 0; t < tokens; ++t) at.push_back(rows.data() + row(t));
                    ops.rows_to_strips(at.data(), tokens, coefficients, out);
                });
            };
            ASSERT_EQ(to_rows(*GetParam()), to_rows(scalar_ops())) << coefficients << ", " << tokens;
            ASSERT_EQ(to_strips(*GetParam()), to_strips(scalar_ops())) << coefficients << ", " << tokens;
        }
    }
}

TEST_P(Backend, SaturatesLikeScalar) {
    for (const std::size_t count : kCounts) {
        std::mt19937_64 random(count);
        std::vector<std::int32_t> values(count);
        for (auto& v : values) v = static_cast<std::int32_t>(random()) >> random() % 32;
        Guarded<std::int32_t> sums(values);
        const auto run = [&](const Ops& ops) {
            return written<std::int16_t>(
                count, 99, [&](std::int16_t* states) { ops.saturate(sums.data(), count, states); });
        };
        ASSERT_EQ(run(*GetParam()), run(scalar_ops())) << count;
    }
}

TEST_P(Backend, MakesFeaturesOfStatesLikeScalar) {
    for (const std::size_t count : kCounts) {
        std::mt19937_64 random(count);
        std::vector<std::int16_t> drawn[3];
        for (std::size_t i = 0; i < count; ++i) {
            drawn[0].push_back(static_cast<std::int16_t>(random()));
            drawn[1].push_back(
                static_cast<std::int16_t>(static_cast<std::int16_t>(random()) >> random() % 16));
            drawn[2].push_back(static_cast<std::int16_t>(128 + random() % 32640));
        }
        const Guarded<std::int16_t> states(drawn[0]), bias(drawn[1]), factors(drawn[2]);
        const auto run = [&](const Ops& ops) {
            return written<std::int16_t>(count, 99, [&](std::int16_t* features) {
                ops.state_features(states.data(), bias.data(), factors.data(), count, features);
            });
        };
        ASSERT_EQ(run(*GetParam()), run(scalar_ops())) << count;
    }
}

TEST_P(Backend, SharesExponentsLikeScalar) {
    for (const std::size_t count : kCounts) {
        for (const float range : {0.0f, 1e-3f, 0.9f, 3.0f, 500.0f, 32000.0f, 2.2e9f}) {
            auto drawn = random_floats(count, 1, count);
            for (float& v : drawn) v *= range;
            Guarded<float> values(drawn);
            int exponents[2] = {};
            const auto run = [&](const Ops& ops, int& exponent) {
                return written<std::int16_t>(count, 99, [&](std::int16_t* integers) {
                    exponent = ops.share_exponent(values.data(), count, integers);
                });
            };
            const auto integers = run(*GetParam(), exponents[0]);
            ASSERT_EQ(integers, run(scalar_ops(), exponents[1])) << count << ", " << range;
            ASSERT_EQ(exponents[0], exponents[1]);
            int most = 0;
            for (std::size_t i = 0; i < count; ++i) {
                most = std::max(most, std::abs(int{integers[i]}));
                ASSERT_LE(std::abs(integers[i] * power_of_two(-exponents[0]) - drawn[i]),
                          0.5f * power_of_two(-exponents[0]));
            }
            ASSERT_LE(most, 1 << 14);
            if (exponents[0] < 13) {
                ASSERT_GE(most, 1 << 13);
            }
        }
    }
}

TEST_P(Backend, IsComplete) {
    const Ops& o = *GetParam();
    EXPECT_TRUE(o.decode_strips && o.encode_strips && o.decode_floats && o.encode_floats &&
                o.choose_exponents && o.value_costs && o.load_head && o.load_rows && o.load_elements &&
                o.turns && o.moments && o.rounded_sum && o.quantise && o.reconstruct && o.residual &&
                o.round_steps && o.strips_to_rows && o.rows_to_strips && o.saturate && o.state_features &&
                o.project && o.share_exponent && o.store_head && o.store_states && o.store_exact);
}

std::vector<const Ops*> backends() {
    return {available_ops().begin() + 1, available_ops().end()};
}

INSTANTIATE_TEST_SUITE_P(Machine, Backend, testing::ValuesIn(backends()),
                         [](const auto& tested) { return std::string(tested.param->name); });
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(Backend);

TEST(Backends, EndWithTileRegistersWhereTheyAreGranted) {
    const bool amx = std::string_view(available_ops().back()->name) == "amx";
    const std::vector<std::int16_t> matrix(16 * 64, 1);
    EXPECT_EQ(pack_matrix(matrix, 16, 64).tiles.size(), amx ? 1u : 0u);
    if (!amx)
        GTEST_SKIP() << "no AMX in this processor, or the system does not grant it: backend amx is untested";
}

TEST(Backends, BeginWithScalarAndEndWithTheBest) {
    ASSERT_FALSE(available_ops().empty());
    EXPECT_STREQ(available_ops().front()->name, "scalar");
    bool known = false;
    for (const Ops* ops : available_ops()) known |= ops == &best_ops();
    EXPECT_TRUE(known);
}

}  // namespace
}  // namespace kvcast::test
