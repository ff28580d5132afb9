// Every slot of every backend gives what the scalar one gives: odd sizes, odd alignments, and nothing written
// outside. Slots that a backend has not replaced are the scalar ones, and are not compared.
#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "kernels/ops.h"

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
};

constexpr std::int32_t kGuard = 0x5a5a5a5a;

struct Run {
    std::vector<std::int16_t> features;
    std::vector<std::int16_t> matrix;
    std::vector<std::uint8_t> shifts;
    std::vector<std::int32_t> sums;
    Projection projection = {};
};

Run make(const Problem& p, std::uint64_t seed) {
    std::mt19937_64 random(seed);
    Run r;
    const std::size_t feature_stride = p.inputs + seed % 3, sum_stride = p.outputs + seed % 5;
    r.features.resize(p.offset + p.tokens * feature_stride + 1);
    r.matrix.resize(p.offset + p.inputs * p.outputs);
    r.shifts.resize(p.offset + p.outputs);
    r.sums.assign(p.offset + p.tokens * sum_stride + 16, kGuard);
    for (auto& f : r.features) {
        const bool zero = std::uniform_real_distribution<double>(0, 1)(random) < p.zeros;
        f = zero ? std::int16_t{0} : p.extreme ? std::int16_t{-32768} : static_cast<std::int16_t>(random());
    }
    const auto most = static_cast<std::int64_t>(65024 / std::max<std::size_t>(p.inputs, 2));
    for (auto& m : r.matrix) {
        const auto x = p.extreme ? -most : static_cast<std::int64_t>(random() % (2 * most + 1)) - most;
        m = static_cast<std::int16_t>(std::clamp<std::int64_t>(x, -32768, 32767));
    }
    for (auto& s : r.shifts) s = static_cast<std::uint8_t>(4 + random() % 20);
    for (std::size_t t = 0; t < p.tokens; ++t) {
        for (std::size_t o = 0; o < p.outputs; ++o)
            r.sums[p.offset + t * sum_stride + o] = static_cast<std::int32_t>(random() % 2000) - 1000;
    }
    r.projection = {r.features.data() + p.offset,
                    feature_stride,
                    p.inputs,
                    r.matrix.data() + p.offset,
                    r.shifts.data() + p.offset,
                    p.outputs,
                    p.tokens,
                    r.sums.data() + p.offset,
                    sum_stride};
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
    out.push_back({64, 64, 0, 0, 0, false});
    return out;
}

using Slot = void (*Ops::*)(const Projection&);

void compare(const Ops& ops, Slot slot) {
    if (ops.*slot == scalar_ops().*slot) GTEST_SKIP() << ops.name << " has no project of its own";
    std::uint64_t seed = 1;
    for (const Problem& p : problems()) {
        Run expected = make(p, seed), got = make(p, seed);
        (scalar_ops().*slot)(expected.projection);
        (ops.*slot)(got.projection);
        ASSERT_EQ(got.sums, expected.sums)
            << p.inputs << " inputs, " << p.outputs << " outputs, " << p.tokens;
        ++seed;
    }
}

TEST_P(Backend, ProjectsLikeScalar) {
    compare(*GetParam(), &Ops::project);
}

TEST_P(Backend, ProjectsSparseFeaturesLikeScalar) {
    compare(*GetParam(), &Ops::project_sparse);
}

TEST_P(Backend, IsComplete) {
    const Ops& o = *GetParam();
    EXPECT_TRUE(o.decode_strip && o.encode_strip && o.decode_floats && o.encode_floats && o.load_head &&
                o.load_bits && o.max_magnitude && o.moments && o.quantise && o.reconstruct && o.project &&
                o.project_sparse && o.analyse && o.store_head && o.store_exact);
}

std::vector<const Ops*> backends() {
    return {available_ops().begin() + 1, available_ops().end()};
}

INSTANTIATE_TEST_SUITE_P(Machine, Backend, testing::ValuesIn(backends()),
                         [](const auto& tested) { return std::string(tested.param->name); });
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(Backend);

TEST(Backends, BeginWithScalarAndEndWithTheBest) {
    ASSERT_FALSE(available_ops().empty());
    EXPECT_STREQ(available_ops().front()->name, "scalar");
    bool known = false;
    for (const Ops* ops : available_ops()) known |= ops == &best_ops();
    EXPECT_TRUE(known);
}

}  // namespace
}  // namespace kvcast::test
