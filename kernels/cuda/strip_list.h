// What is coded of a head, ready for the coder: many warps prepare strips, value by value, so that the one
// warp that writes a block only has the chain of states to follow.
//
// A strip's values are in batches of 256, eight groups of 32. A batch is a record of 32-bit words, by lines
// of 32:
//     symbols   one line: lane i's symbols, four bits each, those of the first group lowest
//     planes    `plane_lines` lines: the raw words of bit plane 0, one for every group, then of plane 1, ...
//     escapes   four lines: what escape symbols stand for, 16 bits each, at the value's place
// Lines that a strip does not need are neither written nor read.
#pragma once

#include <cstdint>

#include "kernels/cuda/tasks.h"

namespace kvcast::kernels::cuda {

inline constexpr std::uint32_t kBatchGroups = 8;
inline constexpr std::uint32_t kBatchValues = kBatchGroups * kLanes;
inline constexpr std::uint32_t kEscapeLines = kBatchValues / 2 / kLanes;
inline constexpr std::uint32_t kMostPlaneLines = 6;  // 24 planes

KVCAST_HD constexpr std::uint32_t lines_of_planes(std::uint32_t planes) {
    return div_up(planes * kBatchGroups, kLanes);
}
KVCAST_HD constexpr std::uint32_t record_words(std::uint32_t plane_lines) {
    return (1 + plane_lines + kEscapeLines) * kLanes;
}

// How a batch is coded, how many values it has, and the word that goes before it where one does.
class BatchWord {
  public:
    BatchWord() = default;

    KVCAST_HD static constexpr BatchWord from_bits(std::uint32_t bits) { return BatchWord(bits); }
    // Nothing is coded.
    KVCAST_HD static constexpr BatchWord empty() { return BatchWord(0); }
    KVCAST_HD static constexpr BatchWord of(std::uint32_t table, std::uint32_t planes) {
        return BatchWord(kCoded | table | planes << 5);
    }
    KVCAST_HD static constexpr BatchWord of_class(unsigned spread_class) {
        if (spread_class == 0) return empty();
        const ClassCoding c = class_coding(spread_class);
        return of(c.table, c.shift);
    }
    KVCAST_HD constexpr BatchWord after(std::uint32_t word) const {
        return BatchWord(bits_ | kHasWord | word << 16);
    }
    // The last of its strip: StripList::count_of() knows its size. Others are whole.
    KVCAST_HD constexpr BatchWord ending(std::uint32_t kind) const { return BatchWord(bits_ | kind << 12); }
    // Without the word, which goes before a strip's first batch only.
    KVCAST_HD constexpr BatchWord continued() const { return BatchWord(bits_ & (kHasWord - 1)); }

    KVCAST_HD constexpr bool coded() const { return (bits_ & kCoded) != 0; }
    KVCAST_HD constexpr std::uint32_t table() const { return bits_ & 31u; }
    KVCAST_HD constexpr std::uint32_t planes() const { return bits_ >> 5 & 31u; }
    KVCAST_HD constexpr bool has_word() const { return (bits_ & kHasWord) != 0; }
    KVCAST_HD constexpr std::uint32_t kind() const { return bits_ >> 12 & 3u; }
    KVCAST_HD constexpr std::uint32_t word() const { return bits_ >> 16; }
    KVCAST_HD constexpr std::uint32_t bits() const { return bits_; }

  private:
    static constexpr std::uint32_t kCoded = 1u << 10, kHasWord = 1u << 11;

    KVCAST_HD explicit constexpr BatchWord(std::uint32_t bits) : bits_(bits) {}

    std::uint32_t bits_ = 0;
};

// The strips of a head of the profiles delta and lossless, in the order of its record (FORMAT.md, section 7):
// exact rows, side vectors, then one strip per channel, or two where there are anchors. Their records lie in
// the same order.
struct StripList {
    std::uint32_t rows;
    std::uint32_t vectors;
    std::uint32_t channels;   // also values of a row and of a vector
    std::uint32_t parts;      // strips of a channel
    std::uint32_t counts[2];  // values of each

    KVCAST_HD constexpr std::uint32_t wide() const { return rows + vectors; }
    KVCAST_HD constexpr std::uint32_t wide_batches() const { return div_up(channels, kBatchValues); }
    KVCAST_HD constexpr std::uint32_t part_batches(std::uint32_t p) const {
        return div_up(counts[p], kBatchValues);
    }
    KVCAST_HD constexpr std::uint32_t channel_batches() const {
        return part_batches(0) + (parts == 2 ? part_batches(1) : 0);
    }
    KVCAST_HD constexpr std::uint32_t batches() const {
        return wide() * wide_batches() + (vectors == 0 ? 0 : channels * channel_batches());
    }
    // The first batch of an exact row, of a vector, and of a channel's part.
    KVCAST_HD constexpr std::uint32_t row(std::uint32_t index) const { return index * wide_batches(); }
    KVCAST_HD constexpr std::uint32_t vector(std::uint32_t v) const { return (rows + v) * wide_batches(); }
    KVCAST_HD constexpr std::uint32_t part(std::uint32_t channel, std::uint32_t p) const {
        return wide() * wide_batches() + channel * channel_batches() + (p == 0 ? 0 : part_batches(0));
    }

    // Kinds of last batches; 0 stands for all other batches.
    static constexpr std::uint32_t kWideEnd = 1;
    KVCAST_HD static constexpr std::uint32_t part_end(std::uint32_t p) { return 2 + p; }

    // Values of a batch of a kind.
    KVCAST_HD constexpr std::uint32_t count_of(std::uint32_t kind) const {
        const std::uint32_t all = kind == 0   ? kBatchValues
                                  : kind == 1 ? channels
                                  : kind == 2 ? counts[0]
                                              : counts[1];
        return (all - 1) % kBatchValues + 1;
    }
};

}  // namespace kvcast::kernels::cuda
