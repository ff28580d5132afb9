// launch_project against the scalar backend's project, through saturation.
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <random>

#include "kernels/cuda/launch.h"
#include "tests/simt/device_matrix.h"
#include "tests/simt/orders.h"

namespace kvcast::test {
namespace {

using namespace kernels;
using simt::Guarded;

struct Problem {
    std::vector<std::uint32_t> inputs;  // of the terms
    std::uint32_t width;
    std::uint32_t tokens;
    double zeros = 0;      // share of features that are zero
    bool extreme = false;  // the largest magnitudes that a calibration may have
    bool small = false;    // matrices of 8 bits
};

// A unit with its matrices, features and expected states in guarded memory.
class Unit {
  public:
    Unit(const Problem& p, std::uint64_t seed) : random_(seed) {
        channels_ = by_output<std::uint32_t>(p.width);
        draw_channels(*channels_, random_);
        task.channels = channels_->data();
        task.width = task.outputs = p.width;
        task.tokens = p.tokens;
        task.stride = p.width + static_cast<std::uint32_t>(seed % 3);
        sums_.resize(std::size_t{p.tokens} * p.width);
        for (std::size_t i = 0; i < sums_.size(); ++i) sums_[i] = cuda::bias_of((*channels_)[i % p.width]);
        for (const std::uint32_t inputs : p.inputs) add_term(p, inputs);
    }

    cuda::UnitTask task = {};
    std::vector<std::vector<std::byte>> features;  // of each term, [token][stride]

    std::int16_t state(std::size_t token, std::size_t output) const {
        return saturate16(sums_[token * task.width + output]);
    }
    std::int8_t feature(std::size_t token, std::size_t output) const {
        const std::uint32_t channel = (*channels_)[output];
        return static_cast<std::int8_t>(
            state_feature(state(token, output), cuda::bias_of(channel), cuda::feature_factor_of(channel)));
    }

  private:
    void add_term(const Problem& p, std::uint32_t inputs) {
        cuda::ProjectionTerm& term = task.terms[task.term_count++];
        term.inputs = inputs;
        term.stride = inputs + static_cast<std::uint32_t>(random_() % 3);
        term.narrow = task.term_count % 3 == 2;
        std::vector<std::int16_t> f(std::size_t{p.tokens} * term.stride);
        for (auto& v : f) {
            const bool zero = std::uniform_real_distribution<double>(0, 1)(random_) < p.zeros;
            const auto any = static_cast<std::int16_t>(p.extreme ? -32768 : random_());
            v = static_cast<std::int16_t>(zero ? 0 : term.narrow ? any >> 8 : any);
        }
        const std::vector<std::int8_t> bytes(f.begin(), f.end());
        const auto whole = std::as_bytes(std::span(f)), narrow = std::as_bytes(std::span(bytes));
        features.emplace_back(term.narrow ? narrow.begin() : whole.begin(),
                              term.narrow ? narrow.end() : whole.end());
        auto most = static_cast<std::int64_t>(65024 / std::max(inputs, 2u));
        if (p.small) most = std::min<std::int64_t>(most, 127);
        std::vector<std::int16_t> entries(std::size_t{inputs} * p.width);  // [output][input]
        for (auto& m : entries) {
            const auto x = p.extreme ? -most : static_cast<std::int64_t>(random_() % (2 * most + 1)) - most;
            m = static_cast<std::int16_t>(std::clamp<std::int64_t>(x, -32768, 32767));
        }
        const DeviceMatrix& matrix = matrices_.emplace_back(std::move(entries), p.width, random_);
        EXPECT_EQ(matrix.limbs(), most <= 127 ? 1u : matrix.limbs());
        matrix.describe(term);
        matrix.add(f.data(), term.stride, p.tokens, sums_.data(), term.narrow ? kFeatureWeight : 1);
    }

    std::mt19937_64 random_;
    std::unique_ptr<Guarded<std::uint32_t>> channels_;
    std::vector<DeviceMatrix> matrices_;
    std::vector<std::int32_t> sums_;
};

std::size_t round_up(std::size_t n) {
    return (n + 15) / 16 * 16;
}

// All units in one launch. Features go through both memories by turns.
void expect_like_scalar(std::span<const Problem> problems) {
    std::vector<std::unique_ptr<Unit>> units;
    for (std::size_t i = 0; i < problems.size(); ++i)
        units.push_back(std::make_unique<Unit>(problems[i], i + 1));
    std::vector<std::byte> in_image, in_workspace;
    std::vector<cuda::UnitTask> tasks;
    std::uint32_t tiles = 0;
    for (const auto& unit : units) {
        for (std::uint32_t n = 0; n < unit->task.term_count; ++n) {
            cuda::ProjectionTerm& term = unit->task.terms[n];
            term.in_image = n % 2 == 0;
            auto& memory = term.in_image ? in_image : in_workspace;
            term.features = memory.size();
            memory.insert(memory.end(), unit->features[n].begin(), unit->features[n].end());
            memory.resize(round_up(memory.size()));
        }
        unit->task.first_tile = tiles;
        tiles += static_cast<std::uint32_t>(cuda::tiles_of(unit->task));
    }
    std::size_t bytes = in_workspace.size();
    for (const auto& unit : units) {
        const std::size_t elements = std::size_t{unit->task.tokens} * unit->task.stride;
        unit->task.states = bytes;
        unit->task.features = round_up(bytes + elements * sizeof(std::int16_t));
        bytes = round_up(unit->task.features + elements);
        tasks.push_back(unit->task);
    }
    const Guarded<std::byte> image((std::span<const std::byte>(in_image))), workspace(bytes);
    std::copy(in_workspace.begin(), in_workspace.end(), workspace.data());
    const Guarded<cuda::UnitTask> list((std::span<const cuda::UnitTask>(tasks)));
    ASSERT_EQ(cuda::launch_project({image.data(), workspace.data()}, list.data(),
                                   static_cast<std::uint32_t>(tasks.size()), tiles, nullptr),
              cudaSuccess)
        << simt::take_failure();
    for (std::size_t i = 0; i < units.size(); ++i) {
        const cuda::UnitTask& task = tasks[i];
        const auto* states = reinterpret_cast<const std::int16_t*>(workspace.data() + task.states);
        const auto* features = reinterpret_cast<const std::int8_t*>(workspace.data() + task.features);
        for (std::size_t t = 0; t < task.tokens; ++t) {
            for (std::size_t o = 0; o < task.stride; ++o) {
                const bool made = o < task.width;
                const std::int16_t state = made ? units[i]->state(t, o) : std::int16_t(0xa5a5 - 65536);
                const std::int8_t feature = made ? units[i]->feature(t, o) : std::int8_t(0xa5 - 256);
                ASSERT_EQ(states[t * task.stride + o], state)
                    << "unit " << i << " token " << t << " output " << o;
                ASSERT_EQ(features[t * task.stride + o], feature)
                    << "unit " << i << " token " << t << " output " << o;
            }
        }
    }
}

class DeviceProjection : public testing::TestWithParam<simt::Schedule> {
  protected:
    void SetUp() override { simt::set_schedule(GetParam()); }
    void TearDown() override { simt::set_schedule(simt::Schedule::kForwards); }
};

TEST_P(DeviceProjection, GivesScalarsStatesAtOddSizes) {
    std::vector<Problem> problems;
    for (const std::uint32_t inputs : {1, 2, 31, 32, 33, 65, 200}) {
        for (const std::uint32_t width : {1, 7, 63, 64, 65, 130})
            problems.push_back({{inputs}, width, inputs % 5 + 1});
    }
    expect_like_scalar(problems);
}

TEST_P(DeviceProjection, AddsUpToSevenTerms) {
    const Problem problems[] = {{{5, 64, 40}, 33, 40}, {{3, 1, 32, 33, 64, 7, 100}, 70, 33, 0.9}};
    expect_like_scalar(problems);
}

TEST_P(DeviceProjection, TakesMatricesOfOneLimb) {
    const Problem problems[] = {{{200, 33}, 70, 70, 0, false, true}, {{1}, 1, 1, 0, false, true}};
    expect_like_scalar(problems);
}

TEST_P(DeviceProjection, SkipsZerosAndNothingElse) {
    const Problem problems[] = {{{192}, 64, 40, 1.0}, {{192, 96}, 65, 64, 0.995}};
    expect_like_scalar(problems);
}

TEST_P(DeviceProjection, DoesNotOverflowAtTheBoundsOfACalibration) {
    const Problem problems[] = {{{192}, 20, 5, 0, true},
                                {{2}, 40, 5, 0, true},
                                {{512}, 9, 17, 0, true, true},
                                {{8, 192}, 20, 5, 0, true}};
    expect_like_scalar(problems);
}

INSTANTIATE_TEST_SUITE_P(Orders, DeviceProjection, all_orders(), order_name);

}  // namespace
}  // namespace kvcast::test
