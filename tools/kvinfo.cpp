// kvinfo: what a file of chunks holds, and whether it is sound.
#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "codec/decoder.h"
#include "codec/format/chain.h"
#include "tools/common/calibration_file.h"
#include "tools/common/chunk_file.h"
#include "tools/common/cli.h"
#include "tools/common/file.h"

namespace {

using namespace kvcast;
using namespace kvcast::tools;
using nlohmann::json;

const char* dtype_name(Dtype d) {
    return d == Dtype::kBf16 ? "bf16" : d == Dtype::kF16 ? "fp16" : "fp32";
}

const char* pairing_name(RopePairing p) {
    return p == RopePairing::kNone ? "none" : p == RopePairing::kHalf ? "half" : "interleaved";
}

json describe_layout(const Layout& layout) {
    json planes = json::array();
    for (const PlaneShape& p : layout.planes)
        planes.push_back({{"heads", p.heads}, {"head_dim", p.head_dim}});
    json rope = {{"pairing", pairing_name(layout.rope.pairing)},
                 {"offset", layout.rope.offset},
                 {"dim", layout.rope.dim}};
    if (const double theta = geometric_theta(layout.rope.frequencies); theta > 0) rope["theta"] = theta;
    return {
        {"layers", layout.layers}, {"planes", planes}, {"dtype", dtype_name(layout.dtype)}, {"rope", rope}};
}

// Coder states of all blocks.
std::size_t state_bytes(const ChunkHeader& h) {
    const std::size_t run = h.profile == Profile::kKlt ? h.klt.run_layers : 1;
    return (h.layout.layers + run - 1) / run * h.blocks_per_layer() * kBlockStateBytes;
}

json describe_chunk(const ChunkInFile& c) {
    const ChunkHeader& h = c.header;
    std::size_t exact = 0;
    for (const PlaneParams& p : h.planes) exact += p.mode == PlaneMode::kExact;
    json out = {{"offset", c.offset},
                {"bytes", c.bytes},
                {"header_bytes", h.header_bytes},
                {"payload_bytes", h.payload_bytes()},
                {"profile", profile_name(h.profile)},
                {"level", h.level},
                {"first_token", h.first_token},
                {"tokens", h.tokens},
                {"base_position", h.base_position},
                {"chain", to_hex(h.chain)},
                {"parent", to_hex(h.parent)},
                {"blocks", h.block_bytes.size()},
                {"state_bytes", state_bytes(h)},
                {"exact_planes", exact},
                {"planes", h.planes.size()}};
    if (h.profile == Profile::kDelta) {
        out["predictor"] = h.delta.predictor == Predictor::kMean ? "mean" : "anchor";
        out["unrotated"] = h.unrotated;
    }
    if (h.profile != Profile::kKlt) out["exact_rows"] = h.exact_rows;
    if (h.profile == Profile::kKlt) {
        out["calibration"] = to_hex(*h.calibration);
        out["exact_tokens"] = h.klt.exact_tokens;
        out["run_layers"] = h.klt.run_layers;
        out["tail_tokens"] = h.klt.tail_tokens;
        out["tail_level"] = h.klt.tail_level;
    }
    return out;
}

double ratio_of(const ChunkInFile& c) {
    const Layout& l = c.header.layout;
    return static_cast<double>(c.header.tokens * l.token_bytes()) / static_cast<double>(c.bytes);
}

// What klt chunks spend their bytes on, added up.
struct Spent {
    std::uint64_t headers = 0;
    KltBytes blocks;
};

Spent verify(std::span<const std::uint8_t> bytes, const std::vector<ChunkInFile>& chunks,
             const std::string& name, const std::shared_ptr<const Calibration>& calibration) {
    Spent spent;
    DecodeWorkspace workspace;
    for (const ChunkInFile& c : chunks) {
        const auto decoder =
            ChunkDecoder::open(bytes.subspan(c.offset, c.bytes), {.calibration = calibration});
        if (!decoder.ok()) raise(name, c.offset, decoder.status());
        const Layout& layout = c.header.layout;
        std::vector<std::vector<std::uint8_t>> planes;
        std::vector<PlaneBuffer> buffers;
        for (std::size_t p = 0; p < layout.planes.size(); ++p) {
            const std::size_t row = layout.row_bytes(p);
            planes.emplace_back(row * c.header.tokens);
            buffers.push_back({planes.back().data(), row});
        }
        for (std::size_t l = 0; l < layout.layers; ++l) {
            if (Status s = decoder.value().decode_layer(l, buffers, workspace); !s.ok())
                raise(name, c.offset, s);
        }
        if (c.header.profile != Profile::kKlt) continue;
        const KltBytes& b = workspace.klt_bytes();
        spent.headers += c.header.header_bytes;
        spent.blocks.states += b.states;
        spent.blocks.exact_tokens += b.exact_tokens;
        spent.blocks.gains += b.gains;
        spent.blocks.coefficients += b.coefficients;
    }
    return spent;
}

json describe_spent(const Spent& s) {
    return {{"headers", s.headers},
            {"states", s.blocks.states},
            {"exact_tokens", s.blocks.exact_tokens},
            {"gains", s.blocks.gains},
            {"coefficients", s.blocks.coefficients}};
}

void print_spent(const Spent& s) {
    const json described = describe_spent(s);
    std::uint64_t all = 0;
    for (const auto& [name, bytes] : described.items()) all += bytes.get<std::uint64_t>();
    fmt::print("\nbytes of klt chunks:");
    for (const auto& [name, bytes] : described.items()) {
        const auto n = bytes.get<std::uint64_t>();
        fmt::print(" {} {} ({:.1f} %)", name, n, 100.0 * static_cast<double>(n) / static_cast<double>(all));
    }
    fmt::print("\n");
}

// What a terminal takes for a command is not shown.
std::string printable(std::string text) {
    std::ranges::replace_if(
        text, [](unsigned char c) { return c < 0x20 || c == 0x7f; }, '?');
    return text;
}

void print_table(const std::vector<ChunkInFile>& chunks) {
    const ChunkHeader& h = chunks.front().header;
    const Layout& l = h.layout;
    fmt::print("model   {}\nlayout  {} layers of", printable(h.model), l.layers);
    for (const PlaneShape& p : l.planes) fmt::print(" {} x {}", p.heads, p.head_dim);
    fmt::print(", {}, RoPE {} over {} channels", dtype_name(l.dtype), pairing_name(l.rope.pairing),
               l.rope.dim);
    if (const double theta = geometric_theta(l.rope.frequencies); theta > 0) fmt::print(", theta {}", theta);
    fmt::print("\n\n{:>8} {:>7} {:>9} {:>5} {:>10} {:>7} {:>7} {:>8}  {}\n", "token", "tokens", "profile",
               "level", "bytes", "header", "states", "ratio", "chain");
    for (const ChunkInFile& c : chunks) {
        fmt::print("{:>8} {:>7} {:>9} {:>5} {:>10} {:>7} {:>7} {:>7.2f}x  {}\n", c.header.first_token,
                   c.header.tokens, profile_name(c.header.profile), c.header.level, c.bytes,
                   c.header.header_bytes, state_bytes(c.header), ratio_of(c),
                   to_hex(c.header.chain).substr(0, 16));
    }
}

json describe_calibration(const Calibration& c, std::size_t bytes) {
    const CalibrationData& d = c.data();
    const CalibrationCost cost = c.cost();
    json levels = json::array();
    for (const CalibrationLevel& l : d.levels) {
        levels.push_back({{"multiplier", l.multiplier},
                          {"set", l.set},
                          {"kl", l.micronats / 1e6},
                          {"bits_per_value", l.millibits / 1e3}});
    }
    return {{"model", d.model},
            {"id", to_hex(c.id())},
            {"bytes", bytes},
            {"layout", describe_layout(d.layout)},
            {"parts", d.parts},
            {"sets", d.sets},
            {"token_features", d.tokens.features},
            {"vocabulary", d.tokens.vocabulary},
            {"levels", levels},
            {"cost",
             {{"transforms", cost.transforms},
              {"previous_layer", cost.previous_layer},
              {"earlier_layers", cost.earlier_layers},
              {"same_layer", cost.same_layer},
              {"tokens", cost.tokens},
              {"token_table", cost.token_table},
              {"classes", cost.classes},
              {"rest", cost.rest}}}};
}

void print_calibration(const json& c) {
    fmt::print("calibration of {}\nid      {}\n", printable(c["model"].get<std::string>()),
               c["id"].get<std::string>());
    fmt::print("layout  {} layers; {} token features of {} tokens\n\n", c["layout"]["layers"].get<int>(),
               c["token_features"].get<int>(), c["vocabulary"].get<int>());
    fmt::print("{:<16} {:>10}\n", "part", "bytes");
    for (const auto& [name, bytes] : c["cost"].items()) fmt::print("{:<16} {:>10}\n", name, bytes.get<int>());
    fmt::print("{:<16} {:>10}\n\n{:>5} {:>4} {:>11} {:>10} {:>9}\n", "all", c["bytes"].get<int>(), "level",
               "set", "multiplier", "bits/value", "KL");
    std::size_t level = 0;
    for (const json& l : c["levels"]) {
        fmt::print("{:>5} {:>4} {:>11} {:>10.3f} {:>9.5f}\n", ++level, l["set"].get<int>(),
                   l["multiplier"].get<int>(), l["bits_per_value"].get<double>(), l["kl"].get<double>());
    }
}

struct Arguments {
    std::string path;
    std::string calibration;
    bool as_json = false;
    bool verify = false;
};

void inform(const Arguments& a) {
    const std::string& path = a.path;
    const bool as_json = a.as_json, check = a.verify;
    const MappedFile file(path);
    const std::span bytes = file.octets();
    if (is_calibration(bytes)) {
        const json described = describe_calibration(*read_calibration(file, path), bytes.size());
        as_json ? fmt::print("{}\n", described.dump(2)) : print_calibration(described);
        return;
    }
    const std::vector<ChunkInFile> chunks = list_chunks(bytes, path);
    Spent spent;
    if (check) spent = verify(bytes, chunks, path, load_calibration(a.calibration));
    if (!as_json) {
        print_table(chunks);
        if (spent.headers != 0) print_spent(spent);
        if (check) fmt::print("\nverified: every block of {} chunks decodes\n", chunks.size());
        return;
    }
    json out = {{"file", path},
                {"model", chunks.front().header.model},
                {"layout", describe_layout(chunks.front().header.layout)},
                {"verified", check}};
    if (spent.headers != 0) out["klt_bytes"] = describe_spent(spent);
    for (const ChunkInFile& c : chunks) out["chunks"].push_back(describe_chunk(c));
    fmt::print("{}\n", out.dump(2, ' ', false, json::error_handler_t::replace));
}

}  // namespace

int main(int argc, char** argv) {
    CLI::App app("Shows what a file of kvcast chunks, or a calibration, holds.", "kvinfo");
    Arguments a;
    app.add_option("FILE", a.path, "chunks (.kvc) or a calibration (.kvcal); - reads standard input")
        ->required();
    app.add_flag("--json", a.as_json, "machine-readable output");
    app.add_flag("--verify", a.verify, "decode every block too");
    app.add_option("--calibration", a.calibration, "with --verify: calibration of klt chunks (.kvcal)");
    return run_tool(app, argc, argv, [&] { inform(a); });
}
