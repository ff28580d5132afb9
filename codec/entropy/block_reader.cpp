#include "codec/entropy/block_reader.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "codec/format/chunk_header.h"

namespace kvcast::entropy {

BlockReader::BlockReader(const kernels::Ops& ops, std::span<const std::uint8_t> block) : ops_(ops) {
    std::memcpy(decoder_.state, block.data(), kBlockStateBytes);
    decoder_.next = block.data() + kBlockStateBytes;
    decoder_.end = block.data() + block.size();
    decoder_.overrun = 0;
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
    const std::uint16_t head = word();
    const std::int32_t reference = static_cast<std::int16_t>(head) >> 5;
    strip(head & 31u, values.size(), values.data());
    bool inside = true;
    for (std::int16_t& v : values) {
        const std::int32_t sum = v + reference;
        const std::int32_t clamped = std::clamp(sum, low, high);
        inside = inside && clamped == sum;
        v = static_cast<std::int16_t>(clamped);
    }
    return inside;
}

void BlockReader::strip(unsigned spread_class, std::size_t count, std::int16_t* values) {
    const kernels::Strip one = decoding_strip(spread_class, count, values);
    strips({&one, 1});
}

void BlockReader::strips(std::span<const kernels::Strip> strips) {
    kernels::RansDecoder* const decoder = &decoder_;
    ops_.decode_strips({&decoder, 1}, strips);
}

void BlockReader::floats(ExponentModel model, kernels::Dtype dtype, std::size_t count, void* elements) {
    BlockReader* const reader = this;
    floats({&reader, 1}, {&model, 1}, dtype, count, {&elements, 1});
}

void BlockReader::strips(std::span<BlockReader* const> readers, std::span<const kernels::Strip> strips) {
    std::array<kernels::RansDecoder*, BlockReader::kMostAbreast> decoders = {};
    for (std::size_t i = 0; i < readers.size(); ++i) decoders[i] = &readers[i]->decoder_;
    readers[0]->ops_.decode_strips({decoders.data(), readers.size()}, strips);
}

void BlockReader::floats(std::span<BlockReader* const> readers, std::span<const ExponentModel> models,
                         kernels::Dtype dtype, std::size_t count, std::span<void* const> elements) {
    std::array<kernels::RansDecoder*, BlockReader::kMostAbreast> decoders = {};
    std::array<kernels::FloatStrip, BlockReader::kMostAbreast> strips = {};
    for (std::size_t i = 0; i < readers.size(); ++i) {
        decoders[i] = &readers[i]->decoder_;
        strips[i] = {&decode_table(kFirstExponentTable + models[i].table), models[i].center, elements[i]};
    }
    readers[0]->ops_.decode_floats({decoders.data(), readers.size()}, {strips.data(), readers.size()}, dtype,
                                   count);
}

Status BlockReader::next_piece(std::span<const std::uint8_t> piece) {
    Status used = check_used();
    decoder_.next = piece.data();
    decoder_.end = piece.data() + piece.size();
    return used;
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
