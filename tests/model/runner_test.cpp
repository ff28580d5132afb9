// The model runner against what Hugging Face computes with the same weights: see make_tiny_models.py.
#include "tools/model/runner.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>

#include "tests/tools/scratch.h"
#include "tools/common/safetensors.h"

namespace kvcast::model {
namespace {

using testing::HasSubstr;
using tools::error_of;
using tools::SafetensorsReader;
using tools::ScratchDirectory;

const std::string kTiny = KVCAST_TINY_MODELS;

template <typename T>
std::vector<T> values(const SafetensorsReader& file, const std::string& name) {
    const auto data = file.at(name).data;
    std::vector<T> out(data.size() / sizeof(T));
    std::memcpy(out.data(), data.data(), data.size());
    return out;
}

std::vector<float> floats(std::span<const std::byte> bytes) {
    std::vector<float> out(bytes.size() / sizeof(float));
    std::memcpy(out.data(), bytes.data(), bytes.size());
    return out;
}

float largest_difference(std::span<const float> a, std::span<const float> b) {
    EXPECT_EQ(a.size(), b.size());
    float most = 0;
    for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
        const float d = std::abs(a[i] - b[i]);
        most = d <= most ? most : d;  // NaN counts as a difference
    }
    return most;
}

// The first `tokens` of a cache [layers, all, heads, head_dim].
std::vector<float> first_tokens(const std::vector<float>& all, std::size_t layers, std::size_t total,
                                std::size_t tokens) {
    const std::size_t row = all.size() / layers / total;
    std::vector<float> out;
    for (std::size_t l = 0; l < layers; ++l) {
        const auto begin = all.begin() + static_cast<std::ptrdiff_t>(l * total * row);
        out.insert(out.end(), begin, begin + static_cast<std::ptrdiff_t>(tokens * row));
    }
    return out;
}

class TinyModel : public testing::TestWithParam<std::string> {
  protected:
    const std::string folder = kTiny + "/" + GetParam();
    const SafetensorsReader expected{folder + "/expected.safetensors"};
    const Runner runner = Runner::load(folder);
    const std::vector<std::int32_t> ids = values<std::int32_t>(expected, "token_ids");
    const std::uint64_t first = std::stoull(expected.metadata().at("first_position"));

    Context empty() const {
        Context context;
        context.first_position = first;
        return context;
    }
};

constexpr float kTolerance = 2e-4f;

TEST_P(TinyModel, PrefillGivesTheSameLogitsAndCache) {
    const PrefillResult got = runner.prefill(ids, empty(), {LogitRows::kAll, true, Element::kF32});
    EXPECT_LT(largest_difference(got.logits, values<float>(expected, "logits")), kTolerance);
    EXPECT_LT(largest_difference(floats(got.kv.k), values<float>(expected, "k")), kTolerance);
    EXPECT_LT(largest_difference(floats(got.kv.v), values<float>(expected, "v")), kTolerance);
}

TEST_P(TinyModel, PrefillOnTopOfACacheGoesOnWhereItEnds) {
    const std::size_t layers = runner.config().layers, head = 15;
    const auto k = first_tokens(values<float>(expected, "k"), layers, ids.size(), head);
    const auto v = first_tokens(values<float>(expected, "v"), layers, ids.size(), head);
    const Context context = {{std::as_bytes(std::span(k)), std::as_bytes(std::span(v)), head, Element::kF32},
                             first};
    const PrefillResult got = runner.prefill(std::span(ids).subspan(head), context, {LogitRows::kAll});
    const auto logits = values<float>(expected, "logits");
    const std::size_t vocabulary = runner.config().vocabulary;
    EXPECT_LT(largest_difference(got.logits, std::span(logits).subspan(head * vocabulary)), kTolerance);
    const PrefillResult last = runner.prefill(std::span(ids).subspan(head), context);
    EXPECT_LT(largest_difference(last.logits, std::span(logits).last(vocabulary)), kTolerance);
}

TEST_P(TinyModel, GreedyDecodingChoosesTheSameTokens) {
    const auto tokens = values<std::int32_t>(expected, "greedy");
    EXPECT_EQ(runner.greedy(ids, tokens.size(), empty()), tokens);
}

TEST_P(TinyModel, GradientsOfTheCacheAreTheSame) {
    const auto targets = values<std::int32_t>(expected, "targets");
    const auto weights = values<float>(expected, "weights");
    const std::size_t layers = runner.config().layers, head = ids.size() - targets.size();
    const auto k = first_tokens(values<float>(expected, "k"), layers, ids.size(), head);
    const auto v = first_tokens(values<float>(expected, "v"), layers, ids.size(), head);
    const Context context = {{std::as_bytes(std::span(k)), std::as_bytes(std::span(v)), head, Element::kF32},
                             first};
    const std::size_t vocabulary = runner.config().vocabulary;
    const auto weigh = [&](std::size_t, std::span<const float> log_p, std::span<float> out) {
        ASSERT_EQ(log_p.size(), targets.size() * vocabulary);
        for (std::size_t i = 0; i < targets.size(); ++i)
            out[i * vocabulary + static_cast<std::size_t>(targets[i])] = weights[i];
    };
    std::size_t seen = 0;
    runner.kv_gradients(context, std::span(ids).subspan(head), 2, weigh, [&](std::size_t i, KvGradients got) {
        EXPECT_EQ(i, seen++);
        EXPECT_LT(largest_difference(got.k, values<float>(expected, "dk")), kTolerance);
        EXPECT_LT(largest_difference(got.v, values<float>(expected, "dv")), kTolerance);
    });
    EXPECT_EQ(seen, 2u);
}

INSTANTIATE_TEST_SUITE_P(Architectures, TinyModel,
                         testing::Values("llama", "llama-sharded-bias", "llama-linear", "llama3",
                                         "llama-yarn", "llama-yarn-mscale", "mistral", "qwen2", "qwen3"),
                         [](const auto& tested) {
                             std::string name = tested.param;
                             std::replace(name.begin(), name.end(), '-', '_');
                             return name;
                         });

// ---- what is refused ----

class BrokenModel : public testing::Test {
  protected:
    BrokenModel() { std::filesystem::copy(kTiny + "/llama", scratch.path() + "/m"); }

    // The sentence with which a changed config.json is refused.
    std::string refusal(const std::string& key, const nlohmann::json& value) {
        const std::string path = scratch / "m/config.json";
        auto config = nlohmann::json::parse(tools::contents(path));
        config[key] = value;
        tools::store(path, config.dump());
        return load_error();
    }
    std::string load_error() {
        return error_of([&] { Runner::load(scratch / "m"); });
    }

    ScratchDirectory scratch;
};

TEST_F(BrokenModel, SaysWhatIsMissing) {
    EXPECT_THAT(error_of([&] { Runner::load(scratch / "nowhere"); }), HasSubstr("nowhere"));
    std::filesystem::remove(scratch / "m/model.safetensors");
    EXPECT_THAT(load_error(), HasSubstr("model.safetensors"));
    tools::store(scratch / "m/config.json", "{");
    EXPECT_THAT(load_error(), HasSubstr("config.json"));
}

TEST_F(BrokenModel, SaysWhatItCannotRun) {
    EXPECT_THAT(refusal("model_type", "gpt2"), HasSubstr("gpt2"));
}

TEST_F(BrokenModel, SaysWhichShapeIsWrong) {
    EXPECT_THAT(refusal("hidden_size", 40), HasSubstr("expected"));
}

TEST_F(BrokenModel, SaysWhichTensorIsMissing) {
    EXPECT_THAT(refusal("num_hidden_layers", 3), HasSubstr("model.layers.2"));
}

TEST_F(BrokenModel, SaysWhichRopeIsUnknown) {
    EXPECT_THAT(refusal("rope_scaling", {{"type", "spiral"}, {"factor", 2.0}}), HasSubstr("spiral"));
}

TEST(RunnerArguments, AreChecked) {
    const Runner runner = Runner::load(kTiny + "/llama");
    const std::vector<std::int32_t> none, high = {1, 64}, low = {-1}, fine = {1, 2};
    EXPECT_THAT(error_of([&] { runner.prefill(none); }), HasSubstr("at least one"));
    EXPECT_THAT(error_of([&] { runner.prefill(high); }), HasSubstr("64"));
    EXPECT_THAT(error_of([&] { runner.prefill(low); }), HasSubstr("-1"));
    std::vector<std::byte> bytes(100);
    const Context wrong = {{bytes, bytes, 3, Element::kF32}, 0};
    EXPECT_THAT(error_of([&] { runner.prefill(fine, wrong); }), HasSubstr("100"));
    EXPECT_THAT(error_of([] { Runner::load(kTiny + "/llama", {.device = "abacus"}); }), HasSubstr("abacus"));
    const Runner windowed = Runner::load(kTiny + "/mistral");
    EXPECT_THAT(error_of([&] { windowed.prefill(std::vector<std::int32_t>(41, 1)); }), HasSubstr("window"));
}

// ---- the real model ----

TEST(RealModel, AgreesWithHuggingFace) {
    const std::string folder = KVCAST_REAL_MODEL;
    if (!std::filesystem::exists(folder + "/model.safetensors"))
        GTEST_SKIP() << folder << " is not there; data/get-model fetches it";
    const Runner runner = Runner::load(folder);
    std::ifstream in(KVCAST_REAL_EXPECTED);
    const auto expected = nlohmann::json::parse(in);
    const SafetensorsReader sample(KVCAST_SAMPLE);
    const auto ids = values<std::int32_t>(sample, "token_ids");
    const PrefillResult got = runner.prefill(ids, {}, {LogitRows::kLast, true, Element::kBf16});
    for (std::size_t i = 0; i < expected["logit_ids"].size(); ++i)
        EXPECT_NEAR(got.logits[expected["logit_ids"][i]], expected["logits"][i].get<float>(), 2e-3);
    const auto greedy = expected["greedy"].get<std::vector<std::int32_t>>();
    EXPECT_EQ(runner.greedy(ids, greedy.size()), greedy);
    // The committed sample was computed by another implementation: a few values round the other way.
    const auto k = sample.at("k").data;
    std::size_t differ = 0;
    for (std::size_t i = 0; i < k.size(); i += 2)
        differ += std::memcmp(k.data() + i, got.kv.k.data() + i, 2) != 0;
    EXPECT_LT(static_cast<double>(differ), 0.01 * static_cast<double>(k.size() / 2));
}

}  // namespace
}  // namespace kvcast::model
