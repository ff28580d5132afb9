// launch_chain against the scalar backend's project: blocks of every height, features that go through shared
// memory, coefficients that end early.
#include <gtest/gtest.h>

#include <array>
#include <map>
#include <random>

#include "codec/device/chain_layout.h"
#include "kernels/cuda/launch.h"
#include "tests/codec/synthetic.h"
#include "tests/simt/device_matrix.h"
#include "tests/simt/orders.h"

namespace kvcast::test {
namespace {

using namespace kernels;
using simt::Guarded;

constexpr int kTokens = -1;  // as a source: the tokens' features

struct Problem {
    std::uint32_t width;
    std::uint32_t tokens;
    std::uint32_t features;                 // of tokens
    std::vector<std::vector<int>> sources;  // of each unit's predictions: units before it, or kTokens
    bool rare = false;                      // coefficients in every seventh unit only
};

// A chain of units and what comes out of it, in one workspace: coefficients, states and masks of each.
class TestedChain {
  public:
    TestedChain(const Problem& p, std::uint64_t seed) : p_(p), random_(seed) {
        for (std::uint32_t i = 0; i < p.tokens * p.features; ++i)
            token_rows_.push_back(static_cast<std::int8_t>(random_()));
        for (const auto& sources : p.sources) add_unit(sources);
    }

    // States of all units, with blocks of such a height and such rings.
    std::vector<std::vector<std::int16_t>> run(std::uint32_t height, std::uint32_t chunks) const {
        const Guarded<std::byte> workspace((std::span<const std::byte>(workspace_)));
        const Guarded<std::int8_t> image((std::span<const std::int8_t>(token_rows_)));
        const cuda::ChainTask task = {.first_unit = 0,
                                      .units = static_cast<std::uint32_t>(units_.size()),
                                      .tokens = p_.tokens,
                                      .features = p_.features,
                                      .token_rows = 0,
                                      .resident = tokens_at()};
        std::vector<cuda::ChainTile> tiles;
        for (std::uint32_t t = 0; t < p_.tokens; t += height * cuda::kTokenTile) tiles.push_back({0, t});
        const Guarded<cuda::ChainTask> chains((std::span<const cuda::ChainTask>(&task, 1)));
        const Guarded<cuda::ChainTile> tile_list((std::span<const cuda::ChainTile>(tiles)));
        const Guarded<cuda::UnitTask> unit_list((std::span<const cuda::UnitTask>(units_)));
        EXPECT_EQ(cuda::launch_chain({reinterpret_cast<const std::byte*>(image.data()), workspace.data()},
                                     {chains.data(), tile_list.data(), unit_list.data(),
                                      static_cast<std::uint32_t>(tiles.size()), height, chunks,
                                      tokens_at() + cuda::narrow_bytes(p_.features)},
                                     nullptr),
                  cudaSuccess)
            << simt::take_failure();
        std::vector<std::vector<std::int16_t>> states;
        for (const cuda::UnitTask& unit : units_) {
            const auto* first = reinterpret_cast<const std::int16_t*>(workspace.data() + unit.states);
            states.emplace_back(first, first + std::size_t{p_.tokens} * p_.width);
        }
        return states;
    }

    const std::vector<std::vector<std::int16_t>>& expected() const { return states_; }

  private:
    std::uint32_t tokens_at() const { return coefficients_at(2); }
    // Of units by turns.
    std::uint32_t coefficients_at(std::size_t turn) const {
        return features_at(p_.sources.size()) +
               static_cast<std::uint32_t>(turn) * cuda::split_bytes(p_.width);
    }
    std::uint32_t features_at(std::size_t unit) const {
        return static_cast<std::uint32_t>(unit) * cuda::narrow_bytes(p_.width);
    }

    template <typename T>
    std::uint64_t append(std::span<const T> items) {
        const std::size_t offset = workspace_.size();
        const auto bytes = std::as_bytes(items);
        workspace_.insert(workspace_.end(), bytes.begin(), bytes.end());
        workspace_.resize((workspace_.size() + 15) / 16 * 16);
        return offset;
    }

    // Of one limb or of two.
    const DeviceMatrix& matrix(std::uint32_t inputs) {
        const int most = random_() % 2 == 0 ? 127 : 338;  // 338 * 192 is about what a calibration may have
        std::vector<std::int16_t> entries(std::size_t{inputs} * p_.width);
        for (auto& e : entries)
            e = static_cast<std::int16_t>(static_cast<int>(random_() % (2 * most + 1)) - most);
        return matrices_.emplace_back(std::move(entries), p_.width, random_);
    }

    void add_unit(const std::vector<int>& sources) {
        cuda::UnitTask unit = {};
        std::vector<std::int32_t> sums(std::size_t{p_.tokens} * p_.width);
        auto& channels = *channels_.emplace_back(by_output<std::uint32_t>(p_.width));
        draw_channels(channels, random_);
        for (std::size_t i = 0; i < sums.size(); ++i) sums[i] = cuda::bias_of(channels[i % p_.width]);
        for (const int source : sources) add_prediction(unit, source, sums);
        add_transform(unit, sums);
        unit.channels = channels.data();
        unit.stride = unit.width = unit.outputs = p_.width;
        unit.tokens = p_.tokens;
        unit.resident = features_at(units_.size());
        if (units_.size() + 1 == p_.sources.size()) unit.resident = cuda::kNone;
        unit.has_masks = true;
        std::vector<std::int16_t> states(sums.size());
        std::transform(sums.begin(), sums.end(), states.begin(), saturate16);
        unit.states = append<std::int16_t>(std::vector<std::int16_t>(sums.size()));
        std::vector<std::int8_t>& features = features_.emplace_back();
        for (std::size_t i = 0; i < states.size(); ++i) {
            const std::uint32_t channel = channels[i % p_.width];
            features.push_back(static_cast<std::int8_t>(
                state_feature(states[i], cuda::bias_of(channel), cuda::feature_factor_of(channel))));
        }
        states_.push_back(std::move(states));
        units_.push_back(unit);
    }

    void add_prediction(cuda::UnitTask& unit, int source, std::vector<std::int32_t>& sums) {
        cuda::ProjectionTerm& term = unit.terms[unit.term_count++];
        const bool tokens = source == kTokens;
        const DeviceMatrix& m = matrix(tokens ? p_.features : p_.width);
        m.describe(term);
        term.narrow = true;
        const auto unit_index = static_cast<std::size_t>(source);
        term.resident = tokens ? tokens_at() : features_at(unit_index);
        const auto& bytes = tokens ? token_rows_ : features_[unit_index];
        const std::vector<std::int16_t> features(bytes.begin(), bytes.end());
        m.add(features.data(), term.inputs, p_.tokens, sums.data(), kFeatureWeight);
    }

    // Of coefficients that end at another group in every unit, and in a third of the tokens before that.
    void add_transform(cuda::UnitTask& unit, std::vector<std::int32_t>& sums) {
        cuda::ProjectionTerm& term = unit.terms[unit.term_count++];
        std::uint32_t last = p_.width / 4 * (4 - static_cast<std::uint32_t>(units_.size()) % 5);
        if (p_.rare) last = units_.size() % 7 == 0 ? p_.width : 0;
        std::vector<std::int16_t> coefficients(std::size_t{p_.tokens} * p_.width);
        std::vector<std::uint32_t> masks(p_.tokens);
        for (std::uint32_t t = 0; t < p_.tokens; ++t) {
            for (std::uint32_t i = 0; i < (t % 3 == 0 ? last / 2 : last); ++i) {
                coefficients[std::size_t{t} * p_.width + i] = static_cast<std::int16_t>(random_());
                masks[t] |= 1u << i / cuda::kUnitStep;
            }
        }
        const DeviceMatrix& m = matrix(p_.width);
        m.describe(term);
        m.add(coefficients.data(), p_.width, p_.tokens, sums.data());
        term.stride = p_.width;
        term.resident = coefficients_at(units_.size() % 2);
        term.features = append<std::int16_t>(coefficients);
        unit.masks = append<std::uint32_t>(masks);
    }

    Problem p_;
    std::mt19937_64 random_;
    std::vector<std::int8_t> token_rows_;
    std::vector<std::byte> workspace_;
    std::vector<DeviceMatrix> matrices_;
    std::vector<std::unique_ptr<Guarded<std::uint32_t>>> channels_;
    std::vector<cuda::UnitTask> units_;
    std::vector<std::vector<std::int16_t>> states_;
    std::vector<std::vector<std::int8_t>> features_;
};

class DeviceChain : public testing::TestWithParam<simt::Schedule> {
  protected:
    // All units stay in shared memory.
    void SetUp() override {
        simt::set_schedule(GetParam());
        simt::set_most_shared(std::size_t{1} << 20);
    }
    void TearDown() override {
        simt::set_schedule(simt::Schedule::kForwards);
        simt::set_most_shared(simt::kMostOptIn);
    }

    static void expect_like_scalar(const Problem& p) {
        const TestedChain chain(p, p.width + p.tokens);
        for (std::uint32_t height = 1; height <= cuda::kMostHeight; ++height) {
            for (const std::uint32_t chunks : cuda::kRingChunks) {
                const auto states = chain.run(height, chunks);
                for (std::size_t u = 0; u < states.size(); ++u)
                    EXPECT_EQ(states[u], chain.expected()[u])
                        << "unit " << u << ", height " << height << ", rings of " << chunks;
            }
        }
    }
};

TEST_P(DeviceChain, GivesScalarsStatesAtAnyHeight) {
    expect_like_scalar({192, 67, 40, {{}, {kTokens, 0}, {0, 1}}});
}

TEST_P(DeviceChain, AddsUpToSixPredictions) {
    expect_like_scalar({40, 33, 65, {{}, {0}, {1, kTokens, 0, 1, 0, kTokens}, {2, 1, 0, 2, 1, kTokens}}});
}

TEST_P(DeviceChain, TakesATileOfOneToken) {
    expect_like_scalar({64, 49, 0, {{}, {0}, {1}}});
    expect_like_scalar({8, 1, 1, {{kTokens}, {0, kTokens}}});
}

TEST_P(DeviceChain, EndsProductsWithTheLastCoefficientOfATile) {
    expect_like_scalar({192, 20, 0, {{}, {0}, {1}, {2}, {3}, {4}}});
}

TEST_P(DeviceChain, GoesThroughUnitsThatHaveNothingToMultiply) {
    expect_like_scalar(
        {64, 17, 5, {{}, {}, {}, {}, {}, {}, {}, {kTokens}, {}, {0}, {}, {}, {}, {}, {}}, true});
}

// Every unit's features are written while other warps still read what they are predicted from.
TEST(ChainLayout, KeepsFeaturesWhileUnitsArePredictedFromThem) {
    std::size_t predictions = 0;
    for (const Case& c : conformance_cases()) {
        if (c.options.calibration == nullptr) continue;
        const Calibration& calibration = *c.options.calibration;
        const CalibrationData& data = calibration.data();
        const Calibration::Set set = calibration.set_of_level(c.options.level);
        const auto layout = device::ChainLayout::make(data, set, cuda::kMostChainBytes);
        if (!layout) continue;
        std::map<std::uint32_t, std::array<std::size_t, 3>> held;
        for (std::size_t layer = 0; layer < data.layout.layers; ++layer) {
            for (std::size_t plane = 0; plane < data.parts.size(); ++plane) {
                for (std::size_t part = 0; part < data.parts[plane]; ++part) {
                    held[layout->features(layer, plane, part)] = {layer, plane, part};
                    for (const PredictionTerm& term : set.unit(layer, plane, part).terms) {
                        if (term.source == PredictionTerm::Source::kTokens) continue;
                        const std::size_t from = layer - term.layers_back;
                        const std::array<std::size_t, 3> source = {from, term.plane, part};
                        EXPECT_EQ(held.at(layout->features(from, term.plane, part)), source) << c.name;
                        ++predictions;
                    }
                }
            }
        }
    }
    EXPECT_GT(predictions, 0u);
}

INSTANTIATE_TEST_SUITE_P(Orders, DeviceChain, all_orders(), order_name);

}  // namespace
}  // namespace kvcast::test
