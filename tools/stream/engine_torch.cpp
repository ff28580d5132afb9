#include <chrono>

#include "tools/model/kv.h"
#include "tools/model/process.h"
#include "tools/stream/engine.h"

namespace kvcast::tools {
namespace {

constexpr std::size_t kWarmUpTokens = 16;
constexpr std::size_t kTimedTokens = 128;

class TorchEngine final : public Engine {
  public:
    TorchEngine(const std::string& folder, int threads) : runner_(load(folder, threads)) {}

    KvCache recompute(const KvCache& context, std::span<const std::int32_t> token_ids) override {
        model::PrefillOptions options;
        options.logits = model::LogitRows::kNone;
        options.kv_element = model::element_of(context.layout.dtype);
        model::PrefillResult got =
            runner_.prefill(token_ids, model::context_of(context, runner_.config()), options);
        KvCache out = {
            context.layout, context.model, context.base_position, {token_ids.begin(), token_ids.end()}, {}};
        out.planes.push_back(std::move(got.kv.k));
        out.planes.push_back(std::move(got.kv.v));
        return out;
    }

    std::vector<streamer::PrefillSpeed> measure_prefill() override {
        const std::vector<std::int32_t> ids(kTimedTokens, 1);
        runner_.prefill(std::span(ids).first(kWarmUpTokens));
        const auto start = std::chrono::steady_clock::now();
        runner_.prefill(ids);
        const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - start;
        return {{0, static_cast<double>(kTimedTokens) / spent.count()}};
    }

    std::vector<std::int32_t> greedy(const KvCache& cache, std::size_t count) override {
        const KvCache before = first_tokens(cache, cache.tokens() - 1);
        return runner_.greedy(std::span(cache.token_ids).last(1), count,
                              model::context_of(before, runner_.config()));
    }

    KvCache blank(std::span<const std::int32_t> token_ids) override {
        return {model::layout_of(runner_.config(), Dtype::kBf16),
                runner_.config().name,
                0,
                {token_ids.begin(), token_ids.end()},
                {}};
    }

  private:
    static model::Runner load(const std::string& folder, int threads) {
        model::LoadOptions options;
        options.threads = threads;
        return model::Runner::load(folder, options);
    }

    model::Runner runner_;
};

}  // namespace

void prepare_for_engine(char** argv) {
    model::prepare_process(argv);
}

std::unique_ptr<Engine> load_engine(const std::string& folder, int threads) {
    return std::make_unique<TorchEngine>(folder, threads);
}

}  // namespace kvcast::tools
