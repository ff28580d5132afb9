#include "codec/entropy/block_writer.h"

#include <algorithm>
#include <cstring>

#include "codec/format/chunk_header.h"

namespace kvcast::entropy {
namespace {

// The median, within what a vector's word can hold.
std::int32_t reference_of(std::span<const std::int16_t> values) {
    if (values.empty()) return 0;
    std::vector<std::int16_t> sorted(values.begin(), values.end());
    const auto middle = sorted.begin() + static_cast<std::ptrdiff_t>(sorted.size() / 2);
    std::nth_element(sorted.begin(), middle, sorted.end());
    return std::clamp<std::int32_t>(*middle, -1024, 1023);
}

}  // namespace

void BlockWriter::word(std::uint16_t value) {
    items_.push_back({.kind = Kind::kWord, .word = value});
}

void BlockWriter::vector(std::span<const std::int16_t> values) {
    const std::int32_t reference = reference_of(values);
    const unsigned spread_class = cheapest_class(values, reference);
    word(static_cast<std::uint16_t>(reference * 32 | static_cast<std::int32_t>(spread_class)));
    if (spread_class == 0) return;
    const std::size_t offset = vectors_.size();
    for (const std::int16_t v : values) vectors_.push_back(static_cast<std::int16_t>(v - reference));
    items_.push_back({.kind = Kind::kVector,
                      .spread_class = static_cast<std::uint8_t>(spread_class),
                      .count = values.size(),
                      .offset = offset});
}

void BlockWriter::strip(unsigned spread_class, std::span<const std::int16_t> values) {
    if (spread_class == 0) return;
    items_.push_back({.kind = Kind::kStrip,
                      .spread_class = static_cast<std::uint8_t>(spread_class),
                      .count = values.size(),
                      .values = values.data()});
}

void BlockWriter::floats(ExponentModel model, kernels::Dtype dtype, std::span<const std::uint32_t> bits) {
    items_.push_back(
        {.kind = Kind::kFloats, .dtype = dtype, .model = model, .count = bits.size(), .values = bits.data()});
}

std::size_t BlockWriter::greatest_size() const {
    std::size_t bytes = kBlockStateBytes;
    for (const Item& i : items_) bytes += i.count * 8 + 64;
    return bytes;
}

void BlockWriter::encode(const Item& item, kernels::RansEncoder& encoder) const {
    if (item.kind == Kind::kWord) {
        const auto word = static_cast<std::uint16_t>(item.word);
        encoder.next -= sizeof(word);
        std::memcpy(encoder.next, &word, sizeof(word));
        return;
    }
    if (item.kind == Kind::kFloats) {
        ops_.encode_floats(encoder, encode_table(kFirstExponentTable + item.model.table), item.model.center,
                           item.dtype, item.count, static_cast<const std::uint32_t*>(item.values));
        return;
    }
    const bool own = item.kind == Kind::kVector;
    const auto* values = own ? vectors_.data() + item.offset : static_cast<const std::int16_t*>(item.values);
    const ClassCoding c = class_coding(item.spread_class);
    ops_.encode_strip(encoder, encode_table(c.table), c.shift, item.count, values);
}

void BlockWriter::add_cost(const Item& item, BlockCost& cost) const {
    if (item.kind == Kind::kWord) {
        cost.side += 16;
        return;
    }
    std::uint64_t sum = 0;
    if (item.kind == Kind::kFloats) {
        const auto* bits = static_cast<const std::uint32_t*>(item.values);
        for (std::size_t i = 0; i < item.count; ++i) sum += element_cost(item.model, item.dtype, bits[i]);
        cost.payload += static_cast<double>(sum) / 256;
        return;
    }
    const bool own = item.kind == Kind::kVector;
    const auto* values = own ? vectors_.data() + item.offset : static_cast<const std::int16_t*>(item.values);
    for (std::size_t i = 0; i < item.count; ++i) sum += value_cost(item.spread_class, values[i]);
    (own ? cost.side : cost.payload) += static_cast<double>(sum) / 256;
}

void BlockWriter::boundary() {
    items_.push_back({.kind = Kind::kBoundary});
}

// A fresh coder at the end of the scratch memory.
void BlockWriter::begin(kernels::RansEncoder& encoder) {
    scratch_.resize(std::max(scratch_.size(), greatest_size()));
    std::fill(std::begin(encoder.state), std::end(encoder.state), kernels::kStateLow);
    encoder.next = scratch_.data() + scratch_.size();
}

void BlockWriter::finish_run(std::span<std::vector<std::uint8_t>*> pieces, std::span<BlockCost> costs) {
    if (!costs.empty()) {
        std::size_t piece = 0;
        for (const Item& item : items_) {
            item.kind == Kind::kBoundary ? static_cast<void>(++piece) : add_cost(item, costs[piece]);
        }
    }
    kernels::RansEncoder encoder;
    begin(encoder);
    std::size_t piece = pieces.size();
    const std::uint8_t* end = encoder.next;
    const auto close = [&] {
        if (piece < pieces.size()) pieces[piece]->assign(const_cast<const std::uint8_t*>(encoder.next), end);
        end = encoder.next;
    };
    for (auto item = items_.rbegin(); item != items_.rend(); ++item) {
        if (item->kind == Kind::kBoundary) {
            close();
            --piece;
        } else {
            encode(*item, encoder);
        }
    }
    close();
    const auto* states = reinterpret_cast<const std::uint8_t*>(encoder.state);
    pieces[0]->insert(pieces[0]->begin(), states, states + kBlockStateBytes);
    items_.clear();
    vectors_.clear();
}

void BlockWriter::finish(std::vector<std::uint8_t>& out, BlockCost* ideal) {
    if (ideal != nullptr) {
        for (const Item& item : items_) add_cost(item, *ideal);
    }
    kernels::RansEncoder encoder;
    begin(encoder);
    const std::uint8_t* const end = encoder.next;
    for (auto item = items_.rbegin(); item != items_.rend(); ++item) encode(*item, encoder);
    const auto* states = reinterpret_cast<const std::uint8_t*>(encoder.state);
    out.insert(out.end(), states, states + kBlockStateBytes);
    out.insert(out.end(), const_cast<const std::uint8_t*>(encoder.next), end);
    items_.clear();
    vectors_.clear();
}

}  // namespace kvcast::entropy
