#include "tools/model/fisher.h"

#include <cmath>

namespace kvcast::model {
namespace {

// A generator of random signs, 64 at a time.
class Signs {
  public:
    explicit Signs(std::mt19937_64& random) : random_(random) {}

    float next() {
        if (left_ == 0) {
            bits_ = random_();
            left_ = 64;
        }
        --left_;
        const float sign = (bits_ & 1) != 0 ? 1.0f : -1.0f;
        bits_ >>= 1;
        return sign;
    }

  private:
    std::mt19937_64& random_;
    std::uint64_t bits_ = 0;
    unsigned left_ = 0;
};

}  // namespace

void fisher_gradients(const Runner& runner, const Context& context,
                      std::span<const std::int32_t> continuation, std::size_t draws, std::mt19937_64& random,
                      const std::function<void(KvGradients)>& sink) {
    Signs signs(random);
    runner.kv_gradients(
        context, continuation, draws,
        [&](std::size_t, std::span<const float> log_p, std::span<float> weights) {
            for (std::size_t i = 0; i < weights.size(); ++i)
                weights[i] = std::exp(0.5f * log_p[i]) * signs.next();
        },
        [&](std::size_t, KvGradients gradients) { sink(std::move(gradients)); });
}

}  // namespace kvcast::model
