#include "tools/model/runner.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <dlfcn.h>
#include <fmt/format.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <cstring>
#include <thread>

#include "tools/common/file.h"
#include "tools/model/network.h"
#include "tools/model/weights.h"

namespace kvcast::model {
namespace {

using tools::Error;

// Failures inside the framework (out of memory, a device that went away) as one sentence without its stack.
template <typename Call>
auto guarded(const Call& call) {
    try {
        return call();
    } catch (const c10::Error& e) {
        const std::string what = e.what_without_backtrace();
        throw Error(fmt::format("libtorch: {}", what.substr(0, what.find('\n'))));
    }
}

at::ScalarType scalar_type(Element element) {
    return element == Element::kF32 ? at::kFloat : element == Element::kBf16 ? at::kBFloat16 : at::kHalf;
}

std::int64_t signed_of(std::size_t n) {
    return static_cast<std::int64_t>(n);
}

// CUDA kernels live in a library of their own, which nothing links to: where it is there, loading it is
// enough.
at::Device open_device(const std::string& name) {
    const bool digits = name.size() > 5 && name.find_first_not_of("0123456789", 5) == std::string::npos;
    const bool cuda = name == "cuda" || (name.rfind("cuda:", 0) == 0 && name.size() < 8 && digits);
    if (name != "cpu" && !cuda) throw Error(fmt::format("device '{}', expected cpu, cuda or cuda:N", name));
    if (!cuda) return at::Device(at::kCPU);
    ::dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_GLOBAL);
    if (!at::hasCUDA()) throw Error(fmt::format("device '{}': this libtorch has no working CUDA", name));
    return at::Device(name);
}

// The runner's own storage of keys and values, filled layer by layer: [layers, kv_heads, capacity, head_dim].
class KvStore {
  public:
    KvStore(const ModelConfig& c, std::size_t capacity, const at::TensorOptions& options)
        : k_(at::empty(
              {signed_of(c.layers), signed_of(c.kv_heads), signed_of(capacity), signed_of(c.head_dim)},
              options)),
          v_(at::empty_like(k_)) {}

    // Takes [layers, tokens, kv_heads, head_dim] as the first tokens.
    void load(const at::Tensor& k, const at::Tensor& v) {
        k_.narrow(2, 0, k.size(1)).copy_(k.transpose(1, 2));
        v_.narrow(2, 0, v.size(1)).copy_(v.transpose(1, 2));
        tokens_ = k.size(1);
    }

    ExtendKv extender() {
        return [this](std::size_t layer, const KeysValues& added) { return extend(layer, added); };
    }

    void advance(std::int64_t tokens) { tokens_ += tokens; }
    std::int64_t tokens() const { return tokens_; }
    const at::Tensor& k() const { return k_; }
    const at::Tensor& v() const { return v_; }

  private:
    KeysValues extend(std::size_t layer, const KeysValues& added) {
        const std::int64_t n = added.first.size(1);
        const at::Tensor k = k_.select(0, signed_of(layer)), v = v_.select(0, signed_of(layer));
        k.narrow(1, tokens_, n).copy_(added.first);
        v.narrow(1, tokens_, n).copy_(added.second);
        return {k.narrow(1, 0, tokens_ + n), v.narrow(1, 0, tokens_ + n)};
    }

    at::Tensor k_, v_;
    std::int64_t tokens_ = 0;
};

std::vector<float> floats_of(const at::Tensor& tensor) {
    const at::Tensor dense = tensor.to(at::kCPU, at::kFloat).contiguous();
    const float* data = dense.data_ptr<float>();
    return {data, data + dense.numel()};
}

// [kv_heads, T, head_dim] per layer of the store, from `first`, as bytes [layers, T, kv_heads, head_dim].
std::vector<std::byte> bytes_of(const at::Tensor& stored, std::int64_t first, std::int64_t tokens,
                                Element element) {
    const at::Tensor part = stored.narrow(2, first, tokens).transpose(1, 2);
    const at::Tensor dense = part.to(at::kCPU, scalar_type(element)).contiguous();
    std::vector<std::byte> out(dense.nbytes());
    std::memcpy(out.data(), dense.data_ptr(), out.size());
    return out;
}

}  // namespace

std::size_t element_bytes(Element element) {
    return element == Element::kF32 ? 4 : 2;
}

struct Runner::Impl {
    Network network;

    const ModelConfig& config() const { return network.config(); }
    at::Tensor ids_of(std::span<const std::int32_t> ids) const;
    void check_length(const Context& context, std::size_t added) const;
    KeysValues tensors_of(const KvView& kv) const;
    KvStore store_of(const Context& context, std::size_t added) const;
};

at::Tensor Runner::Impl::ids_of(std::span<const std::int32_t> ids) const {
    if (ids.empty()) throw Error("no token ids, expected at least one");
    const auto wide = at::empty({signed_of(ids.size())}, at::kLong);
    auto* out = wide.data_ptr<std::int64_t>();
    for (std::size_t i = 0; i < ids.size(); ++i) {
        if (ids[i] < 0 || static_cast<std::size_t>(ids[i]) >= config().vocabulary) {
            throw Error(
                fmt::format("token {} is id {}, expected 0 to {}", i, ids[i], config().vocabulary - 1));
        }
        out[i] = ids[i];
    }
    return wide.to(network.options().device());
}

// A window that is not smaller than the sequence does nothing, and only then is full attention right.
void Runner::Impl::check_length(const Context& context, std::size_t added) const {
    const std::size_t used = context.kv.tokens + added, window = config().sliding_window;
    if (window != 0 && used > window) {
        throw Error(fmt::format(
            "{} tokens do not fit the model's sliding window of {}, which is not implemented", used, window));
    }
    if (context.first_position > (std::uint64_t{1} << 48)) {
        throw Error(fmt::format("position {}, expected at most 2^48", context.first_position));
    }
}

// The caller's buffers as they lie, [layers, tokens, kv_heads, head_dim].
KeysValues Runner::Impl::tensors_of(const KvView& kv) const {
    const ModelConfig& c = config();
    const std::size_t row = c.layers * c.kv_heads * c.head_dim * element_bytes(kv.element);
    if (kv.k.size() != kv.v.size() || kv.k.size() / row != kv.tokens || kv.k.size() % row != 0) {
        throw Error(
            fmt::format("context of {} and {} bytes, expected {} layers x {} tokens x {} heads x {} of "
                        "{} bytes each for K and V",
                        kv.k.size(), kv.v.size(), c.layers, kv.tokens, c.kv_heads, c.head_dim,
                        element_bytes(kv.element)));
    }
    const std::vector<std::int64_t> shape = {signed_of(c.layers), signed_of(kv.tokens), signed_of(c.kv_heads),
                                             signed_of(c.head_dim)};
    // The framework has no constant tensors; these are only read.
    const auto tensor = [&](std::span<const std::byte> bytes) {
        return at::from_blob(const_cast<std::byte*>(bytes.data()), shape, scalar_type(kv.element));
    };
    return {tensor(kv.k), tensor(kv.v)};
}

KvStore Runner::Impl::store_of(const Context& context, std::size_t added) const {
    check_length(context, added);
    KvStore store(config(), context.kv.tokens + added, network.options());
    const auto [k, v] = tensors_of(context.kv);
    if (context.kv.tokens != 0) store.load(k, v);
    return store;
}

Runner::Runner(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Runner::~Runner() = default;
Runner::Runner(Runner&&) noexcept = default;
Runner& Runner::operator=(Runner&&) noexcept = default;

const ModelConfig& Runner::config() const {
    return impl_->config();
}

Runner Runner::load(const std::string& folder, const LoadOptions& options) {
    return guarded([&] {
        const at::NoGradGuard no_grad;
        // OpenMP's own default may be one thread where the process is confined to some of the cores.
        const int cores = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
        at::set_num_threads(options.threads > 0 ? options.threads : cores);
        const ModelConfig config = read_config(folder);
        const WeightFiles weights(folder);
        const auto placed =
            at::TensorOptions(scalar_type(options.compute)).device(open_device(options.device));
        return Runner(std::make_unique<Impl>(Impl{Network(config, weights, placed)}));
    });
}

PrefillResult Runner::prefill(std::span<const std::int32_t> token_ids, const Context& context,
                              const PrefillOptions& options) const {
    return guarded([&] {
        const at::NoGradGuard no_grad;
        const at::Tensor ids = impl_->ids_of(token_ids);
        KvStore store = impl_->store_of(context, token_ids.size());
        at::Tensor hidden = impl_->network.forward(ids, context.next_position(), store.extender());
        if (options.logits == LogitRows::kLast) hidden = hidden.narrow(0, ids.size(0) - 1, 1);
        PrefillResult result;
        if (options.logits != LogitRows::kNone) result.logits = floats_of(impl_->network.logits(hidden));
        if (options.keep_kv) {
            result.kv.tokens = token_ids.size();
            result.kv.element = options.kv_element;
            result.kv.k = bytes_of(store.k(), store.tokens(), ids.size(0), options.kv_element);
            result.kv.v = bytes_of(store.v(), store.tokens(), ids.size(0), options.kv_element);
        }
        return result;
    });
}

std::vector<std::int32_t> Runner::greedy(std::span<const std::int32_t> prompt, std::size_t count,
                                         const Context& context) const {
    return guarded([&] {
        const at::NoGradGuard no_grad;
        at::Tensor ids = impl_->ids_of(prompt);
        KvStore store = impl_->store_of(context, prompt.size() + count);
        std::vector<std::int32_t> out;
        while (out.size() < count) {
            const std::uint64_t position =
                context.first_position + static_cast<std::uint64_t>(store.tokens());
            const at::Tensor hidden = impl_->network.forward(ids, position, store.extender());
            store.advance(ids.size(0));
            const at::Tensor last = hidden.narrow(0, ids.size(0) - 1, 1);
            ids = impl_->network.logits(last).argmax(-1);
            out.push_back(static_cast<std::int32_t>(ids.item<std::int64_t>()));
        }
        return out;
    });
}

void Runner::kv_gradients(const Context& context, std::span<const std::int32_t> continuation,
                          std::size_t draws, const LogProbabilityWeights& weigh,
                          const std::function<void(std::size_t, KvGradients)>& sink) const {
    guarded([&] {
        const at::AutoGradMode with_grad(true);
        const Network& network = impl_->network;
        const at::Tensor ids = impl_->ids_of(continuation);
        impl_->check_length(context, continuation.size());
        const auto [k, v] = impl_->tensors_of(context.kv);
        // Leaves lie as [layers, kv_heads, tokens, head_dim]; turning K back and forth makes K before RoPE
        // one.
        const Rotation turn = network.rotation(context.first_position, signed_of(context.kv.tokens));
        const Rotation back = {turn.cosine, turn.sine.neg()};
        const auto wide = network.options().dtype(at::kFloat);
        const at::Tensor plain_k = rotate(k.to(wide).transpose(1, 2), back).set_requires_grad(true);
        const at::Tensor leaf_v = v.to(wide).transpose(1, 2).contiguous().clone().set_requires_grad(true);
        // All layers at once: a selected one would have a gradient as large as that of all.
        const std::vector<at::Tensor> turned_k = rotate(plain_k, turn).to(network.options()).unbind(0);
        const std::vector<at::Tensor> used_v = leaf_v.to(network.options()).unbind(0);
        const ExtendKv extend = [&](std::size_t layer, const KeysValues& added) -> KeysValues {
            return {at::cat({turned_k[layer], added.first}, 1), at::cat({used_v[layer], added.second}, 1)};
        };
        const at::Tensor hidden = network.forward(ids, context.next_position(), extend);
        const at::Tensor log_p = network.logits(hidden).log_softmax(-1);
        const std::vector<float> known = floats_of(log_p);
        for (std::size_t i = 0; i < draws; ++i) {
            const at::Tensor weights = at::zeros(log_p.sizes(), at::kFloat);
            weigh(i, known, {weights.data_ptr<float>(), known.size()});
            const at::Tensor sum = (log_p * weights.to(log_p.device())).sum();
            const auto gradients = torch::autograd::grad({sum}, {plain_k, leaf_v}, {}, i + 1 < draws);
            sink(i, {floats_of(gradients[0].transpose(1, 2)), floats_of(gradients[1].transpose(1, 2))});
        }
    });
}

std::vector<float> Runner::embeddings(std::span<const std::int32_t> token_ids) const {
    return guarded([&] {
        const at::NoGradGuard no_grad;
        return floats_of(impl_->network.embed(impl_->ids_of(token_ids)));
    });
}

}  // namespace kvcast::model
