#include "tools/model/kv.h"

#include <fmt/format.h>

#include <cmath>

namespace kvcast::model {

Element element_of(Dtype dtype) {
    if (dtype == Dtype::kBf16) return Element::kBf16;
    return dtype == Dtype::kF16 ? Element::kF16 : Element::kF32;
}

Layout layout_of(const ModelConfig& config, Dtype dtype) {
    Layout layout;
    layout.layers = config.layers;
    layout.planes.assign(2, {config.kv_heads, config.head_dim});
    layout.dtype = dtype;
    layout.rope.pairing = RopePairing::kHalf;
    layout.rope.dim = config.head_dim;
    if (!config.rope.scaled) {
        layout.rope.frequencies = geometric_frequencies(config.rope.theta, config.head_dim);
        return layout;
    }
    for (const double f : config.rope.frequencies)
        layout.rope.frequencies.push_back(frequency_from_radians(f));
    return layout;
}

Context context_of(const tools::KvCache& cache, const ModelConfig& config) {
    const Layout expected = layout_of(config, cache.layout.dtype);
    if (!(cache.layout == expected)) {
        const auto shape = [](const Layout& l) {
            return fmt::format("{} layers, {} planes of {} heads x {}", l.layers, l.planes.size(),
                               l.planes[0].heads, l.planes[0].head_dim);
        };
        if (shape(cache.layout) == shape(expected))
            throw tools::Error(fmt::format("the cache's RoPE is not that of model '{}'", config.name));
        throw tools::Error(fmt::format("the cache has {}, model '{}' has {}", shape(cache.layout),
                                       config.name, shape(expected)));
    }
    return {{cache.planes[0], cache.planes[1], cache.tokens(), element_of(cache.layout.dtype)},
            cache.base_position};
}

tools::KvCache prefilled(const Runner& runner, std::span<const std::int32_t> token_ids, Dtype dtype,
                         std::uint64_t base_position) {
    Context nothing;
    nothing.first_position = base_position;
    PrefillResult result = runner.prefill(token_ids, nothing, {LogitRows::kNone, true, element_of(dtype)});
    tools::KvCache cache;
    cache.layout = layout_of(runner.config(), dtype);
    cache.model = runner.config().name;
    cache.base_position = base_position;
    cache.token_ids.assign(token_ids.begin(), token_ids.end());
    cache.planes.push_back(std::move(result.kv.k));
    cache.planes.push_back(std::move(result.kv.v));
    return cache;
}

void turn(std::vector<float>& k, const Layout& layout, std::uint64_t base_position, int direction) {
    const Rope& rope = layout.rope;
    if (rope.pairing == RopePairing::kNone) return;
    const std::size_t width = layout.planes[0].width(), head_dim = layout.planes[0].head_dim;
    const std::size_t tokens = k.size() / width / layout.layers, pairs = rope.dim / 2;
    const bool half = rope.pairing == RopePairing::kHalf;
    const double turn_size = direction * 6.283185307179586 / 18446744073709551616.0;
    for (std::size_t t = 0; t < tokens; ++t) {
        for (std::size_t i = 0; i < pairs; ++i) {
            const double angle = static_cast<double>((base_position + t) * rope.frequencies[i]) * turn_size;
            const auto c = static_cast<float>(std::cos(angle)), s = static_cast<float>(std::sin(angle));
            const std::size_t a = rope.offset + (half ? i : 2 * i), b = half ? a + pairs : a + 1;
            for (std::size_t l = 0; l < layout.layers; ++l) {
                for (float* x = &k[(l * tokens + t) * width]; x != &k[(l * tokens + t) * width] + width;
                     x += head_dim) {
                    const float x0 = x[a], x1 = x[b];
                    x[a] = x0 * c - x1 * s;
                    x[b] = x1 * c + x0 * s;
                }
            }
        }
    }
}

}  // namespace kvcast::model
