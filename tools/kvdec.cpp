// kvdec: chunk objects become a KV cache in a safetensors file again.
#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <thread>

#include "codec/decoder.h"
#include "codec/device/coder.h"
#include "tools/common/calibration_file.h"
#include "tools/common/chunk_file.h"
#include "tools/common/cli.h"
#include "tools/common/file.h"
#include "tools/common/kv_file.h"
#include "tools/common/progress.h"

namespace {

using namespace kvcast;
using namespace kvcast::tools;

struct Arguments {
    std::string input;
    std::string output;
    std::string layers;
    std::string tokens;
    std::optional<std::uint64_t> base_position;
    std::string dtype;
    std::string calibration;
    std::size_t jobs = std::max(1u, std::thread::hardware_concurrency());
    std::string device = "cpu";
    bool quiet = false;
};

void declare(CLI::App& app, Arguments& a) {
    app.add_option("IN", a.input, "chunks (.kvc); - reads standard input")->required();
    app.add_option("-o,--output", a.output, "safetensors file to write")->required();
    app.add_option("--layers", a.layers, "only layers A-B, counted from 0");
    app.add_option("--tokens", a.tokens, "only tokens A-B, counted from the file's first");
    app.add_option("--base-position", a.base_position, "position of the context's token 0: moves K by RoPE")
        ->check(CLI::Range(std::uint64_t{0}, ChunkLimits::kPosition));
    app.add_option("--dtype", a.dtype, "bf16, fp16 or fp32; default: as encoded")
        ->check(CLI::IsMember({"bf16", "fp16", "fp32"}));
    app.add_option("--calibration", a.calibration, "calibration of klt chunks (.kvcal)");
    app.add_option("-j,--jobs", a.jobs, "threads")->check(CLI::Range(1, 1024))->capture_default_str();
    declare_device(app, a.device);
    app.add_flag("-q,--quiet", a.quiet, "print nothing on success");
}

std::optional<Dtype> wanted_dtype(const std::string& name) {
    if (name.empty()) return std::nullopt;
    return name == "bf16" ? Dtype::kBf16 : name == "fp16" ? Dtype::kF16 : Dtype::kF32;
}

// The part of the file that is wanted, and the output that it goes to.
class Output {
  public:
    Output(const std::string& path, const std::vector<ChunkInFile>& chunks, const Arguments& a)
        : first_(chunks.front().header), layout_(first_.layout) {
        std::size_t total = 0;
        for (const ChunkInFile& c : chunks) total += c.header.tokens;
        layers_ = parse_range(a.layers, layout_.layers, "layers");
        tokens_ = parse_range(a.tokens, total, "tokens");
        layout_.dtype = wanted_dtype(a.dtype).value_or(layout_.dtype);
        const std::uint64_t base = a.base_position.value_or(first_.base_position);
        const std::uint64_t skipped = first_.first_token + tokens_.first;
        std::vector<TensorSpec> specs = {{"token_ids", TensorType::kI32, {tokens_.end - tokens_.first}}};
        const auto names = plane_names(layout_);
        for (std::size_t p = 0; p < names.size(); ++p) {
            const PlaneShape& s = layout_.planes[p];
            specs.push_back(
                {names[p],
                 tensor_type(layout_.dtype),
                 {layers_.end - layers_.first, tokens_.end - tokens_.first, s.heads, s.head_dim}});
        }
        writer_.emplace(path, std::move(specs), kv_metadata(layout_, first_.model, base + skipped));
    }

    const Layout& layout() const { return layout_; }
    Range layers() const { return layers_; }
    bool wants(std::size_t first, std::size_t count) const {
        return first < tokens_.end && first + count > tokens_.first;
    }

    // Writes what is wanted of a chunk that starts at token `first` of the file.
    void write(const ChunkHeader& chunk, std::size_t first,
               const std::vector<std::vector<std::uint8_t>>& planes) {
        const std::size_t begin = std::max(first, tokens_.first);
        const std::size_t end = std::min(first + chunk.tokens, tokens_.end);
        const auto ids = std::span(chunk.token_ids).subspan(begin - first, end - begin);
        writer_->write(0, (begin - tokens_.first) * 4, std::as_bytes(ids));
        const std::size_t per_layer = layout_.planes.size();
        for (std::size_t l = layers_.first; l < layers_.end; ++l) {
            for (std::size_t p = 0; p < per_layer; ++p) {
                const std::size_t row = layout_.row_bytes(p);
                const auto& bytes = planes[(l - layers_.first) * per_layer + p];
                const auto part = std::span(bytes).subspan((begin - first) * row, (end - begin) * row);
                const std::size_t at =
                    (l - layers_.first) * (tokens_.end - tokens_.first) + begin - tokens_.first;
                writer_->write(p + 1, at * row, std::as_bytes(part));
            }
        }
    }

    void commit() { writer_->commit(); }

  private:
    const ChunkHeader& first_;
    Layout layout_;
    Range layers_;
    Range tokens_;
    std::optional<SafetensorsWriter> writer_;
};

// Decodes the layers of an object into buffers [layer][plane].
using DecodeLayers = std::function<Status(std::span<const std::uint8_t> object, Range layers,
                                          std::span<const PlaneBuffer> planes)>;

// Where the user wants it. Throws Error where there is no such device.
DecodeLayers decoder_on(const std::string& device, const DecodeOptions& options, std::size_t jobs) {
    if (device == "cuda") {
        auto opened = device::DeviceDecoder::open(options);
        if (!opened.ok()) throw Error(fmt::format("--device cuda: {}", opened.status().message()));
        auto decoder = std::make_shared<device::DeviceDecoder>(std::move(opened.value()));
        return [decoder](auto object, Range layers, auto planes) {
            return decoder->decode_layers(object, layers.first, layers.end, planes);
        };
    }
    auto pool = std::make_shared<ThreadPool>(jobs);
    auto workspaces = std::make_shared<std::vector<DecodeWorkspace>>(pool->workers());
    return [=](auto object, Range layers, auto planes) {
        const auto decoder = ChunkDecoder::open(object, options);
        if (!decoder.ok()) return decoder.status();
        return decoder.value().decode_layers(layers.first, layers.end, planes, *pool, *workspaces);
    };
}

// Buffers for the wanted layers of one chunk; planes keeps its memory between calls.
std::vector<PlaneBuffer> buffers_for(std::size_t tokens, Range layers, const Layout& layout,
                                     std::vector<std::vector<std::uint8_t>>& planes) {
    const std::size_t per_layer = layout.planes.size();
    std::vector<PlaneBuffer> buffers;
    planes.resize((layers.end - layers.first) * per_layer);
    for (std::size_t i = 0; i < planes.size(); ++i) {
        const std::size_t row = layout.row_bytes(i);
        planes[i].resize(row * tokens);
        buffers.push_back({planes[i].data(), row});
    }
    return buffers;
}

void decode(const Arguments& a) {
    if (a.output == "-") throw Error("kvdec writes a file, not standard output: safetensors needs seeking");
    refuse_same_file(a.output, {a.input, a.calibration});
    const MappedFile file(a.input);
    const std::span bytes = file.octets();
    const std::vector<ChunkInFile> chunks = list_chunks(bytes, a.input);
    const auto calibration = load_calibration(a.calibration);
    Output output(a.output, chunks, a);
    const DecodeLayers decode_layers =
        decoder_on(a.device, {output.layout().dtype, a.base_position, calibration}, a.jobs);
    std::vector<std::vector<std::uint8_t>> planes;
    Progress progress("kvdec", bytes.size(), "B");
    std::size_t first = 0;
    for (const ChunkInFile& chunk : chunks) {
        if (output.wants(first, chunk.header.tokens)) {
            const auto buffers = buffers_for(chunk.header.tokens, output.layers(), output.layout(), planes);
            const auto object = bytes.subspan(chunk.offset, chunk.bytes);
            const Status s = decode_layers(object, output.layers(), buffers);
            if (!s.ok()) raise(a.input, chunk.offset, s);
            output.write(read_header(object).value(), first, planes);
        }
        first += chunk.header.tokens;
        progress.advance(chunk.bytes);
    }
    output.commit();
    if (!a.quiet) fmt::print("{}: {} tokens from {} chunks\n", a.output, first, chunks.size());
}

}  // namespace

int main(int argc, char** argv) {
    CLI::App app("Decodes kvcast chunks into a KV cache (safetensors).", "kvdec");
    Arguments a;
    declare(app, a);
    return run_tool(app, argc, argv, [&] { decode(a); });
}
