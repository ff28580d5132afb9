#include "codec/entropy/block_reader.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "codec/format/chunk_header.h"

namespace kvcast::entropy {

BlockReader::BlockReader(const kernels::Ops& ops, std::span<const std::uint8_t> block) : ops_(ops) {
    const std::size_t states = std::min(block.size(), kBlockStateBytes);
    std::memset(decoder_.state, 0, kBlockStateBytes);
    std::memcpy(decoder_.state, block.data(), states);
    decoder_.next = block.data() + states;
    decoder_.end = block.data() + block.size();
    decoder_.overrun = states < kBlockStateBytes ? 1 : 0;
}

std::uint16_t BlockReader::word() {
    std::uint16_t w = 0;
    if (decoder_.end - decoder_.next < 2) {
        decoder_.overrun = 1;
        return 0;
    }
    std::memcpy(&w, decoder_.next, 2);
    decoder_.next += 2;
    return w;
}

bool BlockReader::vector(std::span<std::int16_t> values, std::int32_t low, std::int32_t high) {
    BlockReader* const reader = this;
    bool fits = true;
    const SideVector one = {values, &fits};
    vectors({&reader, 1}, {&one, 1}, low, high);
    return fits;
}

void BlockReader::strip(unsigned spread_class, std::size_t count, std::int16_t* values) {
    const kernels::Strip one = decoding_strip(spread_class, count, values);
    strips({&one, 1});
}

void BlockReader::strips(std::span<const kernels::Strip> strips) {
    kernels::RansDecoder* const decoder = &decoder_;
    ops_.decode_strips({&decoder, 1}, strips, {});
}

void BlockReader::floats(ExponentModel model, kernels::Dtype dtype, std::size_t count, void* elements) {
    BlockReader* const reader = this;
    const kernels::FloatStrip strip = {exponent_decodings() + model.table, model.center, elements};
    floats({&reader, 1}, {&strip, 1}, dtype, count, {});
}

void BlockReader::strips(std::span<BlockReader* const> readers, std::span<const kernels::Strip> strips,
                         std::span<kernels::Outgoing> outgoing) {
    std::array<kernels::RansDecoder*, BlockReader::kMostAbreast> decoders = {};
    for (std::size_t i = 0; i < readers.size(); ++i) decoders[i] = &readers[i]->decoder_;
    readers[0]->ops_.decode_strips({decoders.data(), readers.size()}, strips, outgoing);
}

void BlockReader::floats(std::span<BlockReader* const> readers, std::span<const kernels::FloatStrip> strips,
                         kernels::Dtype dtype, std::size_t count, std::span<kernels::Outgoing> outgoing) {
    std::array<kernels::RansDecoder*, BlockReader::kMostAbreast> decoders = {};
    for (std::size_t i = 0; i < readers.size(); ++i) decoders[i] = &readers[i]->decoder_;
    readers[0]->ops_.decode_floats({decoders.data(), readers.size()}, strips, dtype, count, outgoing);
}

namespace {

// Adds the reference, and clamps the sums into the range; whether they were in it.
bool add_reference(std::span<std::int16_t> values, int reference, std::int32_t low, std::int32_t high) {
    const auto least = static_cast<std::int16_t>(std::max(low - reference, -32768));
    const auto most = static_cast<std::int16_t>(std::min(high - reference, 32767));
    std::int16_t changed = 0;
    for (std::int16_t& v : values) {
        const std::int16_t inside = std::min(std::max(v, least), most);
        changed = static_cast<std::int16_t>(changed | (inside ^ v));
        v = static_cast<std::int16_t>(inside + reference);
    }
    return changed == 0;
}

}  // namespace

void BlockReader::vectors(std::span<BlockReader* const> readers, std::span<const SideVector> vectors,
                          std::int32_t low, std::int32_t high) {
    std::array<kernels::Strip, kMostAbreast> coded = {};
    std::array<int, kMostAbreast> references = {};
    for (std::size_t i = 0; i < readers.size(); ++i) {
        const std::uint16_t head = readers[i]->word();
        references[i] = static_cast<std::int16_t>(head) >> 5;
        coded[i] = decoding_strip(head & 31u, vectors[i].values.size(), vectors[i].values.data());
    }
    strips(readers, {coded.data(), readers.size()}, {});
    for (std::size_t i = 0; i < readers.size(); ++i) {
        if (!add_reference(vectors[i].values, references[i], low, high)) *vectors[i].fits = false;
    }
}

void BlockReader::next_piece(std::span<const std::uint8_t> piece) {
    decoder_.next = piece.data();
    decoder_.end = piece.data() + piece.size();
}

Status BlockReader::check_used() const {
    if (decoder_.overrun != 0) return {ErrorCode::kCorruptBlock, "its data ends before its values do"};
    if (decoder_.next != decoder_.end) {
        return {ErrorCode::kCorruptBlock,
                fmt::format("{} bytes are left over", decoder_.end - decoder_.next)};
    }
    return {};
}

Status BlockReader::close() const {
    if (Status s = check_used(); !s.ok()) return s;
    const bool closed = std::all_of(std::begin(decoder_.state), std::end(decoder_.state),
                                    [](std::uint32_t x) { return x == kernels::kStateLow; });
    return closed ? Status() : Status(ErrorCode::kCorruptBlock, "the coder does not end in its first state");
}

}  // namespace kvcast::entropy
