// Reads one block: the coder states, then words, vectors and strips in the order that the profile asks for
// them. FORMAT.md, section 5. Never reads outside the block: what is missing reads as zero and close()
// reports it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "codec/entropy/model.h"
#include "codec/format/error.h"
#include "kernels/ops.h"

namespace kvcast::entropy {

// Where a side vector goes, and a flag that is cleared where a value is out of range.
struct SideVector {
    std::span<std::int16_t> values;
    bool* fits;
};

class BlockReader {
  public:
    // `block` outlives the reader. One that is shorter than its 128 bytes of states is found by check_used().
    BlockReader(const kernels::Ops& ops, std::span<const std::uint8_t> block);

    std::uint16_t word();

    // A side vector: small integers around a reference, with a class of its own. False where a value is
    // outside [low, high]; values are then clamped into it.
    bool vector(std::span<std::int16_t> values, std::int32_t low, std::int32_t high);

    // `count` values of one spread class (class 0: zeros).
    void strip(unsigned spread_class, std::size_t count, std::int16_t* values);

    // Strips one after another; see decoding_strip().
    void strips(std::span<const kernels::Strip> strips);

    // `count` floating-point elements under one exponent model, stored as their type is.
    void floats(ExponentModel model, kernels::Dtype dtype, std::size_t count, void* elements);

    // The same from up to kMostAbreast blocks at once, of one backend, which is faster than one after
    // another: strip i belongs to reader i modulo their number. Lines of what is outgoing leave meanwhile.
    static constexpr std::size_t kMostAbreast = 8;
    static void strips(std::span<BlockReader* const> readers, std::span<const kernels::Strip> strips,
                       std::span<kernels::Outgoing> outgoing);
    static void floats(std::span<BlockReader* const> readers, std::span<const kernels::FloatStrip> strips,
                       kernels::Dtype dtype, std::size_t count, std::span<kernels::Outgoing> outgoing);
    static void vectors(std::span<BlockReader* const> readers, std::span<const SideVector> vectors,
                        std::int32_t low, std::int32_t high);

    // Bytes of the piece that are not read yet. States hold some of what comes next: between two points of a
    // block the difference tells what lies between them up to a few words.
    std::size_t left() const { return static_cast<std::size_t>(decoder_.end - decoder_.next); }

    // kCorruptBlock unless every byte was used and none was missing.
    Status check_used() const;

    // Goes on with the next piece of a run, the coder's states kept. `piece` outlives the reader.
    void next_piece(std::span<const std::uint8_t> piece);

    // As check_used(), and kCorruptBlock unless the coder ended as it began.
    Status close() const;

  private:
    const kernels::Ops& ops_;
    kernels::RansDecoder decoder_;
};

}  // namespace kvcast::entropy
