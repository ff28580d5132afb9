// kvprefill: a model reads token ids, and its KV cache becomes a safetensors file.
#include <fmt/format.h>

#include <chrono>
#include <optional>

#include "codec/format/chunk_header.h"
#include "tools/common/cli.h"
#include "tools/common/kv_file.h"
#include "tools/model/runner.h"
#include "tools/model/tokens.h"

namespace {

using namespace kvcast;
using namespace kvcast::tools;

struct Arguments {
    std::string model;
    std::string tokens;
    std::string output;
    std::string name;
    bool raw = false;
    std::size_t limit = 0;
    std::string dtype = "bf16";
    std::uint64_t base_position = 0;
    std::string model_name;
    model::LoadOptions load;
    bool quiet = false;
};

void declare(CLI::App& app, Arguments& a) {
    app.add_option("MODEL", a.model,
                   "Hugging Face directory: config.json and safetensors of a Llama, Mistral, "
                   "Qwen2 or Qwen3 model")
        ->required();
    app.add_option("TOKENS", a.tokens,
                   "token ids: a JSON array, or a JSON object of named arrays; - reads standard input")
        ->required();
    app.add_option("-o,--output", a.output, "safetensors file to write")->required();
    app.add_option("--name", a.name, "which array of an object to take");
    app.add_flag("--raw", a.raw, "TOKENS is raw little-endian int32 instead of JSON");
    app.add_option("--tokens", a.limit, "only the first N tokens")->check(CLI::PositiveNumber);
    app.add_option("--dtype", a.dtype, "bf16, fp16 or fp32")
        ->check(CLI::IsMember({"bf16", "fp16", "fp32"}))
        ->capture_default_str();
    app.add_option("--base-position", a.base_position, "position of the first token")
        ->check(CLI::Range(std::uint64_t{0}, ChunkLimits::kPosition))
        ->capture_default_str();
    app.add_option("--model-name", a.model_name, "kvcast.model of the output; default: the model's own name");
    app.add_option("--device", a.load.device, "cpu, cuda or cuda:N")->capture_default_str();
    app.add_option("-j,--jobs", a.load.threads, "threads; default: one per core")->check(CLI::Range(1, 1024));
    app.add_flag("-q,--quiet", a.quiet, "print nothing on success");
}

struct Type {
    Dtype dtype;
    model::Element element;
};

Type type_of(const std::string& name) {
    if (name == "bf16") return {Dtype::kBf16, model::Element::kBf16};
    if (name == "fp16") return {Dtype::kF16, model::Element::kF16};
    return {Dtype::kF32, model::Element::kF32};
}

Layout layout_of(const model::ModelConfig& config, Dtype dtype) {
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

void write_kv(const Arguments& a, const Layout& layout, const std::string& name, const model::TokenIds& ids,
              const model::KvBuffer& kv) {
    const std::vector<std::size_t> shape = {layout.layers, ids.size(), layout.planes[0].heads,
                                            layout.planes[0].head_dim};
    const TensorType type = tensor_type(layout.dtype);
    SafetensorsWriter writer(
        a.output, {{"token_ids", TensorType::kI32, {ids.size()}}, {"k", type, shape}, {"v", type, shape}},
        kv_metadata(layout, name, a.base_position));
    writer.write(0, 0, std::as_bytes(std::span(ids)));
    writer.write(1, 0, kv.k);
    writer.write(2, 0, kv.v);
    writer.commit();
}

void prefill(const Arguments& a) {
    if (a.output == "-")
        throw Error("kvprefill writes a file, not standard output: safetensors needs seeking");
    const auto kind = a.raw ? model::TokenFileKind::kRaw : model::TokenFileKind::kJson;
    model::TokenIds ids = model::read_tokens(a.tokens, a.name, kind);
    if (a.limit > ids.size()) {
        throw Error(fmt::format("{}: holds {} tokens, --tokens asks for {}", a.tokens, ids.size(), a.limit));
    }
    if (a.limit != 0) ids.resize(a.limit);
    const auto runner = model::Runner::load(a.model, a.load);
    const Type type = type_of(a.dtype);
    model::Context nothing;
    nothing.first_position = a.base_position;
    const auto start = std::chrono::steady_clock::now();
    const auto result = runner.prefill(ids, nothing, {model::LogitRows::kNone, true, type.element});
    const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - start;
    const std::string name = a.model_name.empty() ? runner.config().name : a.model_name;
    write_kv(a, layout_of(runner.config(), type.dtype), name, ids, result.kv);
    if (a.quiet) return;
    fmt::print("{}: {} tokens, {} layers of {} heads x {}, {}, prefilled in {:.2f} s\n", a.output, ids.size(),
               runner.config().layers, runner.config().kv_heads, runner.config().head_dim, a.dtype,
               spent.count());
}

}  // namespace

int main(int argc, char** argv) {
    CLI::App app("Computes the KV cache of token ids with a model and writes it as a safetensors file.",
                 "kvprefill");
    Arguments a;
    declare(app, a);
    return run_tool(app, argc, argv, [&] { prefill(a); });
}
