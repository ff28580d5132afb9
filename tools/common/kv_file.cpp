#include "tools/common/kv_file.h"

#include <fmt/format.h>

#include <charconv>
#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>

namespace kvcast::tools {
namespace {

template <typename T>
bool parse_number(const std::string& text, T& value) {
    const char* end = text.data() + text.size();
    const auto [at, error] = std::from_chars(text.data(), end, value);
    return error == std::errc() && at == end;
}

Dtype dtype_of(const TensorView& t, const std::string& file) {
    switch (t.type) {
        case TensorType::kBf16:
            return Dtype::kBf16;
        case TensorType::kF16:
            return Dtype::kF16;
        case TensorType::kF32:
            return Dtype::kF32;
        default:
            throw DamagedInput(
                fmt::format("{}: tensor '{}' is {}, expected BF16, F16 or F32", file, t.name, t.type_name));
    }
}

std::vector<std::uint64_t> parse_frequencies(const std::string& text, const std::string& file) {
    const auto json = nlohmann::json::parse(text, nullptr, false);
    std::vector<std::uint64_t> out;
    bool numbers = json.is_array();
    for (std::size_t i = 0; numbers && i < json.size(); ++i) {
        numbers = json[i].is_number() && std::isfinite(json[i].get<double>());
        if (numbers) out.push_back(frequency_from_radians(json[i].get<double>()));
    }
    if (!numbers)
        throw DamagedInput(fmt::format("{}: kvcast.rope_freqs is not a JSON array of finite numbers", file));
    return out;
}

}  // namespace

KvInput::KvInput(std::unique_ptr<SafetensorsReader> file) : file_(std::move(file)) {
    read_planes();
    read_ids();
    read_rope();
    model_ = metadata("kvcast.model");
    if (model_.size() > ChunkLimits::kModelBytes) {
        throw DamagedInput(fmt::format("{}: kvcast.model has {} bytes, at most {} fit", file_->name(),
                                       model_.size(), ChunkLimits::kModelBytes));
    }
    const auto base = file_->metadata().find("kvcast.base_position");
    const bool given = base != file_->metadata().end();
    if (given && (!parse_number(base->second, base_position_) || base_position_ > ChunkLimits::kPosition)) {
        throw DamagedInput(fmt::format("{}: kvcast.base_position is '{}', expected an integer from 0 to 2^48",
                                       file_->name(), base->second));
    }
    if (Status s = check_layout(layout_); !s.ok())
        throw DamagedInput(fmt::format("{}: {}", file_->name(), s.message()));
}

void KvInput::read_planes() {
    if (const TensorView* latent = file_->find("latent")) {
        planes_ = {latent};
    } else {
        planes_ = {&file_->at("k"), &file_->at("v")};
    }
    for (const TensorView* t : planes_) {
        if (t->shape.size() != 4) {
            throw DamagedInput(fmt::format(
                "{}: tensor '{}' has {} dimensions, expected 4: layers, tokens, kv_heads, head_dim",
                file_->name(), t->name, t->shape.size()));
        }
        const auto& first = planes_[0]->shape;
        if (t->shape[0] != first[0] || t->shape[1] != first[1] || t->type != planes_[0]->type) {
            throw DamagedInput(
                fmt::format("{}: tensors '{}' and '{}' differ in layers, tokens or element type",
                            file_->name(), planes_[0]->name, t->name));
        }
        layout_.planes.push_back({t->shape[2], t->shape[3]});
    }
    layout_.layers = planes_[0]->shape[0];
    layout_.dtype = dtype_of(*planes_[0], file_->name());
    if (planes_[0]->shape[1] == 0) throw DamagedInput(fmt::format("{}: it holds no tokens", file_->name()));
    // Before RoPE's frequencies, as many as a head has channels, are made.
    if (Status s = check_layout(layout_); !s.ok())
        throw DamagedInput(fmt::format("{}: {}", file_->name(), s.message()));
}

void KvInput::read_ids() {
    const TensorView& ids = file_->at("token_ids");
    const std::size_t tokens = planes_[0]->shape[1];
    if (ids.type != TensorType::kI32 || ids.shape != std::vector<std::size_t>{tokens}) {
        throw DamagedInput(fmt::format("{}: tensor 'token_ids' is {} [{}], expected I32 [{}]", file_->name(),
                                       ids.type_name, fmt::join(ids.shape, ", "), tokens));
    }
    token_ids_.resize(tokens);
    std::memcpy(token_ids_.data(), ids.data.data(), tokens * sizeof(std::int32_t));
}

const std::string& KvInput::metadata(const std::string& key) const {
    const auto found = file_->metadata().find(key);
    if (found == file_->metadata().end()) {
        throw DamagedInput(fmt::format("{}: metadata '{}' is missing", file_->name(), key));
    }
    return found->second;
}

void KvInput::read_rope() {
    const std::string& pairing = metadata("kvcast.rope_pairing");
    Rope& rope = layout_.rope;
    if (pairing == "none") return;
    if (pairing != "half" && pairing != "interleaved") {
        throw DamagedInput(fmt::format("{}: kvcast.rope_pairing is '{}', expected half, interleaved or none",
                                       file_->name(), pairing));
    }
    rope.pairing = pairing == "half" ? RopePairing::kHalf : RopePairing::kInterleaved;
    const std::string& dim = metadata("kvcast.rope_dim");
    const std::size_t head_dim = layout_.planes[0].head_dim;
    if (!parse_number(dim, rope.dim) || rope.dim < 2 || rope.dim % 2 != 0 || rope.dim > head_dim) {
        throw DamagedInput(
            fmt::format("{}: kvcast.rope_dim is '{}', expected an even number from 2 to head_dim {}",
                        file_->name(), dim, head_dim));
    }
    const auto offset = file_->metadata().find("kvcast.rope_offset");
    if (offset != file_->metadata().end() && !parse_number(offset->second, rope.offset)) {
        throw DamagedInput(
            fmt::format("{}: kvcast.rope_offset is '{}', expected a number", file_->name(), offset->second));
    }
    const auto listed = file_->metadata().find("kvcast.rope_freqs");
    if (listed != file_->metadata().end()) {
        rope.frequencies = parse_frequencies(listed->second, file_->name());
        return;
    }
    double theta = 0;
    const std::string& text = metadata("kvcast.rope_theta");
    if (!parse_number(text, theta) || !(theta > 1) || theta > 1e15) {
        throw DamagedInput(
            fmt::format("{}: kvcast.rope_theta is '{}', expected a number above 1", file_->name(), text));
    }
    rope.frequencies = geometric_frequencies(theta, rope.dim);
}

std::vector<PlaneRows> KvInput::rows(std::size_t token) const {
    std::vector<PlaneRows> out;
    const std::size_t tokens = token_ids_.size();
    for (std::size_t l = 0; l < layout_.layers; ++l) {
        for (std::size_t p = 0; p < planes_.size(); ++p) {
            const std::size_t row_bytes = layout_.row_bytes(p);
            out.push_back({planes_[p]->data.data() + (l * tokens + token) * row_bytes, row_bytes});
        }
    }
    return out;
}

std::vector<std::string> plane_names(const Layout& layout) {
    return layout.planes.size() == 1 ? std::vector<std::string>{"latent"}
                                     : std::vector<std::string>{"k", "v"};
}

TensorType tensor_type(Dtype dtype) {
    return dtype == Dtype::kBf16  ? TensorType::kBf16
           : dtype == Dtype::kF16 ? TensorType::kF16
                                  : TensorType::kF32;
}

std::map<std::string, std::string> kv_metadata(const Layout& layout, const std::string& model,
                                               std::uint64_t base_position) {
    std::map<std::string, std::string> out = {{"kvcast.model", model},
                                              {"kvcast.base_position", std::to_string(base_position)}};
    const Rope& rope = layout.rope;
    if (rope.pairing == RopePairing::kNone) {
        out["kvcast.rope_pairing"] = "none";
        return out;
    }
    out["kvcast.rope_pairing"] = rope.pairing == RopePairing::kHalf ? "half" : "interleaved";
    out["kvcast.rope_dim"] = std::to_string(rope.dim);
    if (rope.offset != 0) out["kvcast.rope_offset"] = std::to_string(rope.offset);
    if (const double theta = geometric_theta(rope.frequencies); theta > 0) {
        out["kvcast.rope_theta"] = fmt::format("{}", theta);
        return out;
    }
    std::vector<std::string> radians;
    for (const std::uint64_t f : rope.frequencies)
        radians.push_back(fmt::format("{}", radians_from_frequency(f)));
    out["kvcast.rope_freqs"] = fmt::format("[{}]", fmt::join(radians, ", "));
    return out;
}

}  // namespace kvcast::tools
