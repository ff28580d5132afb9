// Quality, sensitivity and the bridge to the codec, on a tiny model.
#include "tools/model/quality.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>

#include "tools/model/kv.h"
#include "tools/model/sensitivity.h"

namespace kvcast::model {
namespace {

const Runner& runner() {
    static const Runner loaded = Runner::load(std::string(KVCAST_TINY_MODELS) + "/llama");
    return loaded;
}

std::vector<std::int32_t> ids(std::size_t count, std::int32_t seed) {
    std::vector<std::int32_t> out;
    for (std::size_t i = 0; i < count; ++i)
        out.push_back(static_cast<std::int32_t>((i * i * 7 + static_cast<std::size_t>(seed) * i + 3) % 64));
    return out;
}

tools::KvCache context() {
    return prefilled(runner(), ids(40, 5), Dtype::kF32, 17);
}

TEST(Quality, AnUnchangedCacheCostsNothing) {
    const tools::KvCache cache = context();
    const QualityProbe probe(runner(), context_of(cache, runner().config()), ids(12, 9));
    const Quality q = probe.measure(context_of(cache, runner().config()));
    EXPECT_NEAR(q.kl, 0, 1e-9);
    EXPECT_NEAR(q.perplexity_change, 0, 1e-9);
    EXPECT_EQ(q.greedy_agreement, 1);
    EXPECT_FALSE(q.first_divergence.has_value());
    EXPECT_GT(probe.perplexity(), 1);
}

TEST(Quality, LargerErrorsCostMore) {
    const tools::KvCache cache = context();
    const QualityProbe probe(runner(), context_of(cache, runner().config()), ids(12, 9));
    double before = 0;
    for (const float size : {0.01f, 0.1f, 1.0f}) {
        tools::KvCache changed = cache;
        std::vector<float> v = plane_floats(cache, 1);
        for (std::size_t i = 0; i < v.size(); ++i) v[i] += i % 2 == 0 ? size : -size;
        set_plane(changed, 1, v);
        const double kl = probe.measure(context_of(changed, runner().config())).kl;
        EXPECT_GT(kl, before);
        before = kl;
    }
}

TEST(Quality, CodedCachesGetBetterLevelByLevel) {
    const tools::KvCache cache = context();
    const QualityProbe probe(runner(), context_of(cache, runner().config()), ids(12, 9));
    SerialExecutor serial;
    EncodeOptions o;
    o.profile = Profile::kLossless;
    EXPECT_NEAR(probe.measure(context_of(round_trip(cache, o, 16, serial).decoded, runner().config())).kl, 0,
                1e-9);
    o.profile = Profile::kDelta;
    o.level = 1;
    const double fine =
        probe.measure(context_of(round_trip(cache, o, 16, serial).decoded, runner().config())).kl;
    o.level = 7;
    const double coarse =
        probe.measure(context_of(round_trip(cache, o, 16, serial).decoded, runner().config())).kl;
    EXPECT_LT(fine, coarse);
}

TEST(Turn, ThereAndBackIsTheSame) {
    const tools::KvCache cache = context();
    std::vector<float> k = plane_floats(cache, 0);
    const std::vector<float> before = k;
    turn(k, cache.layout, cache.base_position, -1);
    double moved = 0;
    for (std::size_t i = 0; i < k.size(); ++i) moved = std::max(moved, std::abs(double{k[i]} - before[i]));
    EXPECT_GT(moved, 0.1);
    turn(k, cache.layout, cache.base_position, 1);
    for (std::size_t i = 0; i < k.size(); ++i) EXPECT_NEAR(k[i], before[i], 1e-4);
}

TEST(Sensitivity, BothEstimatesAgreeOnTheOrderOfMagnitude) {
    const tools::KvCache cache = context();
    const auto continuation = ids(16, 3);
    const Sample samples[] = {{&cache, continuation}};
    std::size_t ticks = 0;
    const auto measured = measured_sensitivity(runner(), samples, 0.3, 1, [&] { ++ticks; });
    EXPECT_EQ(ticks, 4u);
    const auto fisher = fisher_sensitivity(runner(), samples, 200, 1, 1, [] {});
    ASSERT_EQ(measured.size(), 4u);
    ASSERT_EQ(fisher.size(), 4u);
    const auto a = steps_of(measured), b = steps_of(fisher);
    double product = 1;
    for (std::size_t i = 0; i < a.size(); ++i) {
        EXPECT_LT(std::abs(std::log(a[i] / b[i])), std::log(1.6)) << i;
        product *= a[i];
    }
    EXPECT_NEAR(product, 1, 1e-9);
}

}  // namespace
}  // namespace kvcast::model
