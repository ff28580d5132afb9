#include "codec/entropy/block_reader.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "codec/format/chunk_header.h"

namespace kvcast::entropy {

namespace {

kernels::Strip strip_of(unsigned spread_class, std::size_t count, std::int16_t* values) {
    if (spread_class == 0) return {nullptr, 0, count, values};
    const ClassCoding c = class_coding(spread_class);
    return {&alias_table(c.table), c.shift, count, values};
}

}  // namespace

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
    const kernels::Strip coded = strip_of(spread_class, count, values);
    kernels::RansDecoder* const decoder = &decoder_;
    ops_.decode_strips({&decoder, 1}, {&coded, 1});
}

void BlockReader::floats(ExponentModel model, kernels::Dtype dtype, std::size_t count, std::uint32_t* bits) {
    const kernels::FloatStrip coded = {&alias_table(kFirstExponentTable + model.table), model.center, bits};
    kernels::RansDecoder* const decoder = &decoder_;
    ops_.decode_floats({&decoder, 1}, {&coded, 1}, dtype, count);
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
