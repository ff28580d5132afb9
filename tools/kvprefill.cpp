// kvprefill: a model reads token ids, and its KV cache becomes a safetensors file.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <chrono>
#include <optional>

#include "codec/format/chunk_header.h"
#include "tools/common/cli.h"
#include "tools/model/kv.h"
#include "tools/model/process.h"
#include "tools/model/tokenizer.h"
#include "tools/model/tokens.h"

namespace {

using namespace kvcast;
using namespace kvcast::tools;

struct Arguments {
    std::string model;
    std::string tokens;
    std::string text;
    std::string output;
    std::string name;
    bool raw = false;
    std::size_t limit = 0;
    std::string dtype = "bf16";
    std::uint64_t base_position = 0;
    std::string model_name;
    model::LoadOptions load;
    std::size_t greedy = 0;
    bool quiet = false;
};

void declare(CLI::App& app, Arguments& a) {
    app.add_option("MODEL", a.model,
                   "Hugging Face directory: config.json and safetensors of a Llama, Mistral, "
                   "Qwen2 or Qwen3 model")
        ->required();
    app.add_option("TOKENS", a.tokens,
                   "token ids: a JSON array, or a JSON object of named arrays; - reads standard input");
    app.add_option("--text", a.text,
                   "file of UTF-8 text instead of TOKENS; needs the model's tokenizer.json and the Python "
                   "package tokenizers")
        ->type_name("FILE");
    app.add_option("-o,--output", a.output, "safetensors file to write; with --greedy optional");
    app.add_option("--name", a.name, "which array of an object to take");
    app.add_flag("--raw", a.raw, "TOKENS is raw little-endian int32 instead of JSON");
    app.add_option("--tokens", a.limit, "only the first N tokens")->check(positive_number());
    app.add_option("--dtype", a.dtype, "bf16, fp16 or fp32")
        ->check(CLI::IsMember({"bf16", "fp16", "fp32"}))
        ->capture_default_str();
    app.add_option("--base-position", a.base_position, "position of the first token")
        ->check(CLI::Range(std::uint64_t{0}, ChunkLimits::kPosition))
        ->capture_default_str();
    app.add_option("--model-name", a.model_name, "kvcast.model of the output; default: the model's own name");
    app.add_option("--device", a.load.device, "cpu, cuda or cuda:N")->capture_default_str();
    app.add_option("-j,--jobs", a.load.threads, "threads; default: one per core")->check(CLI::Range(1, 1024));
    app.add_option("--greedy", a.greedy, "print the likeliest continuation of this many tokens");
    app.add_flag("-q,--quiet", a.quiet, "print nothing on success");
}

Dtype dtype_of(const std::string& name) {
    if (name == "bf16") return Dtype::kBf16;
    return name == "fp16" ? Dtype::kF16 : Dtype::kF32;
}

model::TokenIds token_ids(const Arguments& a) {
    if (!a.text.empty()) return model::tokenize_file(a.model, a.text);
    return model::read_tokens(a.tokens, a.name,
                              a.raw ? model::TokenFileKind::kRaw : model::TokenFileKind::kJson);
}

void write_prefilled(const Arguments& a, const model::Runner& runner, const model::TokenIds& ids) {
    const auto start = std::chrono::steady_clock::now();
    KvCache cache = model::prefilled(runner, ids, dtype_of(a.dtype), a.base_position);
    const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - start;
    if (!a.model_name.empty()) cache.model = a.model_name;
    save_kv(a.output, cache);
    if (a.quiet) return;
    fmt::print("{}: {} tokens, {} layers of {} heads x {}, {}, prefilled in {:.2f} s\n", a.output, ids.size(),
               runner.config().layers, runner.config().kv_heads, runner.config().head_dim, a.dtype,
               spent.count());
}

// The first token's time is that of a server that has nothing stored.
void continue_greedily(const Arguments& a, const model::Runner& runner, const model::TokenIds& ids) {
    const auto start = std::chrono::steady_clock::now();
    runner.greedy(ids, 1);
    const std::chrono::duration<double> first = std::chrono::steady_clock::now() - start;
    fmt::print("first token after {:.0f} ms; continuation: {}\n", first.count() * 1e3,
               fmt::join(runner.greedy(ids, a.greedy), " "));
}

const std::string& source_of(const Arguments& a) {
    return a.text.empty() ? a.tokens : a.text;
}

void check_ids(const Arguments& a, const model::TokenIds& ids, std::size_t vocabulary) {
    const auto beyond = std::ranges::find_if(
        ids, [&](std::int32_t id) { return static_cast<std::size_t>(id) >= vocabulary; });
    if (beyond == ids.end()) return;
    throw Error(fmt::format("{}: token {} is id {}, the model has ids from 0 to {}", source_of(a),
                            beyond - ids.begin(), *beyond, vocabulary - 1));
}

void prefill(const Arguments& a) {
    if (a.output == "-")
        throw Error("kvprefill writes a file, not standard output: safetensors needs seeking");
    if (a.tokens.empty() == a.text.empty()) throw Error("give either TOKENS or --text FILE");
    refuse_same_file(a.output, {source_of(a)});
    model::TokenIds ids = token_ids(a);
    if (a.limit > ids.size()) {
        throw Error(
            fmt::format("{}: holds {} tokens, --tokens asks for {}", source_of(a), ids.size(), a.limit));
    }
    if (a.limit != 0) ids.resize(a.limit);
    if (a.output.empty() && a.greedy == 0) throw Error("give an --output, or --greedy");
    const auto runner = model::Runner::load(a.model, a.load);
    check_ids(a, ids, runner.config().vocabulary);
    if (!a.output.empty()) write_prefilled(a, runner, ids);
    if (a.greedy > 0) continue_greedily(a, runner, ids);
}

}  // namespace

int main(int argc, char** argv) {
    model::prepare_process(argv);
    CLI::App app("Computes the KV cache of token ids with a model and writes it as a safetensors file.",
                 "kvprefill");
    Arguments a;
    declare(app, a);
    return run_tool(app, argc, argv, [&] { prefill(a); });
}
