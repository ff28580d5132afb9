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
    const auto [reference, spread_class] = cheapest_vector_model(values);
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

void BlockWriter::floats(ExponentModel model, kernels::Dtype dtype, std::size_t count, const void* elements) {
    items_.push_back(
        {.kind = Kind::kFloats, .dtype = dtype, .model = model, .count = count, .values = elements});
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
    return {&encode_table(kFirstExponentTable + item.model.table), item.model.center, item.values};
}

void BlockWriter::encode(const Item& item) {
    kernels::RansEncoder* const target = &encoder_;
    if (item.kind == Kind::kWord) {
        const auto word = static_cast<std::uint16_t>(item.word);
        encoder_.next -= sizeof(word);
        std::memcpy(encoder_.next, &word, sizeof(word));
    } else if (item.kind == Kind::kBoundary) {
        behind_.push_back(static_cast<std::size_t>(scratch_.data() + scratch_.size() - encoder_.next));
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
        const std::size_t bytes = kernels::dtype_bytes(item.dtype);
        for (std::size_t i = 0; i < item.count; ++i) {
            std::uint32_t bits = 0;
            std::memcpy(&bits, static_cast<const std::uint8_t*>(item.values) + i * bytes, bytes);
            sum += element_cost(item.model, item.dtype, bits);
        }
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

// For what was taken down, in front of what is coded.
void BlockWriter::make_room() {
    const std::size_t coded =
        begun_ ? static_cast<std::size_t>(scratch_.data() + scratch_.size() - encoder_.next) : 0;
    if (const std::size_t size = coded + greatest_size(); size > scratch_.size()) {
        std::vector<std::uint8_t> larger(size);
        std::copy(scratch_.end() - static_cast<std::ptrdiff_t>(coded), scratch_.end(),
                  larger.end() - static_cast<std::ptrdiff_t>(coded));
        scratch_ = std::move(larger);
    }
    encoder_.next = scratch_.data() + scratch_.size() - coded;
    if (!begun_) std::fill(std::begin(encoder_.state), std::end(encoder_.state), kernels::kStateLow);
    begun_ = true;
}

// What was coded, the states in front.
BlockWriter::Bytes BlockWriter::end() {
    encoder_.next -= kBlockStateBytes;
    std::memcpy(encoder_.next, encoder_.state, kBlockStateBytes);
    begun_ = false;
    return {encoder_.next, scratch_.data() + scratch_.size()};
}

void BlockWriter::tell_apart(Bytes all, std::span<Bytes> pieces) {
    std::size_t begin = 0;
    for (std::size_t i = 0; i < pieces.size(); ++i) {
        const std::size_t end = all.size() - behind_[pieces.size() - 1 - i];
        pieces[i] = all.subspan(begin, end - begin);
        begin = end;
    }
    behind_.clear();
}

BlockWriter::Bytes BlockWriter::finish() {
    Block alone = {this};
    FetchAhead nothing;
    finish_all({&alone, 1}, nothing);
    return alone.bytes;
}

bool BlockWriter::alike(const Item& a, const Item& b) {
    const bool floats = a.kind == Kind::kFloats && b.kind == Kind::kFloats && a.dtype == b.dtype;
    return ((is_strip(a) && is_strip(b)) || floats) && a.count == b.count;
}

class BlockWriter::Abreast {
  public:
    Abreast(std::span<Block> blocks, FetchAhead& ahead)
        : blocks_(blocks), ops_(blocks[0].writer->ops_), ahead_(ahead) {
        for (std::size_t i = 0; i < blocks.size(); ++i) {
            blocks[i].writer->make_room();
            left_[i] = blocks[i].writer->items_.size();
        }
    }

    void run() {
        for (;;) {
            const std::size_t most = *std::max_element(left_.begin(), left_.end());
            if (most == 0) break;
            // Those that are as far as the one with most items left, or can go with it.
            const auto leader =
                static_cast<std::size_t>(std::find(left_.begin(), left_.end(), most) - left_.begin());
            gather(leader);
            if (next(leader).kind == Kind::kFloats) {
                encode_floats();
            } else if (is_strip(next(leader))) {
                encode_strips();
            } else {
                blocks_[leader].writer->encode(next(leader));
                --left_[leader];
            }
        }
        for (const Block& b : blocks_) {
            b.writer->items_.clear();
            b.writer->vectors_.clear();
        }
    }

  private:
    const Item& next(std::size_t i) const { return blocks_[i].writer->items_[left_[i] - 1]; }

    void gather(std::size_t leader) {
        together_ = 0;
        for (std::size_t i = 0; i < blocks_.size(); ++i) {
            if (i != leader && (left_[i] == 0 || !alike(next(i), next(leader)))) continue;
            targets_[together_] = &blocks_[i].writer->encoder_;
            owners_[together_++] = i;
        }
    }

    // Takes items off the blocks that are coded together, as many as each has like ones of, up to `most`.
    template <typename Take>
    void take(std::size_t most, Take&& one) {
        const Item first = next(owners_[0]);
        const auto there = [&](std::size_t i) { return left_[i] != 0 && alike(next(i), first); };
        for (std::size_t n = 0; n < most; ++n) {
            if (n != 0 && !std::all_of(owners_.begin(), owners_.begin() + together_, there)) break;
            ahead_.step();
            for (std::size_t k = 0; k < together_; ++k) {
                const std::size_t i = owners_[k];
                one(*blocks_[i].writer, next(i));
                --left_[i];
            }
        }
    }

    // A few at a time, so that not much is fetched at once.
    void encode_floats() {
        constexpr std::size_t kMost = 4;
        const kernels::Dtype dtype = next(owners_[0]).dtype;
        const std::size_t count = next(owners_[0]).count;
        float_strips_.clear();
        take(kMost, [&](const BlockWriter&, const Item& item) { float_strips_.push_back(floats_of(item)); });
        ops_.encode_floats({targets_.data(), together_}, float_strips_, dtype, count);
    }

    void encode_strips() {
        strips_.clear();
        take(SIZE_MAX, [&](const BlockWriter& w, const Item& item) { strips_.push_back(w.strip_of(item)); });
        ops_.encode_strips({targets_.data(), together_}, strips_);
    }

    std::span<Block> blocks_;
    const kernels::Ops& ops_;
    FetchAhead& ahead_;
    std::array<std::size_t, kMostAbreast> left_ = {};  // items, of each block
    std::array<kernels::RansEncoder*, kMostAbreast> targets_ = {};
    std::array<std::size_t, kMostAbreast> owners_ = {};  // which blocks are coded together now
    std::size_t together_ = 0;
    std::vector<kernels::EncodeStrip> strips_;
    std::vector<kernels::EncodeFloatStrip> float_strips_;
};

void BlockWriter::code_all(std::span<Block> blocks, FetchAhead& ahead) {
    for (const Block& b : blocks) {
        BlockCost* cost = b.ideal;
        if (cost == nullptr) continue;
        for (const Item& item : b.writer->items_)
            item.kind == Kind::kBoundary ? static_cast<void>(++cost) : b.writer->add_cost(item, *cost);
    }
    Abreast(blocks, ahead).run();
}

void BlockWriter::finish_all(std::span<Block> blocks, FetchAhead& ahead) {
    code_all(blocks, ahead);
    for (Block& b : blocks) {
        b.bytes = b.writer->end();
        b.writer->tell_apart(b.bytes, b.pieces);
    }
}

}  // namespace kvcast::entropy
