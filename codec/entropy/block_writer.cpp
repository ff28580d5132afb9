#include "codec/entropy/block_writer.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "codec/format/chunk_header.h"

namespace kvcast::entropy {
void BlockWriter::word(std::uint16_t value) {
    items_.push_back({.kind = Kind::kWord, .word = value});
}

void BlockWriter::vector(std::span<const std::int16_t> values) {
    // The median, within what a vector's word can hold.
    std::int32_t reference = 0;
    if (!values.empty()) {
        sorted_.assign(values.begin(), values.end());
        const auto middle = sorted_.begin() + static_cast<std::ptrdiff_t>(sorted_.size() / 2);
        std::nth_element(sorted_.begin(), middle, sorted_.end());
        reference = std::clamp<std::int32_t>(*middle, -1024, 1023);
    }
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

kernels::EncodeStrip BlockWriter::strip_of(const Item& item) const {
    const bool own = item.kind == Kind::kVector;
    const auto* values = own ? vectors_.data() + item.offset : static_cast<const std::int16_t*>(item.values);
    const ClassCoding c = class_coding(item.spread_class);
    return {&encode_table(c.table), c.shift, item.count, values};
}

kernels::EncodeFloatStrip BlockWriter::floats_of(const Item& item) {
    return {&encode_table(kFirstExponentTable + item.model.table), item.model.center,
            static_cast<const std::uint32_t*>(item.values)};
}

void BlockWriter::encode(const Item& item, kernels::RansEncoder& encoder) const {
    kernels::RansEncoder* const target = &encoder;
    if (item.kind == Kind::kWord) {
        const auto word = static_cast<std::uint16_t>(item.word);
        encoder.next -= sizeof(word);
        std::memcpy(encoder.next, &word, sizeof(word));
    } else if (item.kind == Kind::kFloats) {
        const kernels::EncodeFloatStrip strip = floats_of(item);
        ops_.encode_floats({&target, 1}, {&strip, 1}, item.dtype, item.count);
    } else {
        const kernels::EncodeStrip strip = strip_of(item);
        ops_.encode_strips({&target, 1}, {&strip, 1});
    }
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

// What an encoder has written, its states in front.
void BlockWriter::end(const kernels::RansEncoder& encoder, std::vector<std::uint8_t>& out) {
    const auto* states = reinterpret_cast<const std::uint8_t*>(encoder.state);
    out.insert(out.end(), states, states + kBlockStateBytes);
    out.insert(out.end(), const_cast<const std::uint8_t*>(encoder.next),
               const_cast<const std::uint8_t*>(scratch_.data() + scratch_.size()));
    items_.clear();
    vectors_.clear();
}

void BlockWriter::finish(std::vector<std::uint8_t>& out, BlockCost* ideal) {
    if (ideal != nullptr) {
        for (const Item& item : items_) add_cost(item, *ideal);
    }
    kernels::RansEncoder encoder;
    begin(encoder);
    for (auto item = items_.rbegin(); item != items_.rend(); ++item) encode(*item, encoder);
    end(encoder, out);
}

bool BlockWriter::alike(const Item& a, const Item& b) {
    const bool strips =
        a.kind != Kind::kWord && a.kind != Kind::kFloats && b.kind != Kind::kWord && b.kind != Kind::kFloats;
    const bool floats = a.kind == Kind::kFloats && b.kind == Kind::kFloats && a.dtype == b.dtype;
    return (strips || floats) && a.count == b.count;
}

std::size_t BlockWriter::finish_both(BlockWriter& a, std::vector<std::uint8_t>& out_a, BlockWriter& b,
                                     std::vector<std::uint8_t>& out_b, BlockCost* ideal_a,
                                     BlockCost* ideal_b) {
    for (const auto& [writer, ideal] : {std::pair(&a, ideal_a), std::pair(&b, ideal_b)}) {
        if (ideal == nullptr) continue;
        for (const Item& item : writer->items_) writer->add_cost(item, *ideal);
    }
    kernels::RansEncoder encoder_a, encoder_b;
    a.begin(encoder_a);
    b.begin(encoder_b);
    const std::array<kernels::RansEncoder*, 2> both = {&encoder_a, &encoder_b};
    std::size_t i = a.items_.size(), j = b.items_.size();
    while (i != 0 || j != 0) {
        if (i != 0 && j != 0 && alike(a.items_[i - 1], b.items_[j - 1])) {
            const Item &x = a.items_[--i], &y = b.items_[--j];
            if (x.kind == Kind::kFloats) {
                const std::array strips = {floats_of(x), floats_of(y)};
                a.ops_.encode_floats(both, strips, x.dtype, x.count);
            } else {
                const std::array strips = {a.strip_of(x), b.strip_of(y)};
                a.ops_.encode_strips(both, strips);
            }
        } else if (i >= j) {  // the one that is behind goes on alone until they are alike again
            a.encode(a.items_[--i], encoder_a);
        } else {
            b.encode(b.items_[--j], encoder_b);
        }
    }
    const std::size_t before = out_a.size();
    a.end(encoder_a, out_a);
    const std::size_t bytes = out_a.size() - before;
    b.end(encoder_b, out_b);
    return bytes;
}

}  // namespace kvcast::entropy
